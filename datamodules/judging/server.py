"""A judge behind an OpenAI-compatible API: bounded concurrency, one retry layer, one deadline, a cache on disk.

An answer is one request of its own, so that each has its seed and may be had from the cache; servers share the prefix
of equal prompts by themselves. A training run must not end because a judge does not answer: what cannot be had by the
deadline, for whatever reason, is None. Only what no waiting can mend (a key that is refused, a model that is not there)
is an error.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.collect.answers import Answer, answer_of
from lightning_onpolicy.datamodules.collect.client import Client, openai, read_key
from lightning_onpolicy.datamodules.collect.faults import AGAIN, STOPS, Fault, wait_before
from lightning_onpolicy.datamodules.judging.backends import JUDGING, JudgeBackend, JudgeRequest, Reply


class ServerBackend(JudgeBackend):
    """A model behind an OpenAI-compatible API.

    Args:
        base_url: Where it is served, e.g. ``http://127.0.0.1:8000/v1``.
        model: Its name there.
        sampling: How tokens are drawn; ``top_k`` and ``min_p`` go along where they are set (vLLM and SGLang take them).
        concurrency: Requests in flight.
        timeout_s: Seconds one request may take.
        deadline_s: Seconds all requests of one call may take.
        retries: Further attempts after a fault, each with another seed.
        cache: File of answers; equal requests are not sent again, also not by later runs. Null keeps none.
        api_key_env: Environment variable that holds the key.
        extra: More keys of the request's body, e.g. ``{chat_template_kwargs: {enable_thinking: false}}``.

    Raises:
        ImportError: If the official client is not installed.
        ValueError: If a number is out of range, or there is no key.
    """

    remote = True

    def __init__(
        self,
        base_url: str,
        model: str,
        sampling: Sampling | None = None,
        concurrency: int = 32,
        timeout_s: float = 300.0,
        deadline_s: float = 1200.0,
        retries: int = 3,
        cache: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        extra: dict[str, Any] | None = None,
    ) -> None:
        limits = {"concurrency": concurrency, "timeout_s": timeout_s, "deadline_s": deadline_s}
        for key, value in limits.items():
            if not value > 0:
                raise ValueError(f"{key} must be positive, got {value}.")
        if retries < 0:
            raise ValueError(f"retries must be >= 0, got {retries}.")
        openai()
        self.base_url, self.model, self.sampling = base_url.rstrip("/"), model, sampling or JUDGING
        self.concurrency, self.timeout_s, self.deadline_s = concurrency, timeout_s, deadline_s
        self.retries, self.extra = retries, extra or {}
        self._key = read_key(api_key_env, base_url)
        self._cache = None if cache is None else ReplyCache(Path(cache))
        self.faults: Counter[str] = Counter()

    def complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
        """See :class:`~.backends.JudgeBackend`; None for what could not be had by the deadline.

        Raises:
            RuntimeError: If the server refuses the key, does not know the model, or wants money.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._complete(requests))
        with ThreadPoolExecutor(1) as apart:  # a notebook has a loop of its own in this thread
            return apart.submit(asyncio.run, self._complete(requests)).result()

    async def _complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
        end = time.monotonic() + self.deadline_s
        client = Client(self.base_url, self._key, self.timeout_s)
        gate = asyncio.Semaphore(self.concurrency)
        answers: list[list[Reply | None]] = [[None] * request.n for request in requests]

        async def one(i: int, j: int) -> None:
            answers[i][j] = await self._answer(client, gate, requests[i], j, end)

        tasks = [
            asyncio.create_task(one(i, j)) for i, request in enumerate(requests) for j in range(request.n)
        ]
        try:
            if tasks:
                done, late = await asyncio.wait(
                    tasks, timeout=self.deadline_s, return_when=asyncio.FIRST_EXCEPTION
                )
                if not any(task.exception() for task in done):
                    self.faults["deadline"] += len(late)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
                for task in done:
                    task.result()
        finally:
            await client.close()
        return answers

    async def _answer(
        self, client: Client, gate: asyncio.Semaphore, request: JudgeRequest, sample: int, end: float
    ) -> Reply | None:
        for attempt in range(self.retries + 1):
            body = self.body(request, sample, attempt)
            key = self.digest(body)
            if self._cache is not None and (kept := self._cache.get(key)) is not None:
                return kept
            async with gate:
                found = await client.ask(body)
            result = found if isinstance(found, Fault) else answer_of(found.body)
            if isinstance(result, Answer):
                finished = result.finish_reason != "length"
                reply = Reply(result.text, finished, result.tokens_out or 0)
                if self._cache is not None:
                    self._cache.put(key, reply)
                return reply
            self.faults[result.kind] += 1
            if result.kind in STOPS:
                raise RuntimeError(
                    f"the judge at {self.base_url} cannot be asked ({result.kind}): {result.message}"
                )
            wait = wait_before(attempt + 1, result, random.random())
            if result.kind not in AGAIN or time.monotonic() + wait > end:
                return None
            if attempt < self.retries:
                await asyncio.sleep(wait)
        return None

    def body(self, request: JudgeRequest, sample: int, attempt: int = 0) -> dict[str, Any]:
        """What is sent for one sample: a function of the request, the sample's and the attempt's number."""
        draw = self.sampling
        more = {"top_k": draw.top_k, "min_p": draw.min_p}
        seed = hashlib.blake2b(repr((request.seed, sample, attempt)).encode(), digest_size=4).digest()
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": request.prompt}],
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "max_tokens": draw.max_new_tokens,
            "seed": int.from_bytes(seed, "big") >> 1,
            **({"stop": list(draw.stop)} if draw.stop else {}),
            **{name: value for name, value in more.items() if value},
            **self.extra,
        }

    def digest(self, body: dict[str, Any]) -> str:
        """The cache's key: address and whole body, and so model, template, items, order and seed."""
        text = json.dumps([self.base_url, body], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Address, model, sampling and further keys."""
        return {
            "base_url": self.base_url,
            "model": self.model,
            "sampling": asdict(self.sampling),
            "extra": self.extra,
        }

    def close(self) -> None:
        """Close the cache."""
        if self._cache is not None:
            self._cache.close()


class ReplyCache:
    """Replies by key in an SQLite file, committed one by one; several processes may use it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The reward may be asked from another thread than the one that made it, never from two at a time.
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"
        )

    def get(self, key: str) -> Reply | None:
        """The reply, if it is there."""
        row = self._db.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(**json.loads(row[0]))

    def put(self, key: str, reply: Reply) -> None:
        """Keep it."""
        self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(asdict(reply))))

    def close(self) -> None:
        """Close the file."""
        self._db.close()
