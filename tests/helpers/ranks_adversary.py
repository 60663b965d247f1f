"""Games with planted leaks; as a script, AdversaryMonitor on two ranks: ``torchrun … ranks_adversary.py OUT``."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fits
import torch
from leaving import leave
from lightning.pytorch.strategies import DDPStrategy

from lightning_onpolicy.callbacks import AdversaryMonitor, GameRules
from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.judged import rows_of_items

EOS, PAIR = 1, 2


class CharTokenizer:
    """A character is its code point, but "ab" is one token; nothing is lost on the way back."""

    eos_token_id = EOS
    all_special_ids = (EOS,)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [PAIR if c == "\0" else ord(c) for c in text.replace("ab", "\0")]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return "".join("ab" if i == PAIR else chr(i) for i in ids if i != EOS)


def answers(leak: str | None, number: int, prompts: int = 10, size: int = 2) -> RolloutBatch:
    """Judged rows: random letters on both sides, and on the student's side one artefact.

    Args:
        leak: ``length`` (longer), ``end`` (cut, never ended), ``white`` (a space after), ``tokens`` ("ab" in two ids).
        number: Of the batch: other prompts and other letters.
        prompts: Prompts.
        size: The student's answers to each; the teacher has one.
    """
    rng, tokenizer = random.Random(number), CharTokenizer()
    items = []
    for p in range(prompts):
        item: dict[str, Any] = {"prompt": [number, p], "responses": [], "ended": [], "preferred": []}
        for preferred in (True, *[False] * size):
            planted = None if preferred else leak
            text = "".join(rng.choices("abcdefgh", k=rng.randint(8, 40))) + "ab"
            text += "c" * 40 if planted == "length" else " " if planted == "white" else ""
            ids = [ord(c) for c in text] if planted == "tokens" else tokenizer.encode(text)
            item["responses"].append(ids if planted == "end" else [*ids, EOS])
            item["ended"].append(planted != "end")
            item["preferred"].append(preferred)
        items.append(item)
    return rows_of_items(items, pad_id=0)


class Game(fits.Module):
    """Reports given metrics and returns rows with a leak.

    Args:
        values: Metric → its value, or one per step.
        leak: As for :func:`answers`.
        prompts: Per step.
        first: Number of the first batch.
    """

    def __init__(
        self, values: Mapping[str, Any], leak: str | None = None, prompts: int = 10, first: int = 0
    ) -> None:
        super().__init__()
        self.values, self.leak, self.prompts, self.first = values, leak, prompts, first
        self.discriminator = SimpleNamespace(tokenizer=CharTokenizer())

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        out = super().training_step(batch, batch_idx)
        out["metrics"] = {k: v[batch_idx] if isinstance(v, list) else v for k, v in self.values.items()}
        out["judged"] = answers(self.leak, self.first + batch_idx, self.prompts)
        return out


def play(action: Any, rank: int, folder: Path) -> dict[str, Any]:
    """One run of two ranks; rank 1's discriminator is blind, and its student's answers alone end in a space."""
    accuracy = 0.1 if rank else 0.8
    monitor = AdversaryMonitor(
        GameRules(probe=None), window=4, probe_every=2, probe_prompts=30, action=action
    )
    game = Game({"train/fresh/accuracy": accuracy}, "white" if rank else None, first=100 * rank)
    run = fits.trainer(
        folder,
        [monitor],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        logger=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(game, fits.Batches(6))
    said = [str(w.message) for w in caught if "AdversaryMonitor: at step" in str(w.message)]
    white = float(run.callback_metrics["adversary/probe/white"])
    state = monitor.state_dict()
    return {"steps": run.global_step, "said": said, "white": white, "state": state}


if __name__ == "__main__":
    rank_ = int(os.environ["RANK"])
    out = Path(sys.argv[1])
    torch.save({a: play(a, rank_, out.parent) for a in ("warn", "stop")}, f"{out}.{rank_}")
    leave()
