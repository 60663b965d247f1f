"""Rollouts as rows, and files that survive a killed run and a resumed one.

A file is ordered by a key of its rows: the batch's number in training, the optimizer step in evaluation. It
can be rewound to a key: what a killed run wrote beyond its last checkpoint (a half-written line included) is
cut off, because the resumed run will write it again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.tools.tokens import response_of, segments_of

Format = Literal["jsonl", "parquet"]


class RolloutFile(Protocol):
    """Where one rank's rows of one stage go."""

    path: Path

    def rewind(self, last: int) -> None:
        """Forget all rows whose key is greater than ``last``."""

    def write(self, key: int, part: int, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows with the same key; ``part`` tells calls with the same key apart."""


class JsonlFile:
    """One line per row, appended and flushed per call.

    Args:
        path: The file.
        key: Name of the rows' key.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def rewind(self, last: int) -> None:
        """Cut the file behind the last whole line with a key up to ``last``."""
        if not self.path.exists():
            return
        keep = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)[self.key] > last:
                    break
                keep += len(line)
        os.truncate(self.path, keep)

    def write(self, key: int, part: int, rows: Sequence[dict[str, Any]]) -> None:
        """Append the rows."""
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n" for row in rows]
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(lines))


class ParquetFile:
    """A folder with a file per call, which parquet readers open as one table.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, last: int) -> None:
        """Delete the files whose key is greater than ``last``."""
        for file in self.path.glob("*.parquet"):
            if int(file.stem.partition("-")[0]) > last:
                file.unlink()

    def write(self, key: int, part: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows' file, whole or not at all."""
        import pyarrow as pa  # a requirement of datasets
        from pyarrow import parquet

        self.path.mkdir(exist_ok=True)
        target = self.path / f"{key:08d}-{part:04d}.parquet"
        unfinished = target.with_suffix(".unfinished")
        parquet.write_table(pa.Table.from_pylist([_flat(row) for row in rows]), unfinished)
        os.replace(unfinished, target)


def open_file(folder: Path, stage: str, rank: int, format: Format) -> RolloutFile:
    """The file of a stage and rank; its folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}.rank{rank}.{format}"
    return (
        JsonlFile(path, "batch" if stage == "train" else "step") if format == "jsonl" else ParquetFile(path)
    )


def move_aside(path: Path) -> Path | None:
    """Rename what an earlier run left at ``path``, so that nothing of it is lost.

    Returns:
        The new name; None if there was nothing.
    """
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.previous{number}{path.suffix}")).exists():
        number += 1
    return path.rename(aside)


def rows_of(batch: RolloutBatch, *, tokens: bool = False, tokenizer: Any = None) -> list[dict[str, Any]]:
    """One plain row per response; NaN becomes None.

    Args:
        batch: The rollouts, on any device.
        tokens: Add ``response_ids`` and ``logprobs``, one value per token of the response, and ``response_mask``
            where a tool wrote some of them.
        tokenizer: Splits responses in which a tool spoke into ``turns``; None leaves them out.
    """
    batch = batch.to("cpu")
    counted = batch.extra.get("counted")
    starts = batch.prompt_lengths.tolist()
    rows: list[dict[str, Any]] = []
    for i in range(len(batch)):
        ids, written = response_of(batch, i)
        row: dict[str, Any] = {"group": int(batch.group[i])}
        if batch.prompts:
            prompt = batch.prompts[i]
            row |= {"uid": prompt.uid, "source": prompt.source, "prompt": prompt.text}
            if "answer" in prompt.row:
                row["answer"] = prompt.row["answer"]
        row |= {
            "response": batch.texts[i] if batch.texts else None,
            "reward": _null(float(batch.rewards[i])),
            "parts": {name: _null(float(part[i])) for name, part in batch.reward_parts.items()},
            "finished": bool(batch.finished[i]),
            "prompt_tokens": starts[i],
            "response_tokens": sum(written),
            "on_policy": bool(batch.on_policy[i]),
            "policy_version": int(batch.policy_version[i]),
        }
        if counted is not None:
            row["counted"] = bool(counted[i])
        if not all(written) and tokenizer is not None:
            parts = segments_of(ids, written, tokenizer)
            row["turns"] = [{"role": part.role, "content": part.text} for part in parts]
        if tokens:
            row["response_ids"] = ids
            drawn = batch.sampler_logprobs[i, starts[i] : starts[i] + len(ids)].tolist()
            row["logprobs"] = [_null(x) for x in drawn]
            if not all(written):
                row["response_mask"] = written
        rows.append(row)
    return rows


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a column per reward part, answers and turns as text: a column has one type and is never empty."""
    flat = {key: value for key, value in row.items() if key != "parts"}
    flat["turns"] = json.dumps(flat.get("turns", []), ensure_ascii=False)
    if "answer" in flat and not isinstance(flat["answer"], str):
        flat["answer"] = json.dumps(flat["answer"], ensure_ascii=False, default=str)
    flat |= {f"part_{name}": value for name, value in row["parts"].items()}
    return {key: _encodable(value) if isinstance(value, str) else value for key, value in flat.items()}


def _encodable(text: str) -> str:
    """Lone surrogates, which UTF-8 does not have, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
