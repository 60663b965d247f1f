"""Deadlines name the phase, stop Python code, and end a process that no longer answers."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from lightning_onpolicy.datamodules.phases import EXIT_CODE, Phases, PhaseTimeout


def test_seconds_add_up_per_phase_and_are_taken_once() -> None:
    phases = Phases()
    for _ in range(2):
        with phases("a"):
            time.sleep(0.01)
    phases.add({"b": 1.5})
    taken = phases.take()
    assert taken["a"] >= 0.02
    assert taken["b"] == 1.5
    assert phases.take() == {}


def test_deadline_interrupts_the_phase_by_name() -> None:
    phases = Phases(deadline_s=0.2)
    with (
        pytest.raises(PhaseTimeout, match=r"phase 'slow' on rank 0 outlived its deadline of 0.2 s"),
        phases("slow"),
    ):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            time.sleep(0.01)
    assert phases.take()["slow"] < 10


def test_a_phase_in_time_is_left_alone() -> None:
    phases = Phases(deadline_s=0.1)
    with phases("quick"):
        pass
    time.sleep(0.3)  # the timer must have been disarmed: nothing may be raised here


def test_a_hang_outside_python_ends_the_process_with_stacks() -> None:
    code = (
        "import threading\n"
        "from lightning_onpolicy.datamodules.phases import Phases\n"
        "lock = threading.Lock(); lock.acquire()\n"
        "with Phases(deadline_s=0.2, grace_s=0.3)('stuck'):\n"
        "    lock.acquire()\n"  # waits in C: no exception can reach it
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_CODE
    assert "phase 'stuck' on rank 0" in done.stderr
    assert "most recent call first" in done.stderr
