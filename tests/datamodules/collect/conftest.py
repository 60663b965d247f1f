"""Collecting in this process: settings for a server, and what came of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_onpolicy.datamodules.collect import faults
from lightning_onpolicy.datamodules.collect.command import collect
from lightning_onpolicy.datamodules.collect.settings import CollectSettings


class Run:
    """``run(url, prompts, **settings)`` collects into ``folder/out.jsonl`` and then knows what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, ""

    def __call__(self, url: str, prompts: Sequence[str], **settings: Any) -> int:
        """The exit code."""
        pytest.importorskip("openai", reason="needs the extra lightning-onpolicy[collect]")
        out = io.StringIO()
        try:
            return collect(self.settings(url, prompts, **settings), out)
        finally:
            self.said = out.getvalue()

    def settings(self, url: str, prompts: Sequence[str], **settings: Any) -> CollectSettings:
        """The settings of such a run."""
        (self.folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt, "answer": i}) + "\n" for i, prompt in enumerate(prompts))
        )
        given = {"prompts": "prompts.jsonl", "out": "out.jsonl", "seed": 0, "max_tokens": 16, **settings}
        for name in ("prompts", "out", "cache"):
            if given.get(name):
                given[name] = str(self.folder / given[name])
        return CollectSettings(model="teacher", base_url=url, **given)

    def rows(self, name: str = "out.jsonl") -> list[dict[str, Any]]:
        """The lines of a file; none if it is not there."""
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def failed(self) -> list[dict[str, Any]]:
        """The rows that failed."""
        return self.rows("out.failed.jsonl")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A run in a folder of its own, with short waits and a key."""
    monkeypatch.setattr(faults, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(faults, "LONGEST_WAIT_S", 0.05)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789abcdef")
    return Run(tmp_path)
