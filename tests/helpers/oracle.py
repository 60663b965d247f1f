"""Engines for `quickstart/domains` that know the right answers, named in configurations as ``oracle.NAME``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_onpolicy.datamodules.assets import resolve_asset
from lightning_onpolicy.datamodules.batch import Completion, Sampling
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.sources import FileSource, GymSource

WRONG = "No,"  # in no domain right: no number, no letter, one word with a comma and mixed case
WRONG_PROGRAM = "```py\nf = print\nprint(1000)\n```"  # runs, prints, returns, and passes no test


def answers() -> dict[str, str]:
    """Prompt → right answer, of all items of the evaluation."""
    sources: list[Any] = [
        FileSource(resolve_asset(f"onpolicy://quickstart/domains/{domain}.val.jsonl"))
        for domain in ("math", "code", "stem", "instructions")
    ]
    logic = GymSource("onpolicy://quickstart/tasks.yaml", size=24, seed=2, split="heldout")
    found = {
        row["prompt"]: row["response"]
        for source in sources
        for row in map(source.__getitem__, range(len(source)))
    }
    return found | {row["prompt"]: row["answer"] for row in map(logic.__getitem__, range(len(logic)))}


class Half(RolloutEngine):
    """Right in the first of every two samples."""

    every = 2

    def __init__(self, policy: Any) -> None:
        self.tokenizer, self.answers = policy.tokenizer, answers()

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int
    ) -> list[list[Completion]]:
        out = []
        for ids in prompts:
            asked = self.tokenizer.decode(list(ids)).split("<|user|>")[1].split("<|end|>")[0]
            wrong = WRONG_PROGRAM if asked.startswith("Python") else WRONG
            texts = [self.answers[asked] if i % self.every == 0 else wrong for i in range(n)]
            out.append([self._completion(text) for text in texts])
        return out

    def _completion(self, text: str) -> Completion:
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        return Completion(torch.tensor(ids), torch.zeros(len(ids)), "eos")

    def sync(self, policy: Any, version: int) -> None:
        """Nothing to sync."""

    def close(self) -> None:
        """Nothing to close."""


class Right(Half):
    """Always right."""

    every = 1
