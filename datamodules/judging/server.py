"""A judge behind an OpenAI-compatible API: bounded concurrency, one retry layer, one deadline, a cache on disk.

An answer is one request of its own, so that each has its seed and may be had from the cache; servers share the prefix
of equal prompts by themselves. A training run must not end because a judge does not answer: what cannot be had by the
deadline, for whatever reason, is None, and the first loss of each kind is a warning that says why. Only what no waiting
can mend is an error: a key that is refused, a model that is not there, request after request that the server does not
accept.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
import warnings
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.collect.answers import Answer, answer_of
from lightning_onpolicy.datamodules.collect.client import Client, openai, read_key
from lightning_onpolicy.datamodules.collect.faults import AGAIN, STOPS, Fault, wait_before
from lightning_onpolicy.datamodules.collect.settings import check_base_url
from lightning_onpolicy.datamodules.judging.backends import JUDGING, JudgeBackend, JudgeRequest, Reply
from lightning_onpolicy.datamodules.judging.prompts import unspelled
from lightning_onpolicy.datamodules.judging.replies import ReplyCache

HOPELESS = (
    100  # requests not accepted before the first answer: more than one over-long group has; the fault is ours
)
OWN_KEYS = frozenset("model messages n seed stop stream".split())


class ServerBackend(JudgeBackend):
    """A model behind an OpenAI-compatible API.

    Args:
        base_url: Where it is served, e.g. ``http://127.0.0.1:8000/v1``.
        model: Its name there.
        sampling: How tokens are drawn. ``top_k``, ``min_p``, ``min_new_tokens`` (as ``min_tokens``) and
            ``stop_token_ids`` go along where they are set: vLLM and SGLang take them.
        concurrency: Requests in flight.
        timeout_s: Seconds one request may take.
        deadline_s: Seconds all requests of one call may take. A reward that is asked while others are sampled is called
            twice per batch: keep it below half of the datamodule's ``deadline_s``, which ends the run.
        retries: Further attempts after a fault, each with another seed.
        cache: File of answers; what was answered is not asked again, also not by later runs. Null keeps none.
        api_key_env: Environment variable that holds the key.
        special_tokens: Special tokens of the judge's tokenizer, besides the common ones (``<|…|>``, ``<end_of_turn>``,
            ``</s>``, ``[INST]``): in prompts they are spelt with a space, so that no response ends the user's turn.
        prompt_end: How the model's chat template ends a prompt, as far as thinking goes: ``<think>`` where it opens the
            thinking itself (R1-distill, Qwen3-Thinking), so that an answer without ``</think>`` has no scores; an empty
            text where it does not, or the server sends the thinking apart. Null: not known; of the answers without
            ``</think>`` then only those that were cut have no scores.
        extra: More keys of the request's body, e.g. ``{chat_template_kwargs: {enable_thinking: false}}``; null leaves a
            key out: ``{max_tokens: null, max_completion_tokens: 4096}``.

    Raises:
        ImportError: If the official client is not installed.
        ValueError: If a number is out of range, there is no key, ``base_url`` holds a secret, or ``extra`` a key that
            makes samples equal or answers unreadable.
    """

    remote = True

    def __init__(
        self,
        base_url: str,
        model: str,
        sampling: Sampling | None = None,
        concurrency: int = 32,
        timeout_s: float = 300.0,
        deadline_s: float = 600.0,
        retries: int = 3,
        cache: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        extra: dict[str, Any] | None = None,
        special_tokens: Sequence[str] = (),
        prompt_end: str | None = None,
    ) -> None:
        limits = {"concurrency": concurrency, "timeout_s": timeout_s, "deadline_s": deadline_s}
        for key, value in limits.items():
            if not value > 0:
                raise ValueError(f"{key} must be positive, got {value}.")
        if retries < 0:
            raise ValueError(f"retries must be >= 0, got {retries}.")
        taken = sorted(OWN_KEYS & set(extra or {}))
        if taken:
            raise ValueError(
                f"extra holds {taken}, which the judge sets by itself: each sample has its own seed."
            )
        check_base_url(base_url)
        openai()
        self.base_url, self.model, self.sampling = base_url.rstrip("/"), model, sampling or JUDGING
        self.concurrency, self.timeout_s, self.deadline_s = concurrency, timeout_s, deadline_s
        self.retries, self.extra, self.special_tokens = retries, extra or {}, tuple(special_tokens)
        self.prompt_end = prompt_end
        self._key = read_key(api_key_env, base_url)
        self._cache = None if cache is None else ReplyCache(Path(cache))
        self.faults: Counter[str] = Counter()
        self._lost: dict[str, str] = {}  # kind of fault: the first message, until it is said
        self._said = set[str]()
        self._answered, self._refused = False, 0

    def complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
        """See :class:`~.backends.JudgeBackend`; None for what could not be had by the deadline.

        Equal samples of equal requests are asked for once.

        Raises:
            RuntimeError: If the server refuses the key, does not know the model, wants money, or has accepted none of
                the first requests.
        """
        keys = [[self.digest(request, j) for j in range(request.n)] for request in requests]
        open_: dict[str, tuple[JudgeRequest, int]] = {}
        found: dict[str, Reply] = {}
        for request, row in zip(requests, keys, strict=True):
            for j, key in enumerate(row):
                kept = None if self._cache is None or key in found else self._cache.get(key)
                if kept is not None:
                    found[key], self._answered = kept, True
                elif key not in found:
                    open_[key] = request, j
        if open_:
            _run(self._complete(open_, found))
        for kind in sorted(set(self._lost) - self._said):
            self._said.add(kind)
            warnings.warn(
                f"the judge at {self.base_url} left samples unanswered ({kind}): {self._lost[kind]}. They do not vote; "
                "further ones of this kind are not mentioned.",
                stacklevel=2,
            )
        # Put on here: what is cached is what the server said, whatever is known of its template.
        said = {key: replace(reply, prompt_end=self.prompt_end) for key, reply in found.items()}
        return [[said.get(key) for key in row] for row in keys]

    async def _complete(self, open_: Mapping[str, tuple[JudgeRequest, int]], found: dict[str, Reply]) -> None:
        """Ask for what is open; what could be had is in ``found``."""
        end = time.monotonic() + self.deadline_s
        client = Client(self.base_url, self._key, self.timeout_s)
        gate = asyncio.Semaphore(self.concurrency)

        async def one(key: str, request: JudgeRequest, sample: int) -> None:
            reply = await self._answer(client, gate, request, sample, end)
            if reply is not None:
                found[key], self._answered = reply, True
                if self._cache is not None:
                    self._cache.put(key, reply)

        tasks = [asyncio.create_task(one(key, *asked)) for key, asked in open_.items()]
        try:
            done, late = await asyncio.wait(
                tasks, timeout=self.deadline_s, return_when=asyncio.FIRST_EXCEPTION
            )
            errors = [error for task in done if (error := task.exception()) is not None]
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            if errors:
                raise errors[0]
            if late:
                self.faults["deadline"] += len(late)
                self._lost.setdefault("deadline", f"nothing within deadline_s={self.deadline_s:g}")
        finally:
            await client.close()

    async def _answer(
        self, client: Client, gate: asyncio.Semaphore, request: JudgeRequest, sample: int, end: float
    ) -> Reply | None:
        for attempt in range(self.retries + 1):
            async with gate:
                found = await client.ask(self.body(request, sample, attempt))
            result = found if isinstance(found, Fault) else answer_of(found.body)
            if isinstance(result, Answer):
                return Reply(result.text, result.finish_reason != "length", result.tokens_out or 0)
            self.faults[result.kind] += 1
            self._refused += result.kind == "rejected"
            if result.kind in STOPS or (self._refused >= HOPELESS and not self._answered):
                raise RuntimeError(
                    f"the judge at {self.base_url} cannot be asked ({result.kind}): {result.message}"
                )
            wait = wait_before(attempt + 1, result, random.random())
            last = attempt == self.retries or result.kind not in AGAIN or time.monotonic() + wait > end
            if last:
                self._lost.setdefault(result.kind, result.message)
                return None
            await asyncio.sleep(wait)
        return None

    def body(self, request: JudgeRequest, sample: int, attempt: int = 0) -> dict[str, Any]:
        """What is sent for one sample: a function of the request, the sample's and the attempt's number."""
        draw = self.sampling
        more = {
            "top_k": draw.top_k,
            "min_p": draw.min_p,
            "min_tokens": draw.min_new_tokens,
            "stop": list(draw.stop),
            "stop_token_ids": list(draw.stop_token_ids),
        }
        seed = hashlib.blake2b(repr((request.seed, sample, attempt)).encode(), digest_size=4).digest()
        whole = {
            "model": self.model,
            "messages": [{"role": "user", "content": unspelled(request.prompt, self.special_tokens)}],
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "max_tokens": draw.max_new_tokens,
            "seed": int.from_bytes(seed, "big") >> 1,
            **{name: value for name, value in more.items() if value},
            **self.extra,
        }
        return {name: value for name, value in whole.items() if value is not None}

    def digest(self, request: JudgeRequest, sample: int) -> str:
        """The cache's key: address and whole body, and so model, template, items, order and seed.

        It is that of the first attempt, whichever was answered: else a later run would ask again, and hear another
        answer, wherever the server had failed at first.
        """
        body = self.body(request, sample)
        text = json.dumps([self.base_url, body], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Address, model, sampling and further keys; how prompts end, where that is known."""
        return {
            "base_url": self.base_url,
            "model": self.model,
            "sampling": asdict(self.sampling),
            "extra": self.extra,
            **({} if self.prompt_end is None else {"prompt_end": self.prompt_end}),
        }

    def close(self) -> None:
        """Close the cache."""
        if self._cache is not None:
            self._cache.close()


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end, also where this thread has an event loop already, as a notebook's has."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as apart:
        apart.submit(asyncio.run, work).result()
