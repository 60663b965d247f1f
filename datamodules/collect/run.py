"""The loop: so many workers, one event loop, one client, and the only retry layer there is.

The order of things for each request is what makes it safe to kill the process anywhere: see that its worst case fits
the budget; write it down; send it; commit what came back; only then go on.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from lightning_onpolicy.datamodules.collect.answers import Answer, answer_of
from lightning_onpolicy.datamodules.collect.budget import (
    Budget,
    Charge,
    Prices,
    json_bytes,
    most_prompt_tokens,
)
from lightning_onpolicy.datamodules.collect.cache import AnswerCache, Kept
from lightning_onpolicy.datamodules.collect.client import Reply
from lightning_onpolicy.datamodules.collect.faults import AGAIN, MAYBE_BILLED, STOPS, Fault, wait_before
from lightning_onpolicy.datamodules.collect.files import FailedFile, RowFile
from lightning_onpolicy.datamodules.collect.plan import Plan, Unit, body, canonical_json, sampling
from lightning_onpolicy.datamodules.collect.progress import Progress, Tally
from lightning_onpolicy.datamodules.collect.settings import CollectSettings

HOPELESS = 20  # prompts given up where none was ever answered: the fault is not theirs


class Asks(Protocol):
    """What sends a request."""

    async def ask(self, body: Mapping[str, Any]) -> Reply | Fault:
        """Send it once."""
        ...


@dataclass(frozen=True)
class Stop:
    """Why the run ended before every row was tried.

    Args:
        reason: ``cap``, ``interrupted``, ``hopeless``, ``error`` (something unforeseen) or a kind of fault.
        message: What to tell people.
    """

    reason: str
    message: str


class Collector:
    """Asks for what the cache lacks and writes rows as they become complete.

    Args:
        plan: What is asked.
        settings: How.
        client: Sends requests.
        cache: Keeps answers.
        out: The output.
        failed: The list of failed rows.
        budget: What may be spent.
        tally: Where it is counted.
        progress: Where it is shown.
    """

    def __init__(
        self,
        plan: Plan,
        settings: CollectSettings,
        client: Asks,
        cache: AnswerCache,
        out: RowFile,
        failed: FailedFile,
        budget: Budget,
        tally: Tally,
        progress: Progress,
    ) -> None:
        self.plan, self.settings, self.client = plan, settings, client
        self.cache, self.out, self.failed = cache, out, failed
        self.budget, self.tally, self.progress = budget, tally, progress
        self.prices = Prices(settings.price_in, settings.price_out)
        self._extra = json_bytes(settings.extra_body)
        self.stopped: Stop | None = None
        self._stopping = asyncio.Event()
        self._settled = asyncio.Event()
        self._error: Exception | None = None
        self._open_at = 0.0  # nobody sends before: the server asked everybody to wait
        self._missing: dict[Unit, int] = {}
        self._given_up: set[Unit] = set()

    async def run(self) -> Stop | None:
        """Until every row is answered or given up, or something stops it.

        Raises:
            Exception: What a worker raised; first, what the others have in flight is waited for and kept.
        """
        tasks = iter(list(self._open_requests()))
        workers = [asyncio.create_task(self._work(tasks)) for _ in range(self.settings.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self._error is not None:
            raise self._error
        return self.stopped

    def stop(self, reason: str, message: str) -> None:
        """Send nothing more; what is in flight is waited for, because it is paid for."""
        if self.stopped is None:
            self.stopped = Stop(reason, message)
        self._stopping.set()
        self._settled.set()  # whoever waits for room under the cap need not

    def _open_requests(self) -> Iterator[tuple[Unit, int]]:
        """What the cache lacks, in the order of the prompts; rows it has everything for are written on the way."""
        known = self.cache.keys()
        for unit in self.plan.units:
            lacking = [sample for sample, key in enumerate(unit.keys) if key not in known]
            self.tally.cached += len(unit.keys) - len(lacking)
            self._missing[unit] = len(lacking)
            if not lacking:
                self._write(unit)
            yield from ((unit, sample) for sample in lacking)

    async def _work(self, tasks: Iterator[tuple[Unit, int]]) -> None:
        for unit, sample in tasks:
            if self._stopping.is_set():
                return
            if unit not in self._given_up:
                try:
                    await self._answer(unit, sample)
                    self.progress.update()
                except Exception as error:  # raised at the end of the run: the others' requests are paid for
                    error.add_note(f"while row {self.plan.rows[unit.rows[0]]['uid']!r} was asked for")
                    self._error = self._error or error
                    self.stop("error", f"{type(error).__name__}: {error}")
                    return

    async def _answer(self, unit: Unit, sample: int) -> None:
        """One sample, however many attempts it takes."""
        for attempt in range(1, self.settings.retries + 2):
            outcome = await self._attempt(unit, sample)
            if outcome is None:
                return
            if isinstance(outcome, Answer):
                self._missing[unit] -= 1
                if not self._missing[unit]:
                    self._write(unit)
                return
            self.tally.faults[outcome.kind] += 1
            if outcome.kind in STOPS:
                self.stop(outcome.kind, outcome.message)
                return
            if outcome.kind not in AGAIN or attempt > self.settings.retries:
                self._give_up(unit, sample, attempt, outcome)
                return
            wait = wait_before(attempt, outcome, random.random())
            if outcome.kind == "throttled":
                self._open_at = max(self._open_at, time.monotonic() + wait)
            await self._sleep(wait)

    async def _attempt(self, unit: Unit, sample: int) -> Answer | Fault | None:
        """Send one request, if that is still allowed; None = it was not."""
        worst_in, worst_out = most_prompt_tokens(unit.messages, self._extra), self.settings.max_tokens
        worst = self.prices.charge(worst_in, worst_out)
        while (wait := self._open_at - time.monotonic()) > 0 and not self._stopping.is_set():
            await self._sleep(wait)
        while not self._stopping.is_set() and not self.budget.fits(worst):
            if not self.budget.in_flight:
                self.stop("cap", "the next request could exceed the cap.")
                return None
            await self._settled.wait()  # what is in flight will mostly cost less than was reserved for it
        if self._stopping.is_set():
            return None
        key, sent_body, now = unit.keys[sample], body(self.settings, unit.messages, sample), time.time()
        number = self.cache.send(key, worst_in, worst_out, self.prices, now)
        self.budget.reserve(number, worst)
        self.tally.sent += 1
        started = time.monotonic()
        reply = await self.client.ask(sent_body)
        result = reply if isinstance(reply, Fault) else answer_of(reply.body)
        if isinstance(result, Answer):
            assert isinstance(reply, Reply)
            kept = Kept(reply.body, reply.request_id, time.time(), round(time.monotonic() - started, 3))
            self.cache.receive(
                number, key, canonical_json(sent_body), kept, (result.tokens_in, result.tokens_out)
            )
            self.tally.received += 1
            tokens_in = worst_in if result.tokens_in is None else result.tokens_in
            tokens_out = worst_out if result.tokens_out is None else result.tokens_out
            actual = self.prices.charge(tokens_in, tokens_out)
        else:
            self.cache.fail(number, result.kind)
            actual = worst if result.kind in MAYBE_BILLED else Charge()
        self.budget.settle(number, actual)
        self._settled.set()  # wakes all who wait; the next ones wait for the next
        self._settled = asyncio.Event()
        return result

    async def _sleep(self, seconds: float) -> None:
        """Wait, or until the run stops."""
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    def _give_up(self, unit: Unit, sample: int, attempts: int, fault: Fault) -> None:
        if unit in self._given_up:
            return
        self._given_up.add(unit)
        for row in unit.rows:
            self.tally.failed += 1
            self.failed.add(
                {
                    "uid": self.plan.rows[row]["uid"],
                    "kind": fault.kind,
                    "message": fault.message,
                    "sample": sample,
                    "attempts": attempts,
                    "time": _utc(time.time()),
                }
            )
        answered = self.tally.received + self.tally.cached  # by this run or an earlier one
        if not answered and len(self._given_up) >= HOPELESS:
            self.stop(
                "hopeless", f"{HOPELESS} prompts failed and none was answered, at last: {fault.message}"
            )

    def _write(self, unit: Unit) -> None:
        """Write the rows of a prompt that has all its answers."""
        kept = [self.cache.answer(key) for key in unit.keys]
        for number in unit.rows:
            row = self.plan.rows[number]
            if row["uid"] in self.out:
                continue
            self.out.add({**row, **answered(self.settings, unit, kept)})
            self.tally.done += 1


def answered(settings: CollectSettings, unit: Unit, kept: list[Kept]) -> dict[str, Any]:
    """What the answers add to a row; lists have one entry per sample."""
    answers = []
    for entry in kept:
        answer = answer_of(entry.body)
        assert isinstance(answer, Answer), "only answers are kept"
        answers.append(answer)
    return {
        "responses": [a.text for a in answers],
        "finish_reasons": [a.finish_reason for a in answers],
        "refused": [a.refused for a in answers],
        "truncated": [a.truncated for a in answers],
        "empty": [a.empty for a in answers],
        "reasoning": [a.reasoning for a in answers],
        "model": settings.model,
        "reported_models": [a.model for a in answers],
        "sampling": {**sampling(settings), **({} if settings.seed is None else {"seed": settings.seed})},
        "base_url": settings.base_url,
        "usage": [a.usage for a in answers],
        "times": [_utc(entry.received) for entry in kept],
        "seconds": [entry.seconds for entry in kept],
        "request_ids": [entry.request_id for entry in kept],
        "fingerprints": [a.fingerprint for a in answers],
        "request": unit.digest,
    }


def _utc(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds")
