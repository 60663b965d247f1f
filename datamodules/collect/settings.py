"""What ``onpolicy collect`` asks, of whom, and within what limits: the settings, checked before anything is sent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning_onpolicy.datamodules.rows import Source, check_characters

# Parts of the request that have a setting of their own, or would change what one request stands for.
OWN_KEYS = frozenset(
    "model messages temperature top_p max_tokens max_completion_tokens stop seed n stream".split()
)


@dataclass(frozen=True)
class CollectSettings:
    """Settings of ``onpolicy collect``.

    Args:
        prompts: JSONL, JSON or Parquet file of rows with ``prompt`` or ``messages``, or a source (``class_path`` …).
        out: JSONL file for the answers. ``OUT.failed.jsonl`` and ``OUT.cache.sqlite`` (without OUT's own ending) lie
            beside it.
        model: Name of the teacher, as the server knows it.
        base_url: Where an OpenAI-compatible API is served, e.g. ``http://127.0.0.1:8000/v1``.
        samples: Answers per prompt, each a request of its own.
        temperature: Sampling temperature; null leaves it to the server.
        top_p: Nucleus mass; null leaves it to the server.
        max_tokens: Longest answer, in tokens; also the worst case that a request is reckoned with.
        max_tokens_key: Under which name the server wants that limit (OpenAI's newer models: ``max_completion_tokens``).
        stop: Strings that end an answer.
        seed: Sample ``i`` is sent with ``seed + i``; null sends none.
        system: System message put before conversations that have none of their own.
        extra_body: More keys of the request body, e.g. ``{top_k: 20}`` where the server takes them.
        concurrency: Requests in flight at once.
        retries: How often a request is sent again after a passing failure (429, 5xx, timeout, cut or malformed
            answer); waits double from 0.5 to 60 s, or last as long as ``Retry-After`` says.
        timeout_s: Seconds that one request may take in all.
        price_in: Price of a million prompt tokens, in any currency.
        price_out: Price of a million answered tokens, in the same currency.
        max_cost: Most that may ever be spent with this cache; no request is sent that could exceed it.
        max_tokens_total: Most tokens, prompts and answers, that may ever be used with this cache.
        cache: SQLite file of all answers and of what was spent; default: beside ``out``. Several outputs may share
            one, one process at a time.
        api_key_env: Environment variable that holds the API key.
        dry_run: Say what would be asked and what it could cost, and send nothing.
        prompt_key: Key of the prompt text in the file; null ignores ``prompt``.
        messages_key: Key of the conversation in the file; null ignores ``messages``.

    Raises:
        ValueError: If a value is out of range or excludes another; the message names the key.
    """

    prompts: str | Source
    out: str
    model: str
    base_url: str
    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int = 1024
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    stop: list[str] | None = None
    seed: int | None = None
    system: str | None = None
    extra_body: dict[str, Any] | None = None
    concurrency: int = 8
    retries: int = 8
    timeout_s: float = 600.0
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
    max_tokens_total: int | None = None
    cache: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    dry_run: bool = False
    prompt_key: str | None = "prompt"
    messages_key: str | None = "messages"

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "concurrency"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        _require(self.retries >= 0, "retries", self.retries, ">= 0")
        _require(self.timeout_s > 0, "timeout_s", self.timeout_s, "> 0")
        for name in ("temperature", "price_in", "price_out", "max_cost", "max_tokens_total"):
            value = getattr(self, name)
            _require(value is None or value >= 0, name, value, ">= 0")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(bool(self.model.strip()), "model", self.model, "a name")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} at temperature 0 would pay {self.samples} times for the same answer: "
                "set samples to 1, or a temperature."
            )
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out belong together: give both, or neither.")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError(
                "max_cost needs price_in and price_out (per million tokens). Without prices, set max_tokens_total."
            )
        if Path(self.out).suffix != ".jsonl":
            raise ValueError(f"out must end in .jsonl, got {self.out!r}: rows are appended as they come.")
        taken = sorted(OWN_KEYS & set(self.extra_body or {}))
        if taken:
            raise ValueError(
                f"extra_body holds {taken}, which have settings of their own or are not supported."
            )
        for name in ("model", "system", "stop", "extra_body"):
            check_characters(getattr(self, name), name)
        check_base_url(self.base_url)
        check_variable(self.api_key_env)

    @property
    def out_path(self) -> Path:
        """Where rows go."""
        return Path(self.out).expanduser()

    @property
    def cache_path(self) -> Path:
        """Where answers are kept."""
        return Path(self.cache).expanduser() if self.cache else self.out_path.with_suffix(".cache.sqlite")

    @property
    def failed_path(self) -> Path:
        """Where rows are listed that could not be answered."""
        return self.out_path.with_suffix(".failed.jsonl")


def check_base_url(url: str) -> None:
    """Refuse what is no address, and addresses that carry a secret, which would be written to files.

    Raises:
        ValueError: The message says what is wrong, without the secret.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("base_url must be an address such as http://127.0.0.1:8000/v1.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            "base_url must be without user, password and query: it is written to files. Keys come from the environment "
            "(api_key_env)."
        )


def check_variable(name: str) -> None:
    """Refuse what cannot be the name of an environment variable, as a key given in its place.

    Raises:
        ValueError: The message does not repeat it.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            "api_key_env must be the name of an environment variable (letters, digits and underscores), and is "
            "something else, not shown here in case it is a key. Put the key into a variable, and name that."
        )


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
