"""What a judge is asked: one query with all its responses, which are read together.

Legend: ``n`` responses of an item. Labels are known for training and evaluation only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class JudgeItem:
    """A query and its responses.

    Args:
        messages: The conversation up to the responses, as ``{"role", "content"}``.
        responses: What is judged, n of them, in the item's own order.
        labels: Ground truth per response (more is better), or None. With n >= 2 the largest must be unique; with n = 1
            it is 0 or 1.
        uid: Stable name, unique within its source.
        source: Name of the source or subset.
        reference: A reference answer that the judge may see, or None.
        row: The row it came from.

    Raises:
        ValueError: If there is no response or the labels make no sense; the message names the item.
    """

    messages: tuple[Mapping[str, str], ...]
    responses: tuple[str, ...]
    labels: tuple[float, ...] | None = None
    uid: str = ""
    source: str = ""
    reference: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.responses:
            raise ValueError(f"item {self.uid!r} has no response to judge.")
        if self.labels is not None:
            check_labels(self.labels, len(self.responses), f"item {self.uid!r}")

    @property
    def best(self) -> int:
        """Index of the best response by label.

        Raises:
            ValueError: If there are no labels, or only one response.
        """
        if self.labels is None or len(self.labels) < 2:
            raise ValueError(f"item {self.uid!r} has no best response: it has {self.labels} as labels.")
        return max(range(len(self.labels)), key=self.labels.__getitem__)


def check_labels(labels: Sequence[float], n: int, what: str) -> None:
    """Refuse labels that no score could be right or wrong about.

    Raises:
        ValueError: If they are not n, if their maximum is not unique (n >= 2), or not 0 or 1 (n = 1).
    """
    if len(labels) != n:
        raise ValueError(f"{what}: {len(labels)} labels for {n} responses.")
    if n == 1 and labels[0] not in (0, 1):
        raise ValueError(f"{what}: the label of a single response must be 0 or 1, got {labels[0]!r}.")
    if n > 1 and sorted(labels)[-1] == sorted(labels)[-2]:
        raise ValueError(
            f"{what}: the largest label is not unique in {list(labels)}, so no response is the best."
        )
