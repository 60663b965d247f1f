"""One call of the in-process engine: rows join, take a token per step, and leave when they finish.

Legend: ``B`` live rows, ``M`` rows that join, ``P`` prompts of a prefill, ``C`` columns of the cache, ``V``
vocabulary, ``N`` completions asked for.

Bookkeeping lives on the CPU: a step sends token ids and lengths to the policy's device and gets drawn tokens
back.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import Completion, FinishReason, Sampling
from lightning_onpolicy.datamodules.engines.base import Decoder
from lightning_onpolicy.datamodules.engines.cache import RowCache, make_row_cache
from lightning_onpolicy.datamodules.engines.lockstep import Pace
from lightning_onpolicy.datamodules.engines.rows import Limits, Prefilled, Rows
from lightning_onpolicy.datamodules.engines.sampling import distribution, draw, uniforms

_FINISH: tuple[FinishReason, ...] = ("eos", "stop", "length")
_RUNNING = -1
_LOTS = 16  # about so many times groups are handed over: all records are gone through each time


class TextDecoder(Protocol):
    """The part of a Hugging Face tokenizer that finds stop strings."""

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """One text per list of ids."""


class Rollout:
    """Draws ``n`` completions per prompt.

    Args:
        policy: What decodes; in evaluation mode, under ``no_grad``.
        prompts: Token ids.
        n: Completions per prompt.
        sampling: How tokens are drawn.
        seed: Seed of all draws.
        limits: What bounds memory.
        pace: Is asked before every forward pass.
        device: Where the policy lives.
        text: Decodes tails; needed if there are stop strings.
        done: Gets each prompt's number and completions soon after all are there; None: nobody waits for them.
    """

    def __init__(
        self,
        policy: Decoder,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        limits: Limits,
        pace: Pace,
        device: torch.device,
        text: TextDecoder | None,
        done: Callable[[int, list[Completion]], None] | None = None,
    ) -> None:
        self.policy, self.prompts, self.n, self.sampling, self.seed = policy, prompts, n, sampling, seed
        self.limits, self.pace, self.device, self.text = limits, pace, device, text
        self.done = done
        self.lengths = torch.tensor([len(ids) for ids in prompts], dtype=torch.long)
        self.stop_ids = torch.tensor(
            sorted({*policy.eos_token_ids, *sampling.stop_token_ids}), dtype=torch.long
        )
        # A stop string of b bytes spans at most b tokens that carry text; four more for ones that carry none.
        self.tail_width = max((len(s.encode()) for s in sampling.stop), default=-4) + 4
        # Longest first: neighbours pad each other little, and a batch that is too large fails at once.
        self.queue = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self.prefilled: Prefilled | None = None
        self.cache: RowCache | None = None
        self.rows = self._new_rows([])
        self.finish = torch.full((len(prompts) * n,), _RUNNING)
        self.records: list[tuple[Tensor, Tensor, Tensor]] = []  # per draw: sample, token, log-probability
        self.groups: list[list[Completion]] = [[] for _ in prompts]
        self.left = torch.zeros(len(prompts), dtype=torch.bool)  # handed over

    def run(self, version: int) -> list[list[Completion]]:
        """All completions, stamped with ``version``."""
        if not self.prompts:
            return []
        while self.queue or self.prefilled or len(self.rows):
            if self._should_join():
                self._join()
            else:
                self._step()
            if self.done is not None:
                self._hand_over(version, at_least=max(1, len(self.prompts) // _LOTS))
        self._hand_over(version, at_least=1)
        return self.groups

    def dummy_step(self) -> None:
        """A forward pass of one token, for the sake of other ranks."""
        one = torch.ones((1, 1), dtype=torch.long, device=self.device)
        self.policy.decode(one * self.policy.pad_token_id, one, one * 0, self.policy.new_cache())

    # -- rows join --------------------------------------------------------------------------------

    def _should_join(self) -> bool:
        """Joining costs a forward pass of its own, so it waits until an eighth of the rows is free."""
        if not (self.queue or self.prefilled):
            return False
        if self.cache is not None and len(self.rows) and not self.cache.always_joins:
            return False
        return self.limits.rows - len(self.rows) >= max(1, self.limits.rows // 8) or not len(self.rows)

    def _join(self) -> None:
        free = self.limits.rows - len(self.rows)
        if self.prefilled is None:
            self.prefilled = self._prefill(max_prompts=-(-free // self.n))
        ready = self.prefilled
        new = self._new_rows([ready.samples.popleft() for _ in range(min(free, len(ready.samples)))])
        source_M = torch.tensor([ready.row[i] for i in (new.sample // self.n).tolist()], device=self.device)
        new = self._draw(ready.logits[source_M], new)
        going_M = self._running(new).nonzero()[:, 0]
        if len(going_M):
            if self.cache is None:
                self.cache = make_row_cache(self.policy.new_cache(), ready.cache, self.limits.rows)
            index_M = source_M[going_M.to(self.device)]
            self.cache.join(ready.cache, ready.columns, index_M, last=not ready.samples)
            self.rows = self.rows.join(new.take(going_M))
        if not ready.samples:
            self.prefilled = None

    def _new_rows(self, samples: list[int]) -> Rows:
        sample = torch.tensor(samples, dtype=torch.long)
        none = torch.zeros_like(sample)
        tail = torch.full((len(samples), self.tail_width), -1)
        return Rows(sample, self.lengths[sample // self.n], none, none, tail)

    def _prefill(self, max_prompts: int) -> Prefilled:
        """Run the next prompts through the model, each once, as many as one forward pass may take."""
        width = len(self.prompts[self.queue[0]])
        count = max(1, min(max_prompts, len(self.queue), self.limits.prefill_tokens // width))
        chunk = [self.queue.popleft() for _ in range(count)]
        ids_PC = torch.full((count, width), self.policy.pad_token_id)
        for p, prompt in enumerate(chunk):
            ids_PC[p, width - len(self.prompts[prompt]) :] = torch.tensor(self.prompts[prompt])
        pads_P1 = width - self.lengths[chunk][:, None]
        position_PC = (torch.arange(width) - pads_P1).clamp(min=0)
        mask_PC = (torch.arange(width) >= pads_P1).long()
        ids_PC, position_PC, mask_PC = (x.to(self.device) for x in (ids_PC, position_PC, mask_PC))
        cache = self.policy.new_cache()
        for start in range(0, width, self.limits.prefill_tokens):  # pieces: only of a single, unpadded prompt
            piece = slice(start, start + self.limits.prefill_tokens)
            self._tick()
            logits_PV = self.policy.decode(
                ids_PC[:, piece], mask_PC[:, : piece.stop], position_PC[:, piece], cache
            )
        samples = deque(prompt * self.n + i for prompt in chunk for i in range(self.n))
        return Prefilled(cache, width, logits_PV, {prompt: p for p, prompt in enumerate(chunk)}, samples)

    # -- rows go on and leave ---------------------------------------------------------------------

    def _step(self) -> None:
        cache, rows = self.cache, self.rows
        assert cache is not None
        # One transfer: token, position and number of attended columns of each row. A row that is finished but
        # not dropped yet stays at its last position, which the model has.
        last = self.lengths[rows.sample // self.n] + self.sampling.max_new_tokens - 2
        inputs_3B = torch.stack([rows.token, rows.cached.minimum(last), rows.cached + 1]).to(self.device)
        columns = cache.columns + 1
        mask_BC = torch.arange(columns, device=self.device) >= columns - inputs_3B[2][:, None]
        self._tick()
        logits_BV = self.policy.decode(inputs_3B[0][:, None], mask_BC, inputs_3B[1][:, None], cache.cache)
        cache.columns = columns
        self.rows = rows = self._draw(logits_BV, dataclasses.replace(rows, cached=rows.cached + 1))
        running = self._running(rows)
        gone = len(rows) - int(running.sum())
        if gone and (gone == len(rows) or gone >= cache.slack * len(rows)):
            self._drop(running)

    def _drop(self, running: Tensor) -> None:
        """Drop finished rows: the last running rows move to the places of finished ones."""
        assert self.cache is not None
        live = int(running.sum())
        index = torch.arange(live)
        index[~running[:live]] = running[live:].nonzero()[:, 0] + live
        self.rows = self.rows.take(index)
        self.cache.keep(index.to(self.device), int(self.rows.cached.max()) if live else 0)

    def _running(self, rows: Rows) -> Tensor:
        return self.finish[rows.sample] == _RUNNING

    def _draw(self, logits_BV: Tensor, rows: Rows) -> Rows:
        """Draw a token for each row, record those of running rows and note which rows finish."""
        s = self.sampling
        u_B = uniforms(self.seed, rows.sample // self.n, rows.sample % self.n, rows.generated)
        x_BV = distribution(logits_BV, s, self.stop_ids.to(self.device), rows.generated.to(self.device))
        drawn = draw(x_BV, u_B.to(self.device), greedy=s.temperature == 0)
        token_B, logp_B = torch.stack([x.double() for x in drawn]).cpu()  # ids are exact in float64
        token_B, generated_B = token_B.long(), rows.generated + 1
        running_B = self._running(rows)
        bad_B = running_B & ~logp_B.isfinite()
        if bad_B.any():
            row = int(bad_B.nonzero()[0])
            prompt, position = int(rows.sample[row]) // self.n, int(rows.generated[row])
            raise FloatingPointError(
                f"rollout: rank {self.pace.rank}, prompt {prompt}: the policy's logits for response token "
                f"{position} hold NaN or +inf, or leave no token to draw. Look for diverged weights (lower the "
                "learning rate, clip gradients) or an overflow of float16."
            )
        tail = torch.cat([rows.tail, token_B[:, None]], 1)[:, 1:] if self.tail_width else rows.tail
        rows = dataclasses.replace(rows, generated=generated_B, token=token_B, tail=tail)
        ends = (
            torch.isin(token_B, self.stop_ids),
            self._has_stop(tail),
            generated_B >= s.max_new_tokens,
        )
        code_B = torch.full_like(token_B, _RUNNING)
        for code in reversed(range(len(ends))):  # the first reason that holds is written last
            code_B[ends[code]] = code
        live = rows.sample[running_B]
        self.records.append((live, token_B[running_B], logp_B[running_B].float()))
        self.finish[live] = code_B[running_B]
        return rows

    def _has_stop(self, tail_BS: Tensor) -> Tensor:
        """``[B]`` bool: the tail's text holds a stop string."""
        if not self.sampling.stop:
            return torch.zeros(len(tail_BS), dtype=torch.bool)
        assert self.text is not None
        tails = [[i for i in tail if i >= 0] for tail in tail_BS.tolist()]
        texts = self.text.batch_decode(tails, skip_special_tokens=False)
        return torch.tensor([any(s in text for s in self.sampling.stop) for text in texts], dtype=torch.bool)

    def _tick(self) -> None:
        self.pace.tick(working=True, unfinished=int((self.finish == _RUNNING).sum()))

    # -- results ----------------------------------------------------------------------------------

    def _hand_over(self, version: int, at_least: int) -> None:
        """Complete groups leave, if there are so many; what is recorded of others stays, in order of time."""
        ready = (self.finish.view(-1, self.n) != _RUNNING).all(1) & ~self.left
        numbers = ready.nonzero()[:, 0].tolist()
        if len(numbers) < at_least:
            return
        sample, token, logp = (torch.cat(parts) for parts in zip(*self.records, strict=True))
        leaves = ready[sample // self.n]
        self.records = [(sample[~leaves], token[~leaves], logp[~leaves])]
        sample, token, logp = sample[leaves], token[leaves], logp[leaves]
        order = sample.argsort(stable=True)  # draws are in order of time, so this is by sample, then position
        sizes = sample.bincount(minlength=len(self.finish))[ready.repeat_interleave(self.n)].tolist()
        done = [
            # clones, because a view would carry everybody's tokens along when it is pickled
            Completion(ids.clone(), logps.clone(), _FINISH[code], version)
            for ids, logps, code in zip(
                torch.split(token[order], sizes),
                torch.split(logp[order], sizes),
                self.finish.view(-1, self.n)[ready].view(-1).tolist(),
                strict=True,
            )
        ]
        self.left |= ready
        for i, number in enumerate(numbers):
            self.groups[number] = done[i * self.n : (i + 1) * self.n]
            if self.done is not None:
                self.done(number, self.groups[number])
