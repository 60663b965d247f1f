"""Two gloo ranks with unequal work, a policy sharded by FSDP2: equally many forward passes, same results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # two processes import torch and transformers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The report of each rank; the scenarios share one start, which costs more than all of them."""
    folder = tmp_path_factory.mktemp("lockstep")
    worker = Path(__file__).with_name("lockstep_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder / "store"), str(folder / f"{rank}.json")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("scenario", ["unequal", "waves", "again", "unsharded", "forced"])
def test_sharding_and_lockstep_do_not_change_results(ranks, scenario):
    for report in ranks:
        assert report[scenario]["result"] == report["expected"]


def test_sharded_ranks_make_equally_many_forward_passes(ranks):
    for scenario in ("unequal", "waves", "nothing", "forced"):
        counts = ranks[0][scenario]["calls"]
        assert counts[0] == counts[1] > 1
    free = ranks[0]["unsharded"]["calls"]
    assert free[0] > free[1], "without sharding, nobody waits"


def test_a_rank_without_prompts_keeps_the_others_going(ranks):
    assert ranks[0]["nothing"]["result"] == ranks[0]["expected"]
    assert ranks[1]["nothing"]["result"] == []


def test_a_refused_request_stops_every_rank_before_it_starts(ranks):
    assert ranks[1]["refused"]["result"][0].startswith("ValueError: prompt 1 is empty")
    assert ranks[0]["refused"]["result"][0].startswith("RuntimeError: rollout: rank 1 refused its prompts")
    assert ranks[0]["refused"]["calls"] == [0, 0]


def test_a_deadline_on_one_rank_stops_every_rank(ranks):
    for rank, report in enumerate(ranks):
        [message] = report["hurried"]["result"]
        assert message.startswith("TimeoutError: rollout: rank 0 passed its deadline_s at step 0")
        assert f"on rank {rank}, {9 if rank == 0 else 1} completions were unfinished" in message
