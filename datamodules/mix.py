"""Several sources as one: a mix of domains, each row saying which one it is of."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from lightning_onpolicy.datamodules.rows import Row, Source

log = logging.getLogger(__name__)


class DomainMix(Source):
    """Rows of several sources, evenly mixed: any run of consecutive rows holds the domains nearly in proportion.

    Rows keep what they are, and get what they do not say themselves: ``domain``, the name of their part, by which
    evaluations group tasks and ``RoutedReward(key="domain")`` chooses verifiers; ``source``, the name of their part's
    source; and ``uid``, the name and their place in it.

    Without weights, every row of every part comes once: what an evaluation needs. With weights, a part's share of
    ``size`` rows is its weight's; its rows come in order, from the first again if the share is larger than the part. If
    it is smaller, the rest never comes, and a warning says what size would do.
    A ``StageSchedule`` may change the weights, as ``mix``.

    Args:
        parts: Domain → source.
        weights: Domain → weight, relative to the others; those not named have 1. Null: each part's number of rows.
        size: Number of rows; default: those of all parts together.

    Raises:
        ValueError: If there is no part, one is empty, size is less than 1, or a weight is unknown or not allowed.

    Example:
        >>> mix = DomainMix({"maths": [{"prompt": "1+1="}], "words": [{"prompt": "a"}, {"prompt": "b"}]})
        >>> [(row["domain"], row["prompt"]) for row in map(mix.__getitem__, range(3))]
        [('words', 'a'), ('maths', '1+1='), ('words', 'b')]
    """

    def __init__(
        self, parts: dict[str, Source], weights: dict[str, float] | None = None, size: int | None = None
    ) -> None:
        if not parts or not all(len(part) for part in parts.values()):
            raise ValueError(
                "parts must name at least one source, and each must have rows; they have "
                f"{ {name: len(part) for name, part in parts.items()} }."
            )
        rows = {name: len(part) for name, part in parts.items()}
        if size is not None and size < 1:
            raise ValueError(f"size must be >= 1, got {size}.")
        self.parts = dict(parts)
        self.size = sum(rows.values()) if size is None else size
        self.name = "+".join(parts)
        self.weights: dict[str, float] = dict.fromkeys(parts, 1.0)
        self.reweigh({name: float(count) for name, count in rows.items()} if weights is None else weights)

    def check_mix(self, weights: Mapping[str, float]) -> None:
        """Refuse weights of unknown parts, negative ones, and those that leave nothing.

        Raises:
            ValueError: The message names the part.
        """
        for name, weight in weights.items():
            if name not in self.parts:
                raise ValueError(f"mix names the domain {name!r}; the source has {sorted(self.parts)}.")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"mix.{name} must be a number >= 0, got {weight!r}.")
        if not any({**self.weights, **weights}.values()):
            raise ValueError("mix leaves no domain: give one a positive weight.")

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """New weights for these domains, 0 to leave one out; rows read from now on are mixed by them."""
        self.check_mix(weights)
        self.weights = {**self.weights, **weights}
        places = [
            ((number + 0.5) / count, name, number)
            for name, count in shares(self.weights, self.size).items()
            for number in range(count)
        ]
        self._places = [(name, number) for _, name, number in sorted(places)]
        self._say_what_is_left_out()

    def _say_what_is_left_out(self) -> None:
        counts = shares(self.weights, self.size)
        cut = {name: count for name, count in counts.items() if 0 < count < len(self.parts[name])}
        if cut:
            whole = max(math.ceil(self.size * len(self.parts[name]) / count) for name, count in cut.items())
            log.warning(
                "the mix of %d rows has %s: the other rows never come. With size=%d all do.",
                self.size,
                ", ".join(
                    f"{count} of {len(self.parts[name])} rows of {name!r}" for name, count in cut.items()
                ),
                whole,
            )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} is outside a source of {self.size} rows.")
        domain, number = self._places[index]
        part = self.parts[domain]
        number %= len(part)
        row: dict[str, Any] = dict(part[number])
        name = str(getattr(part, "name", None) or domain)
        for key, value in (("domain", domain), ("source", name), ("uid", f"{domain}/{number}")):
            if row.get(key) is None:
                row[key] = value
        return row


def shares(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """``total`` split in proportion to the weights, by largest remainder.

    Example:
        >>> shares({"a": 1, "b": 1, "c": 2}, 7)
        {'a': 2, 'b': 2, 'c': 3}
    """
    whole = sum(weights.values())
    exact = {name: total * weight / whole for name, weight in weights.items()}
    out = {name: int(x) for name, x in exact.items()}
    for name in sorted(out, key=lambda n: out[n] - exact[n])[: total - sum(out.values())]:
        out[name] += 1
    return out
