"""Observations as tokens, and tokens as observations: where a response's own tokens end and a tool's begin.

Legend: ``L`` tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lightning_onpolicy.datamodules.batch import Group, RolloutBatch
from lightning_onpolicy.datamodules.tools.base import Observation, Segment


def encode_observation(tokenizer: Any, observation: Observation) -> list[int]:
    """Its token ids: only the environment's own marks may be special tokens, never what a tool repeats."""
    parts = ((observation.before, False), (observation.text, True), (observation.after, False))
    return [
        i
        for text, plain in parts
        if text
        for i in tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
    ]


def segments_of(
    ids: Sequence[int], written: Sequence[bool], tokenizer: Any, *, special: bool = False
) -> list[Segment]:
    """A response cut where the author changes.

    Args:
        ids: ``[L]`` its tokens.
        written: ``[L]`` whether the policy wrote them.
        tokenizer: Decodes them.
        special: Show special tokens.
    """
    runs = groupby(zip(ids, written, strict=True), key=lambda pair: bool(pair[1]))
    return [
        Segment(
            "assistant" if own else "tool",
            tokenizer.decode([i for i, _ in run], skip_special_tokens=not special),
        )
        for own, run in runs
    ]


def response_of(batch: RolloutBatch, row: int) -> tuple[list[int], list[bool]]:
    """A row's response, observations included: ids, and whether the policy wrote them."""
    start, end = int(batch.prompt_lengths[row]), int(batch.lengths[row])
    return batch.input_ids[row, start:end].tolist(), batch.response_mask[row, start:end].tolist()


def observed_counts(groups: Sequence[Group]) -> dict[str, float]:
    """Observations per response, and their tokens: means over the groups' completions."""
    masks = [c.written for group in groups for c in group.completions]
    runs = [0 if m is None else sum(not own for own, _ in groupby(m.tolist())) for m in masks]
    tokens = [0 if m is None else int((~m).sum()) for m in masks]
    count = max(1, len(masks))
    return {"tools/observations": sum(runs) / count, "tools/observed_tokens": sum(tokens) / count}
