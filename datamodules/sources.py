"""Where rows come from: local files, Hugging Face datasets, generated reasoning tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_onpolicy.datamodules.assets import SCHEME, resolve_asset
from lightning_onpolicy.datamodules.gym import GymSource as GymSource
from lightning_onpolicy.datamodules.rows import Row, RowKeys, canonical
from lightning_onpolicy.datamodules.rows import Source as Source


class FileSource(Source):
    """Rows of a local JSONL, JSON or Parquet file, read and checked at once.

    Args:
        path: File ending in ``.jsonl``, ``.ndjson``, ``.json`` (a list of objects) or ``.parquet``;
            ``onpolicy://…`` names a packaged one.
        prompt_key: Key of the prompt text; null ignores ``prompt``.
        messages_key: Key of the conversation; null ignores ``messages``.
        response_key: Key of the given response.
        answer_key: Key of the reference answer.
        name: Source name of rows that do not say theirs; default: the file's stem.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the ending is unknown, a row is malformed (the message has file and line), lacks a prompt (the
            message has the keys it does have) or holds half a character in what is encoded.
    """

    def __init__(
        self,
        path: str | Path,
        prompt_key: str | None = "prompt",
        messages_key: str | None = "messages",
        response_key: str | None = "response",
        answer_key: str | None = "answer",
        name: str | None = None,
    ) -> None:
        file = resolve_asset(path)
        keys = RowKeys(prompt_key, messages_key, response_key, answer_key)
        self.name = name or file.stem
        read = read_rows(file)
        self._rows = [canonical(row, keys, where) for where, row in read]
        self._places = [where for where, _ in read]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def place(self, index: int) -> str:
        """File and line of row ``index``."""
        return self._places[index]


def read_rows(file: Path) -> list[tuple[str, Any]]:
    """What a local file holds, with the place of each row for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the ending is unknown, or something in it is not UTF-8, not JSON or not Parquet.
    """
    if file.suffix not in _READERS:
        raise ValueError(f"{file}: cannot read {file.suffix!r} files; known endings are {sorted(_READERS)}.")
    try:
        return _READERS[file.suffix](file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error}): convert it, e.g. with iconv.") from error


def _read_jsonl(file: Path) -> list[tuple[str, Any]]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append((f"{file} line {number}", _parse(line, f"{file} line {number}")))
    return rows


def _read_json(file: Path) -> list[tuple[str, Any]]:
    rows = _parse(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected a list of objects, got {type(rows).__name__}.")
    return [(f"{file} row {i}", row) for i, row in enumerate(rows)]


def _read_parquet(file: Path) -> list[tuple[str, Any]]:
    import pyarrow  # comes with datasets
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file ({error}).") from error
    return [(f"{file} row {i}", row) for i, row in enumerate(rows)]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error


_READERS: dict[str, Callable[[Path], list[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


class DatasetSource(Source):
    """Rows of a Hugging Face dataset: from the hub, from ``save_to_disk``, or in memory.

    Args:
        path: Hub name, loader name (``json``, ``csv``, … with ``data_files``), folder written by
            ``save_to_disk``, or a ``datasets.Dataset``.
        split: Split to take, e.g. ``train`` or, from the hub, ``train[:1000]``.
        name: Configuration of the dataset, as in ``load_dataset``.
        data_files: Files for loaders.
        revision: Revision on the hub.
        prompt_key: Column of the prompt text; null ignores ``prompt``.
        messages_key: Column of the conversation; null ignores ``messages``.
        response_key: Column of the given response.
        answer_key: Column of the reference answer.
        source_name: Source name of rows that do not say theirs; default: from ``path``.

    Raises:
        ValueError: If the split does not exist, or a row lacks a prompt (raised when it is read).
    """

    def __init__(
        self,
        path: Any,
        split: str = "train",
        name: str | None = None,
        data_files: str | list[str] | None = None,
        revision: str | None = None,
        prompt_key: str | None = "prompt",
        messages_key: str | None = "messages",
        response_key: str | None = "response",
        answer_key: str | None = "answer",
        source_name: str | None = None,
    ) -> None:
        self._keys = RowKeys(prompt_key, messages_key, response_key, answer_key)
        if isinstance(path, str | Path):
            self.name = source_name or Path(str(path)).name
            self._data = _load(str(path), split, name, data_files, revision)
        else:
            self.name = source_name or "dataset"
            self._data = path
        if not hasattr(self._data, "__len__"):
            raise ValueError(
                f"dataset {self.name!r} has no length; streaming datasets cannot be shuffled or resumed."
            )

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Row:
        return canonical(self._data[index], self._keys, f"dataset {self.name!r} row {index}")


def _load(
    path: str, split: str, name: str | None, data_files: str | list[str] | None, revision: str | None
) -> Any:
    import datasets

    folder = resolve_asset(path) if path.startswith(SCHEME) else Path(path).expanduser()
    if not any((folder / marker).exists() for marker in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(path, name, split=split, data_files=data_files, revision=revision)
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{folder} has no split {split!r}; it has {sorted(saved)}.")
        return saved[split]
    if saved.split is not None and str(saved.split) != split:
        raise ValueError(
            f"{folder} holds the split {str(saved.split)!r} alone; set split to it, not {split!r}."
        )
    return saved
