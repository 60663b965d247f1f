"""Teacher text from files: one or more answers per prompt, without those that should not be imitated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_onpolicy.datamodules.rows import Row, check_characters, finish_reasons
from lightning_onpolicy.datamodules.sources import FileSource

CUT, REFUSED = "length", "content_filter"  # finish reasons, as OpenAI-compatible servers say them
# Other lists with one entry per answer: as `onpolicy collect` writes them, and weights that somebody added.
PER_ANSWER = (
    *(
        "weights",
        "refused",
        "truncated",
        "empty",
        "reasoning",
        "reported_models",
        "usage",
        "times",
        "seconds",
    ),
    *("request_ids", "fingerprints"),
)
FLAGS = ("refused", "truncated")  # of these, a row may also have one for all its answers


class TeacherTextSource(FileSource):
    """Rows of a file that ``onpolicy collect`` (or somebody else) filled: a prompt and the teacher's answers.

    A row's answers are its ``responses`` (or its ``response``, or a last message by the assistant). What they ended
    with is in ``finish_reasons`` (or ``finish_reason``): ``length`` means cut by the token limit, ``content_filter``
    refused; ``truncated`` and ``refused``, lists of booleans or one for all answers, say the same. Rows come with
    ``response`` as a list, and with ``finish_reasons`` beside it. How many answers were left out, and why, is said once
    and kept in ``left_out``.

    Args:
        path: File ending in ``.jsonl``, ``.ndjson``, ``.json`` or ``.parquet``; ``onpolicy://…`` names a packaged one.
        truncated: What happens to answers cut by the token limit: ``exclude``, or ``keep``, for which they are trained
            on without an end of sequence, since they have none.
        refused: What happens to refusals: ``exclude`` or ``keep``.
        refusal_pattern: Regular expression; answers in which it is found count as refused too.
        prompt_key: Key of the prompt text; null ignores ``prompt``.
        messages_key: Key of the conversation; null ignores ``messages``.
        name: Source name of rows that do not say theirs; default: the file's stem.

    Raises:
        ValueError: As :class:`FileSource`; if a row has no answers at all, lists have different lengths, no answer is
            left, or one that is left holds half a character.
    """

    def __init__(
        self,
        path: str | Path,
        truncated: Literal["exclude", "keep"] = "exclude",
        refused: Literal["exclude", "keep"] = "exclude",
        refusal_pattern: str | None = None,
        prompt_key: str | None = "prompt",
        messages_key: str | None = "messages",
        name: str | None = None,
    ) -> None:
        super().__init__(path, prompt_key=prompt_key, messages_key=messages_key, name=name)
        for key, value in (("truncated", truncated), ("refused", refused)):
            if value not in ("exclude", "keep"):
                raise ValueError(f"{key} must be 'exclude' or 'keep', got {value!r}.")
        pattern = None if refusal_pattern is None else re.compile(refusal_pattern)
        wanted = {"truncated": truncated == "keep", "refused": refused == "keep", "empty": False}
        self.left_out: Counter[str] = Counter()
        rows: list[dict[str, Any]] = []
        places: list[str] = []
        for row, place in zip(self._rows, self._places, strict=True):
            columns = answers_of(row, place)
            reasons = [
                reason_to_leave_out(columns, k, wanted, pattern) for k in range(len(columns["response"]))
            ]
            self.left_out.update(reason for reason in reasons if reason)
            kept = [k for k, reason in enumerate(reasons) if not reason]
            key = "response" if row.get("responses") is None else "responses"
            for k in kept:
                check_characters(columns["response"][k], f"{place}: {key!r}[{k}]")
            if kept:
                places.append(place)
                rest = {key: value for key, value in row.items() if key not in ("responses", "finish_reason")}
                rows.append({**rest, **{name: [column[k] for k in kept] for name, column in columns.items()}})
        self.answers = sum(len(row["response"]) for row in rows)
        self.rows_left_out = len(self._rows) - len(rows)
        if self._rows and not rows:
            raise ValueError(f"{path}: no answer is left; left out were {dict(self.left_out)}.")
        self._rows, self._places = rows, places
        if self.left_out:
            self._say(path)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def _say(self, path: str | Path) -> None:
        from lightning.pytorch.utilities import rank_zero_info

        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        rank_zero_info(
            f"{path}: {self.answers} answers to {len(self)} prompts; left out: {reasons} answers "
            f"({self.rows_left_out} prompts have none left)."
        )


def answers_of(row: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """The row's columns with one entry per answer: ``response``, ``finish_reasons``, and what else there is.

    Raises:
        ValueError: If there is no answer, or a column is of another length.
    """
    texts = row.get("responses") if row.get("responses") is not None else row.get("response")
    if texts is None:
        known = sorted(key for key, value in row.items() if value is not None)
        raise ValueError(f"{where}: neither 'responses' nor 'response' is among {known}.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: its answers must be a string or a list of strings.")
    reasons = finish_reasons(row, len(texts))
    columns = {"response": texts, "finish_reasons": reasons}
    columns |= {key: [row[key]] * len(texts) for key in FLAGS if isinstance(row.get(key), bool)}
    columns |= {key: list(row[key]) for key in PER_ANSWER if isinstance(row.get(key), list | tuple)}
    for name, column in columns.items():
        if len(column) != len(texts):
            raise ValueError(f"{where}: {len(texts)} answers, but {name!r} has {len(column)} entries.")
    cut = columns.get("truncated", [False] * len(texts))
    columns["finish_reasons"] = [CUT if c else reason for c, reason in zip(cut, reasons, strict=True)]
    return columns


def reason_to_leave_out(
    columns: Mapping[str, list[Any]], k: int, wanted: Mapping[str, bool], pattern: re.Pattern[str] | None
) -> str | None:
    """Why answer ``k`` is not for training: ``empty``, ``refused``, ``truncated``; None = it is.

    Args:
        columns: The row's answers, from :func:`answers_of`.
        k: Number of the answer.
        wanted: Whether answers of each of these kinds are kept.
        pattern: What refusals are recognised by besides their flags.
    """
    text, finish = columns["response"][k] or "", columns["finish_reasons"][k]

    def flag(name: str) -> bool:
        return bool(columns[name][k]) if name in columns else False

    kinds = {
        "empty": not text.strip(),
        "refused": finish == REFUSED
        or flag("refused")
        or (pattern is not None and bool(pattern.search(text))),
        "truncated": finish == CUT,
    }
    return next((kind for kind, holds in kinds.items() if holds and not wanted[kind]), None)
