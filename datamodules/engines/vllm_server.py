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
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_onpolicy.datamodules.batch import Completion, FinishReason, Sampling
from lightning_onpolicy.datamodules.engines.base import Decoder, StreamingEngine
from lightning_onpolicy.datamodules.engines.lockstep import is_sharded
from lightning_onpolicy.datamodules.engines.probe import changed, fingerprint, logprobs_of
from lightning_onpolicy.datamodules.engines.side_by_side import SideBySide
from lightning_onpolicy.datamodules.engines.vllm_wire import VLLMWire

_PROBE = 16  # tokens


class VLLMServerEngine(StreamingEngine):
    """Samples from a vLLM server started as::

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm

    with the policy's own model, for this engine alone. The routes that replace weights exist in this mode only: serve
    on the loopback or a private network. Equal seeds give equal samples as far as the server's arithmetic does not
    depend on its load.

    Before the first sampling the server is given changed weights, and must follow; then, and after every replacement,
    it must say of a few tokens what the policy says: to 1e-3 nats on average where both compute in float32, to 0.1 nats
    otherwise. What is wrong by less is seen in the module's mismatch metrics alone.

    Args:
        policy: What is trained: a :class:`~.base.Decoder` with ``save_pretrained``, as ``modules.Policy`` is. Adapters
            are merged into what is sent, never into what is trained.
        base_url: The server's address, or one per rank.
        weights: Folder that trainer and server see under the same path; one checkpoint of the policy lies below
            it, and is deleted at the end (a run that is killed leaves it).
        model: Its name at the server; None: the only one.
        concurrency: Requests in flight; each asks for all completions of a prompt.
        timeout_s: Seconds that one request, or one replacement of weights, may take.
        deadline_s: Seconds that one call of :meth:`generate` may take; None: any.
        api_key_env: Environment variable with the server's key; unset: none is sent.

    Raises:
        TypeError: If the policy cannot be saved, or not be compared with the server.
        ValueError: If a number is out of range, there is not one server per rank, or the server reports other
            log-probabilities than those sampled from.
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
        if not (
            isinstance(policy, nn.Module)
            and isinstance(policy, Decoder)
            and hasattr(policy, "save_pretrained")
        ):
            raise TypeError(
                f"{type(policy).__name__} cannot be served: an nn.Module with save_pretrained, whose weights a server "
                "can get, and with what in-process sampling needs (datamodules.engines.Decoder), to compare the two."
            )
        for key, value in (
            ("concurrency", concurrency),
            ("timeout_s", timeout_s),
            ("deadline_s", deadline_s),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{key} must be positive, got {value}.")
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        rank, world = _place()
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
        self._tolerance = 1e-3 if exact else 0.1  # nats
        self.model = model or str(self._wire.ask("/v1/models")["data"][0]["id"])
        self._weights, self._prefix = Path(weights).resolve(), f"rank-{rank}-"
        # Deletes itself, at the latest with the process.
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = itertools.count()
        self._sent: torch.Tensor | None = None
        self._follows = False

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
        # Not the version: a reset or an average replaces weights between two steps.
        mark = fingerprint(self.policy)
        if self._sent is None or not torch.equal(mark, self._sent):
            self._sent = None  # until all is well: nobody samples from weights that are half there
            if not self._follows:
                with changed(self.policy):
                    self._send()
                self._follows = True
            self._send()
            self._sent = mark
        self.version = version

    def _send(self) -> None:
        """Replace the server's weights by the policy's, and compare the two."""
        if self._home is None:
            self._weights.mkdir(parents=True, exist_ok=True)
            self._home = tempfile.TemporaryDirectory(prefix=self._prefix, dir=self._weights)
        folder = Path(self._home.name) / str(next(self._numbers))
        self.policy.save_pretrained(folder)
        self._wire.reload(str(folder))
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old)
        prompt = [self.policy.eos_token_ids[0]]
        longest = Sampling(max_new_tokens=_PROBE, min_new_tokens=_PROBE)
        [(_, [drawn])] = self._drawn([prompt], 1, longest, 0)
        own = logprobs_of(self.policy, prompt, drawn.ids.tolist())
        gap = float((own - drawn.logprobs).abs().mean())
        if not gap <= self._tolerance:
            raise RuntimeError(
                f"after it was given new weights, {self._wire.base_url} is {gap:.2g} nats off the policy's own "
                f"log-probabilities of {_PROBE} tokens on average (allowed: {self._tolerance:g}): not all weights were "
                "replaced, or it serves another model. (vLLM for CPUs does not replace a head that is tied to the "
                "embedding.)"
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
        self._sent = None
        if self._home is not None:
            self._home.cleanup()
            self._home = None

    def _require_weights(self) -> None:
        if self._sent is None:
            raise RuntimeError(
                f"nobody has given {self._wire.base_url} the policy's weights: call sync first. (A datamodule does so "
                "for the policy; a local teacher cannot be sampled from by this engine.)"
            )

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
                found = self._completions(reply, int(common["n"]))
                yield number, found if len(found) == n else found * n
        finally:
            answers.stop()

    def _common(self, n: int, sampling: Sampling) -> dict[str, Any]:
        ends = dict.fromkeys((*self.policy.eos_token_ids, *sampling.stop_token_ids))
        if 0 < sampling.temperature < 0.01 or sampling.temperature > 2:
            raise ValueError(
                f"vLLM draws at temperatures from 0.01 to 2, or 0; sampling.temperature is {sampling.temperature}."
            )
        body: dict[str, Any] = {
            "model": self.model,
            "n": n if sampling.temperature else 1,  # n greedy ones are one
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,  # else the model's generation config may bring another
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(ends),
            "stop": list(sampling.stop),
            "skip_special_tokens": False,  # stop strings may hold them
            "spaces_between_special_tokens": False,
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


def _place() -> tuple[int, int]:
    """Rank and number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _seed(seed: int, number: int) -> int:
    """31 bits of a prompt's own; the server adds the completion's number."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest(), "big") >> 1
