"""Prompts that ask for a length: the transformation that the L1 shapers need."""

from __future__ import annotations

import random
from typing import Any

from lightning_onpolicy.datamodules.rows import Row, Source


class TargetLengthSource(Source):
    """Another source's rows, each with a target length in tokens, written into the prompt and kept in the row.

    Row ``i`` always gets the same target, uniform over ``low`` … ``high``. The request is appended to the prompt, or to
    the last user message of a conversation. Source: L1 (arXiv 2503.04697), targets 100 to 4,000.

    Args:
        source: Where rows come from.
        low: Smallest target, in tokens.
        high: Largest target, in tokens.
        request: What is appended; ``{tokens}`` stands for the target.
        target_key: Key under which the row keeps it; the shapers' ``target_key``.
        seed: Chooses the targets.

    Raises:
        ValueError: If the range is empty or the request does not say ``{tokens}``; while reading, if a row has
            neither a prompt nor a user's message.

    Example:
        >>> source = TargetLengthSource([{"prompt": "1+1?"}], low=50, high=50)
        >>> source[0]
        {'prompt': '1+1?\\n\\nThink for 50 tokens.', 'target_tokens': 50}
    """

    def __init__(
        self,
        source: Source,
        low: int = 100,
        high: int = 4000,
        request: str = "\n\nThink for {tokens} tokens.",
        target_key: str = "target_tokens",
        seed: int = 0,
    ) -> None:
        if not 1 <= low <= high:
            raise ValueError(f"low and high must hold 1 <= low <= high, got {low} and {high}.")
        if "{tokens}" not in request:
            raise ValueError(f"request must say {{tokens}} where the target goes, got {request!r}.")
        self.source, self.low, self.high = source, low, high
        self.request, self.target_key, self.seed = request, target_key, seed
        self.name = str(getattr(source, "name", None) or type(source).__name__)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row:
        row: dict[str, Any] = dict(self.source[index])
        target = random.Random(f"{self.seed}/{index}").randint(self.low, self.high)
        request = self.request.replace("{tokens}", str(target))
        if row.get("prompt") is not None:
            row["prompt"] += request
        else:
            row["messages"] = _asked(row.get("messages") or (), request, f"row {index} of {self.name!r}")
        return {**row, self.target_key: target}


def _asked(messages: Any, request: str, where: str) -> list[dict[str, Any]]:
    out = [dict(message) for message in messages]
    for message in reversed(out):
        if message.get("role") == "user":
            message["content"] += request
            return out
    raise ValueError(f"{where} has neither a prompt nor a user's message to write the target length into.")
