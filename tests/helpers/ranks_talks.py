"""``ranks_fit.py`` with conversations, of which only rank 0 has long ones: ``ranks_talks.py STRATEGY OUT``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ranks_fit
import talks
import torch
import torch.distributed as dist
from leaving import leave

from lightning_onpolicy.datamodules.batch import Completion, Sampling
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule

RANK = int(os.environ.get("RANK", 0))
ASKED: list[int] = []  # prompts per call of the engine


class Counting(TransformersEngine):
    """Remembers how often it is called, and with how many prompts."""

    def generate(self, prompts: Sequence[Sequence[int]], *args: Any, **more: Any) -> list[list[Completion]]:
        ASKED.append(len(prompts))
        return super().generate(prompts, *args, **more)


def data() -> OnPolicyDataModule:
    """Up to five turns on rank 0, one on every other."""
    made = fit_data()
    made.environment = talks.Deep(lambda prompt: 4 if RANK == 0 else 0)
    made.engine_callable = Counting
    made.sampling = made.eval_sampling = Sampling(max_new_tokens=20)
    return made


if __name__ == "__main__":
    fit_data, ranks_fit.data = ranks_fit.data, data
    out = Path(sys.argv[2])
    result = ranks_fit.main(sys.argv[1], out)
    every: list[Any] = [None, None]
    dist.all_gather_object(every, ASKED)
    if RANK == 0:
        torch.save({**result, "asked": every}, out)
    leave()
