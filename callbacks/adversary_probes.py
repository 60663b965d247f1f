"""Could the answers that a discriminator has just read be told apart without reading? Kept answers, probed together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.judged import judged_items
from lightning_onpolicy.modules.artefacts import (
    Answer,
    Features,
    end_features,
    length_features,
    probe,
    token_features,
    white_features,
)
from lightning_onpolicy.modules.statistics import Interval

FOLDS = 5
Sides = tuple[dict[str, list[Answer]], dict[str, list[Answer]]]


def kept(rows: RolloutBatch) -> list[dict[str, Any]]:
    """As ``judged_items``, one per group, with ids as int32 tensors: a long answer is small in memory and files."""
    return [
        {**item, "responses": [torch.tensor(ids, dtype=torch.int32) for ids in item["responses"]]}
        for item in judged_items(rows.to(torch.device("cpu")))
    ]


def sides(items: Iterable[Mapping[str, Any]], tokenizer: Any) -> Sides:
    """The teacher's and the student's answers by prompt, of prompts that have both.

    A prompt that came twice is one prompt; the teacher's answer to it, read again, is one answer.

    Args:
        items: From :func:`kept`.
        tokenizer: The discriminator's.
    """
    teacher: dict[str, dict[Answer, None]] = {}
    student: dict[str, list[Answer]] = {}
    for item in items:
        uid = " ".join(map(str, item["prompt"]))
        for ids_T, ended, preferred in zip(item["responses"], item["ended"], item["preferred"], strict=True):
            ids = tuple(ids_T.tolist())
            answer = Answer(tokenizer.decode(ids, skip_special_tokens=True), ids, ended)
            if preferred:
                teacher.setdefault(uid, {})[answer] = None
            else:
                student.setdefault(uid, []).append(answer)
    both = [uid for uid in teacher if uid in student]
    return {uid: list(teacher[uid]) for uid in both}, {uid: student[uid] for uid in both}


def probes(both: Sides, tokenizer: Any) -> dict[str, Interval]:
    """Held-out accuracy of a probe per artefact: ``length``, ``end``, ``white``, ``tokens``.

    Args:
        both: From :func:`sides`, of :data:`FOLDS` prompts or more.
        tokenizer: The discriminator's.
    """

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    kinds: dict[str, Features] = {
        "length": length_features,
        "end": end_features([int(tokenizer.eos_token_id)]),
        "white": white_features,
        "tokens": token_features(encode, list(tokenizer.all_special_ids)),
    }
    return {name: probe(*both, features, folds=FOLDS) for name, features in kinds.items()}
