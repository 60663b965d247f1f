"""One evaluation with a report, alone or on two ranks: ``torchrun --nproc-per-node 2 ranks_report.py OUT BASELINE``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fits
import torch
from leaving import leave
from lightning.pytorch.strategies import DDPStrategy

from lightning_onpolicy.callbacks.evaluation_report import EvaluationReport
from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, collate

TASKS = (("math", "sums"), ("math", "roots"), (None, "code"))
SCORES: list[list[float | None]] = [[1.0, 0.0], [0.0, 0.5], [None, 0.5]]


def evaluation(number: int = 0) -> RolloutBatch:
    """Two samples of one item of each of three tasks, in two domains; texts hold what breaks careless writers."""
    groups = []
    for domain, task in TASKS:
        row = {"prompt": f"{task} {number}"} | ({} if domain is None else {"domain": domain})
        texts = ("line\nbreak [/red] \x1b[31m", "lone \udc80 surrogate ✓")
        completions = tuple(
            Completion(torch.tensor([3, 4 + i, 22]), torch.zeros(3), finish, number, texts[i])
            for i, finish in enumerate(("eos", "length"))
        )
        groups.append(Group(Prompt((0, 1), f"<{task}>", row, f"p{number}", task), completions))
    batch = collate(groups, pad_id=20, rewards=SCORES)
    return batch.with_extra(seed=torch.full((len(batch),), 7))


class Share:
    """This rank's batches of three: the second rank has one, and repeats another to keep in step."""

    def __init__(self, rank: int, world: int) -> None:
        self.numbers = [0, 1, 2] if world == 1 else [0, 2] if rank == 0 else [1, 0]
        self.repeat = world > 1 and rank == 1

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[RolloutBatch]:
        for i, number in enumerate(self.numbers):
            batch = evaluation(number)
            yield batch.with_extra(counted=torch.full((len(batch),), not (self.repeat and i == 1)))


def run(folder: Path, compare_to: Path | None = None, world: int = 1, rank: int = 0) -> None:
    """Evaluate and write."""
    callback = EvaluationReport(str(folder), None if compare_to is None else str(compare_to))
    options: dict[str, Any] = {"logger": False, "use_distributed_sampler": False}
    if world > 1:
        options |= {"devices": world, "strategy": DDPStrategy(process_group_backend="gloo")}
    trainer = fits.trainer(folder.parent, [callback], **options)
    trainer.validate(fits.Module(), Share(rank, world), verbose=False)


def main(folder: Path, baseline: Path) -> None:
    """The same as alone; then comparisons that all ranks must refuse."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run(folder, None, world, rank)
    spoilt = baseline / "validate" / "samples.jsonl"
    for change, expected in ((True, ValueError), (False, FileNotFoundError)):
        torch.distributed.barrier()
        if rank == 0:
            kept = spoilt.read_text()
            spoilt.write_text("".join(kept.splitlines(keepends=True)[2:]))
        torch.distributed.barrier()
        try:
            run(folder.parent / "refused", baseline if change else folder.parent / "nowhere", world, rank)
        except expected as error:
            with (folder.parent / f"errors.{rank}").open("a") as file:
                file.write(f"{type(error).__name__} ")
        torch.distributed.barrier()
        if rank == 0:
            spoilt.write_text(kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
