"""DPO and weighted SeqKD on N ranks: ``torchrun --nproc-per-node N ranks_given.py STRATEGY OUT``.

Two ranks with half the batch each see together what one process sees, so everything must be equal.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import ranks_fit
import torch
import toys
from duels import Spy
from leaving import leave

from lightning_onpolicy.datamodules.preferences import PreferenceDataModule
from lightning_onpolicy.datamodules.supervised import SupervisedDataModule
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.preference import PreferenceTune
from lightning_onpolicy.modules.saving import gathered_state_dict
from lightning_onpolicy.modules.supervised import SupervisedFineTune

STEPS, PROMPTS = 3, 4  # per step, over all ranks
# Numbers and lengths of answers differ, and so do the ranks' shares of the weights; every other weight is 0.
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"t{i} t{i + 1}",
        "chosen": [f"t{i + 2} t{3 * i % 20}", "t5"][: 1 + i % 2],
        "rejected": ["t6 t7 t8", f"t{2 * i}"][: 1 + i // 4],
        "response": [f"t{i + 2} t{3 * i % 20} t4", f"t{i}", "t9 t1"],
        "weights": [0.25 * i, 0.0, 0.0] if i % 2 else [1.5, 0.0, float(i)],
    }
    for i in range(8)
]


def made(method: str) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """A module and its data; a small budget gives ranks unequal numbers of micro-batches."""
    settings: dict[str, Any] = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.3),
        "loop": LoopSpec(micro_batch_tokens=30, max_grad_norm=0.5, deadline_s=60.0),
    }
    data: dict[str, Any] = {
        "train": ROWS,
        "prompts_per_batch": PROMPTS // int(os.environ.get("WORLD_SIZE", 1)),
        "steps_per_epoch": STEPS,
    }
    policy = toys.policy(0, scale=2.0)
    if method == "dpo":
        return PreferenceTune(policy, beta=0.5, **settings), PreferenceDataModule(**data)
    return SupervisedFineTune(policy, **settings), SupervisedDataModule(weight_key="weights", **data)


def run(strategy: str, method: str, folder: Path, path: Path | None = None) -> dict[str, Any]:
    """Weights and each step's metrics. The first step's checkpoint goes to ``path``, or is gone on from."""
    pl.seed_everything(0, verbose=False)
    module, data = made(method)
    trainer, spy = ranks_fit.trainer(strategy, 1, folder), Spy()
    saved = path is not None and path.exists()
    if path is not None and not saved:
        spy = Spy(path, at=0)
    trainer.callbacks.append(spy)  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=data, ckpt_path=path if saved else None)
    return {"metrics": spy.metrics, "weights": gathered_state_dict(module.policy)}  # type: ignore[arg-type]


def main(strategy: str, out: Path) -> dict[str, Any]:
    """Each method in one go, and from its own first step's checkpoint."""
    result = {}
    for method in ("dpo", "seqkd"):
        path = out.parent / f"{strategy}-{method}-{os.environ.get('WORLD_SIZE', 1)}.ckpt"
        whole = run(strategy, method, out.parent, path)
        result[method] = {"whole": whole, "resumed": run(strategy, method, out.parent, path)}
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(result, out)
    return result


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
