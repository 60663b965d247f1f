"""Sources of prompts: rows by index, the same row for the same index, always.

A source is anything with ``__len__`` and ``__getitem__(int) -> Mapping``. Resuming needs only integers then.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_onpolicy.datamodules.assets import resolve_asset

Row = Mapping[str, Any]


@runtime_checkable
class Source(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class FileSource(Source):
    """A JSON-lines, JSON or Parquet file.

    Args:
        path: The file; ``onpolicy://`` paths ship with the library. The ending tells the format.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is empty, of another format, or a row is malformed (file and line are named).
    """

    def __init__(self, path: str) -> None:
        self.path = resolve_asset(path)
        readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
        if self.path.suffix not in readers:
            raise ValueError(f"{path}: unknown format {self.path.suffix!r}; there are {sorted(readers)}.")
        self.rows: Sequence[Row] = readers[self.path.suffix](self.path)
        if not self.rows:
            raise ValueError(f"{path} holds no rows.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class DatasetSource(Source):
    """A Hugging Face dataset, by hub name or from a folder written by ``save_to_disk``.

    Args:
        path: Hub name, or folder.
        split: Split.
        name: Configuration of the dataset.
        revision: Hub revision.
    """

    def __init__(self, path: str, split: str = "train", name: str | None = None, revision: str | None = None) -> None:
        import datasets

        if Path(path).is_dir() and any(Path(path).glob("**/state.json")):
            loaded = datasets.load_from_disk(path)
            self.data = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            self.data = datasets.load_dataset(path, name, split=split, revision=revision)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        row: Row = self.data[index]
        return row


def split_of(prompt: str) -> Literal["train", "heldout"]:
    """Which split a generated prompt belongs to: a tenth, by a stable hash of its text, is held out.

    Example:
        >>> split_of("rev cat") == split_of("rev cat")
        True
    """
    return "heldout" if zlib.crc32(prompt.encode()) % 10 == 0 else "train"


class GymSource(Source):
    """Procedurally generated reasoning-gym tasks, rendered as compact prompts.

    Row ``i`` is made from ``(seed, i)`` alone: a task is drawn by weight, then items of that task are generated
    until one falls into the split.

    Args:
        tasks: Task name → ``{weight, config, prompt}``, or a YAML file with that mapping. ``config`` are the
            generator's keyword arguments, ``prompt`` a Jinja template over the entry (``question``, ``metadata``);
            default: the question itself.
        size: Number of rows.
        seed: Of the generation.
        split: ``train``, ``heldout`` (by :func:`split_of`) or ``all``.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If a task or a key is unknown.
    """

    def __init__(
        self,
        tasks: str | dict[str, dict[str, Any]],
        size: int,
        seed: int = 0,
        split: Literal["train", "heldout", "all"] = "train",
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}.")
        self.tasks = _read_tasks(tasks)
        self.size, self.seed, self.split = size, seed, split
        self._names = list(self.tasks)
        total = sum(float(t.get("weight", 1.0)) for t in self.tasks.values())
        shares = [float(t.get("weight", 1.0)) / total for t in self.tasks.values()]
        self._bounds = [sum(shares[: i + 1]) for i in range(len(shares))]
        jinja = ImmutableSandboxedEnvironment()
        self._templates = {n: jinja.from_string(t.get("prompt", "{{ question }}")) for n, t in self.tasks.items()}
        self._generate = functools.lru_cache(maxsize=None)(self._dataset)
        self._row = functools.lru_cache(maxsize=65536)(self._make)
        for name in self._names:
            self._generate(name)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self._row(index)

    def _dataset(self, name: str) -> Any:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ImportError("reasoning-gym is missing: pip install 'lightning-onpolicy[gym]'.") from error
        try:
            return reasoning_gym.create_dataset(name, size=2**31 - 1, seed=self.seed, **self.tasks[name].get("config", {}))
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"tasks.{name}: reasoning-gym refuses it: {error}") from error

    def _make(self, index: int) -> Row:
        share = zlib.crc32(f"task {self.seed} {index}".encode()) / 2**32
        name = next(n for n, bound in zip(self._names, self._bounds, strict=True) if share < bound or bound >= 1 - 1e-9)
        data = self._generate(name)
        for attempt in range(1000):
            number = zlib.crc32(f"item {index} {attempt}".encode()) % (2**31 - 1)
            entry = data[number]
            prompt = self._templates[name].render(**entry)
            if self.split in ("all", split_of(prompt)):
                return {
                    "prompt": prompt,
                    "question": entry["question"],
                    "answer": entry["answer"],
                    "metadata": json.loads(json.dumps(entry["metadata"], default=str)),
                    "source": name,
                    "uid": f"{name}/{self.seed}/{number}",
                }
        raise ValueError(f"tasks.{name}: no item of split {self.split!r} in 1000 draws: its prompts hardly vary.")


def _read_tasks(tasks: str | dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if isinstance(tasks, str):
        where = tasks
        tasks = yaml.safe_load(resolve_asset(tasks).read_text())
    else:
        where = "tasks"
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(f"{where} must map task names to settings.")
    for name, settings in tasks.items():
        unknown = sorted(set(settings) - {"weight", "config", "prompt"})
        if unknown:
            raise ValueError(f"{where}: task {name!r} has unknown keys {unknown}; there are weight, config, prompt.")
    return tasks


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a row must be an object, got {type(row).__name__}.")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}).") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise ValueError(f"{path} must hold a list of objects.")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]}).") from None
    return rows
