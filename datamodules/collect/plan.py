"""From rows to requests: what is sent for a prompt, and the key under which its answer is known for ever.

A key is the SHA-256 of the whole request (address, body, number of the sample) in a canonical JSON form. Whatever
changes the answer changes the key; nothing else does, so that neither a new version of this program nor another order
of the rows asks for an answer twice. Rows with equal prompts are one :class:`Unit` and share their answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_onpolicy.datamodules.collect.settings import CollectSettings
from lightning_onpolicy.datamodules.rows import PLAIN, Row, Source, canonical

# Keys of an output row that are written here; a prompt's row must not hold them already.
WRITTEN = frozenset(
    "responses finish_reasons refused truncated empty reasoning model reported_models sampling base_url usage times "
    "seconds request_ids fingerprints request reference_response".split()
)


@dataclass(frozen=True, eq=False)
class Unit:
    """One prompt and the requests made for it.

    Args:
        rows: Numbers of the rows that have this prompt.
        messages: The conversation that is sent.
        keys: One key per sample.
    """

    rows: tuple[int, ...]
    messages: tuple[Mapping[str, Any], ...]
    keys: tuple[str, ...]

    @property
    def digest(self) -> str:
        """What a finished row is recognised by: it stands for all requests behind it."""
        return hashlib.sha256("".join(self.keys).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """All that is to be asked.

    Args:
        rows: What every output row takes from its prompt's row: ``uid``, ``source``, ``messages`` and its other keys.
        units: The prompts, each once, in the order of the rows.
    """

    rows: tuple[Mapping[str, Any], ...]
    units: tuple[Unit, ...]


def plan(source: Source, settings: CollectSettings) -> Plan:
    """Every row's requests.

    Raises:
        ValueError: If there is no row, a row has no prompt or one that cannot be sent, two rows have the same uid, or
            a row holds a key that is written here.
    """
    name = str(getattr(source, "name", None) or type(source).__name__)
    if len(source) == 0:
        raise ValueError(f"source {name!r} has no rows.")
    rows: list[Mapping[str, Any]] = []
    found: dict[str, tuple[list[int], list[dict[str, Any]]]] = {}
    seen: set[str] = set()
    for i in range(len(source)):
        row = output_row(source[i], i, name, settings.system)
        if row["uid"] in seen:
            raise ValueError(f"two rows of {name!r} have the uid {row['uid']!r}; rows are recognised by it.")
        seen.add(row["uid"])
        rows.append(row)
        found.setdefault(canonical_json(row["messages"]), ([], row["messages"]))[0].append(i)
    units = [
        Unit(
            tuple(numbers),
            tuple(messages),
            tuple(
                request_key(settings.base_url, body(settings, messages, k), k)
                for k in range(settings.samples)
            ),
        )
        for numbers, messages in found.values()
    ]
    return Plan(tuple(rows), tuple(units))


def output_row(raw: Row, index: int, name: str, system: str | None) -> dict[str, Any]:
    """What an output row takes from row ``index`` of the source called ``name``."""
    own = raw.get("uid") if isinstance(raw, Mapping) else None  # tables keep absent values as None
    uid = f"{name}/{index}" if own is None else str(own)
    row = canonical(raw, PLAIN, f"row {uid!r}")
    taken = sorted(key for key in WRITTEN & set(row) if row[key] is not None)
    if taken:
        raise ValueError(f"row {uid!r} has {taken}, which are written here; remove them from the prompts.")
    prompt, messages = row.pop("prompt", None), row.pop("messages", None)
    if messages is None:
        messages = [{"role": "user", "content": prompt}]
    if not messages or not messages[-1]["content"] or not str(messages[-1]["content"]).strip():
        raise ValueError(f"row {uid!r}: the prompt is empty.")
    _require_json(messages, f"row {uid!r}: its messages")
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    response, source = row.pop("response", None), row.pop("source", None)
    out = {key: value for key, value in row.items() if key not in WRITTEN}
    if response is not None:  # the data's own answer, under a name that nobody takes for the teacher's
        out["reference_response"] = response
    return {**out, "uid": uid, "source": name if source is None else str(source), "messages": messages}


def _require_json(value: Any, what: str) -> None:
    """Refuse what no client can send (bytes from a table, NaN), before anything is sent."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be sent as JSON: {error}.") from None


def sampling(settings: CollectSettings) -> dict[str, Any]:
    """The parameters of the request besides model, messages and seed, as they are sent."""
    given = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        settings.max_tokens_key: settings.max_tokens,
        "stop": settings.stop,
    }
    return {key: value for key, value in given.items() if value is not None} | (settings.extra_body or {})


def body(settings: CollectSettings, messages: Sequence[Mapping[str, Any]], sample: int) -> dict[str, Any]:
    """The body of the request for one sample."""
    seed = {} if settings.seed is None else {"seed": settings.seed + sample}
    return {"model": settings.model, "messages": list(messages), **sampling(settings), **seed}


def request_key(base_url: str, body: Mapping[str, Any], sample: int) -> str:
    """SHA-256 of the whole request.

    Example:
        >>> request_key("http://a/v1", {"model": "m", "seed": 1}, 0) == request_key(
        ...     "http://a/v1/", {"seed": 1, "model": "m"}, 0)
        True
    """
    request = {"base_url": base_url.rstrip("/"), "body": body, "sample": sample}
    return hashlib.sha256(canonical_json(request).encode("utf-8", "backslashreplace")).hexdigest()


def canonical_json(value: Any) -> str:
    """One text per value: keys sorted, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str
    )
