"""Rollouts by a vLLM server, which gets the newest weights before every sampling: tokens in, tokens out.

The server runs in an environment of its own and is spoken to over HTTP. It sees a folder that the trainer writes
weights to (a RAM disk on the same machine, a shared file system otherwise), and reloads them in place.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_onpolicy.datamodules.batch import Completion, FinishReason, Sampling
from lightning_onpolicy.datamodules.engines.base import StreamingEngine
from lightning_onpolicy.datamodules.engines.lockstep import is_sharded
from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.datamodules.engines.side_by_side import SideBySide
from lightning_onpolicy.datamodules.engines.vllm_wire import VLLMWire

_PROBE = 8  # tokens


class VLLMServerEngine(StreamingEngine):
    """Samples from a vLLM server started as::

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

    with the policy's own model, for this engine alone. The routes that replace weights exist in this mode only: serve
    on the loopback or a private network. Equal seeds give equal samples as far as the server's arithmetic does not
    depend on its load.

    Args:
        policy: What is trained; it needs ``save_pretrained`` (``modules.Policy`` has it; adapters are merged into what
            is sent, never into what is trained).
        base_url: The server's address, or one per rank.
        weights: Folder that trainer and server see under the same path; one checkpoint of the policy lies there.
        model: Its name at the server; None: the only one.
        concurrency: Requests in flight; each asks for all completions of a prompt.
        timeout_s: Seconds that one request, or one replacement of weights, may take.
        deadline_s: Seconds that one call of :meth:`generate` may take; None: any.
        api_key_env: Environment variable with the server's key; unset: none is sent.

    Raises:
        TypeError: If the policy cannot be saved.
        ValueError: If a number is out of range, the policy is sharded, there are more ranks than servers, or the
            server reports other log-probabilities than those sampled from.
        RuntimeError: If the server cannot be reached.
    """

    def __init__(
        self,
        policy: Any,
        base_url: str | list[str],
        weights: str,
        *,
        model: str | None = None,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        deadline_s: float | None = None,
        api_key_env: str = "VLLM_API_KEY",
    ) -> None:
        if not (isinstance(policy, nn.Module) and hasattr(policy, "save_pretrained")):
            raise TypeError(f"{type(policy).__name__} has no save_pretrained: no server can get its weights.")
        for key, value in (
            ("concurrency", concurrency),
            ("timeout_s", timeout_s),
            ("deadline_s", deadline_s),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{key} must be positive, got {value}.")
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        rank, world = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if len(urls) != world:
            raise ValueError(
                f"base_url names {len(urls)} servers for {world} ranks: each rank replaces the weights of its own."
            )
        self.policy: Any = policy
        self.concurrency, self.deadline_s = concurrency, deadline_s
        self.version = 0
        self._wire = VLLMWire(urls[rank], timeout_s, os.environ.get(api_key_env))
        dtype = self._wire.check()
        exact = dtype == "torch.float32" and all(p.dtype == torch.float32 for p in policy.parameters())
        self._tolerance = 1e-3 if exact else 0.25  # nats
        self.model = model or str(self._wire.ask("/v1/models")["data"][0]["id"])
        self._folder = Path(weights).resolve() / f"rank-{rank}"
        self._numbers = itertools.count()
        self._sent: tuple[int, int] | None = None
        self._there: Path | None = None

    def sync(self, policy: nn.Module, version: int) -> None:
        """Give the server the policy's weights, unless it has them, and stamp completions with ``version``.

        Raises:
            ValueError: If it is another policy, or sharded.
            RuntimeError: If the server cannot take them, or is not the policy's equal afterwards.
        """
        if not any(module is self.policy for module in policy.modules()):
            raise ValueError("this engine's server holds the weights of the policy it was made with alone.")
        if is_sharded(self.policy):
            raise ValueError(
                "a sharded policy cannot be sent to a server yet: use TransformersEngine, or DDP."
            )
        # A reset may replace weights between two steps: every in-place change of a tensor counts.
        state = version, sum(p._version for p in self.policy.parameters())
        self.version = version
        if state == self._sent:
            return
        folder = self._folder / f"weights-{os.getpid()}-{next(self._numbers)}"
        try:
            self.policy.save_pretrained(folder)
            self._wire.reload(str(folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._forget()
        self._sent, self._there = None, folder
        self._require_the_same_model()
        self._sent = state

    def _require_the_same_model(self) -> None:
        """Compare what the server says of a few tokens with what the policy says: some weights may not have arrived.

        vLLM 0.32 for CPUs, for one, keeps the old output head where it is tied to the embedding, with a warning in its
        own log alone.
        """
        prompt = [self.policy.eos_token_ids[0]]
        longest = Sampling(max_new_tokens=_PROBE, min_new_tokens=_PROBE)
        [(_, [drawn])] = self._drawn([prompt], 1, longest, 0)
        own = _logprobs(self.policy, prompt, drawn.ids.tolist())
        gap = float((own - drawn.logprobs).abs().max())
        if not gap <= self._tolerance:
            raise RuntimeError(
                f"after it was given new weights, {self._wire.base_url} is {gap:.2g} nats off the policy's own "
                f"log-probabilities of {_PROBE} tokens (allowed: {self._tolerance:g}): not all weights were replaced, "
                "or it serves another model. (vLLM for CPUs does not replace a head that is tied to the embedding.)"
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        budgets: Sequence[int] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See :class:`~.base.RolloutEngine`.

        Raises:
            ValueError: If a prompt is empty, ``n`` or a budget is not positive.
            RuntimeError: If the server has not been given weights, refuses a request (its words are in the message) or
                is gone.
            TimeoutError: If ``timeout_s`` or ``deadline_s`` passes.
        """
        self._require_weights()
        drawn = dict(self._drawn(prompts, n, sampling, seed, budgets, numbers))
        return [drawn[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        done: Callable[[int, list[Completion]], None],
    ) -> None:
        """As :meth:`generate`; ``done`` gets each prompt's completions when they are there."""
        self._require_weights()
        for number, completions in self._drawn(prompts, n, sampling, seed):
            done(number, completions)

    def close(self) -> None:
        """Delete the weights that were sent last; the server goes on, and keeps them in its memory."""
        self._forget()
        self._sent = None

    def _require_weights(self) -> None:
        if self._sent is None:
            raise RuntimeError(
                f"nobody has given {self._wire.base_url} the policy's weights: call sync first. (A datamodule does so "
                "for the policy; a local teacher cannot be sampled from by this engine.)"
            )

    def _forget(self) -> None:
        if self._there is not None:
            shutil.rmtree(self._there, ignore_errors=True)
            self._there = None

    def _drawn(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        budgets: Sequence[int] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Number and completions of every prompt, as they come."""
        budgets = [sampling.max_new_tokens] * len(prompts) if budgets is None else budgets
        numbers = range(len(prompts)) if numbers is None else numbers
        if n < 1 or not all(map(len, prompts)) or min(budgets, default=1) < 1:
            raise ValueError(f"n ({n}) and budgets must be at least 1, and no prompt may be empty.")
        common = self._common(n, sampling)
        bodies = [
            common
            | {"prompt": list(ids), "max_tokens": budget, "min_tokens": min(sampling.min_new_tokens, budget)}
            | {"seed": _seed(seed, number)}
            for ids, budget, number in zip(prompts, budgets, numbers, strict=True)
        ]
        end = math.inf if self.deadline_s is None else time.monotonic() + self.deadline_s
        answers = SideBySide(lambda body: self._wire.ask("/v1/completions", body), bodies, self.concurrency)
        try:
            for left in range(len(bodies), 0, -1):
                answer = answers.next(end)
                if answer is None:
                    raise TimeoutError(
                        f"{left} of {len(prompts)} prompts are unanswered by {self._wire.base_url} after "
                        f"deadline_s={self.deadline_s:g}."
                    )
                number, reply = answer
                yield number, self._completions(reply, n)
        finally:
            answers.stop()

    def _common(self, n: int, sampling: Sampling) -> dict[str, Any]:
        ends = dict.fromkeys((*self.policy.eos_token_ids, *sampling.stop_token_ids))
        body: dict[str, Any] = {
            "model": self.model,
            "n": n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "stop_token_ids": list(ends),
            "stop": list(sampling.stop),
            "logprobs": 0,
            "return_token_ids": True,
        }
        head = getattr(self.policy, "head", None)
        if head is not None:  # rows of the head that no token has: the policy never samples them
            bias = {str(i): -100.0 for i in range(head.vocab_size, head.weight.shape[0])}
            body |= {"logit_bias": bias} if bias else {}
        return body

    def _completions(self, reply: dict[str, Any], n: int) -> list[Completion]:
        choices = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
        if len(choices) != n:
            raise RuntimeError(f"{self._wire.base_url} gave {len(choices)} completions, asked for {n}.")
        return [self._completion(choice) for choice in choices]

    def _completion(self, choice: dict[str, Any]) -> Completion:
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if ids is None or logprobs is None or len(ids) != len(logprobs):
            raise RuntimeError(
                f"{self._wire.base_url} gave no token ids with one log-probability each: is it a vLLM of 0.32 or later?"
            )
        said, why = choice["finish_reason"], choice.get("stop_reason")
        if said not in ("stop", "length"):
            raise RuntimeError(
                f"{self._wire.base_url} ended a completion by {said!r}: it was not sampled to its end."
            )
        finish: FinishReason = "length" if said == "length" else "stop" if isinstance(why, str) else "eos"
        return Completion(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(logprobs, dtype=torch.float32),
            finish,
            self.version,
        )


@torch.no_grad()
def _logprobs(policy: Any, prompt: list[int], new: list[int]) -> torch.Tensor:
    """``[L]``: the policy's log-probabilities of the tokens after a prompt if it may not end yet, on the CPU."""
    device, width = next(policy.parameters()).device, len(prompt) + len(new) - 1
    rows = [prompt + new[:i] for i in range(len(new))]  # left-padded, all ending where a token is predicted
    ids = torch.tensor([[policy.pad_token_id] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    place = torch.arange(width, device=device) - (width - lengths)[:, None]
    with eval_mode(policy):
        logits = policy.decode(ids, (place >= 0).long(), place.clamp(min=0), policy.new_cache())
    logits[:, list(policy.eos_token_ids)] = -torch.inf
    found: torch.Tensor = logits.float().log_softmax(-1).cpu()[range(len(new)), new]
    return found


def _seed(seed: int, number: int) -> int:
    """31 bits of a prompt's own; the server adds the completion's number."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest(), "big") >> 1
