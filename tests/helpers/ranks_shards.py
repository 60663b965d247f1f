"""Everything `test_sharding.py` asks of N ranks, in one world: ``ranks_shards.py RANK RANKS FOLDER``."""

from __future__ import annotations

import faulthandler
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import shard_contracts as contracts
import shard_scenarios as scenarios
import torch
import torch.distributed as dist
from leaving import leave
from shard_problems import World, solve, specs

from lightning_onpolicy.kernels import tiles

SCENARIOS = (
    *(
        scenarios.ties,
        scenarios.far,
        scenarios.outside,
        scenarios.dtensors,
        scenarios.model,
        scenarios.own_loss,
    ),
    *(scenarios.frozen, scenarios.empty, scenarios.half, scenarios.compiled, scenarios.two_groups),
    *(contracts.shards, contracts.disagreements, contracts.misfit_teacher, contracts.traffic, contracts.gone),
)


def main(world: World, folder: Path) -> None:
    """Run all, and leave this rank's answers in ``folder``."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=world.rank,
        world_size=world.ranks,
        timeout=timedelta(seconds=60),
    )
    # Tiles of 4 rows and 5 ids: ragged both ways, and several on every rank.
    tiles.CPU_ROWS, tiles.CPU_ELEMENTS, tiles.MIN_COLUMNS = 4, 1, 5
    found: dict[str, Any] = {
        name: [solve(spec, world) for spec in listed] for name, listed in specs(world.ranks).items()
    }
    for scenario in SCENARIOS:
        found[scenario.__name__] = scenario(world)
    torch.save(found, folder / f"rank{world.rank}.pt")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(
        120, exit=True
    )  # before the test's patience ends, so that a hang shows its place
    main(World(int(sys.argv[1]), int(sys.argv[2])), Path(sys.argv[3]))
    leave()
