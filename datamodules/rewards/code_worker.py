"""Tests one program in its sandbox, inside a verifier process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_onpolicy.datamodules.rewards import sandbox_child
from lightning_onpolicy.datamodules.rewards.cases import Case, StdioCase
from lightning_onpolicy.datamodules.rewards.sandbox import Program
from lightning_onpolicy.datamodules.rewards.sandbox_process import Limits, Outcome
from lightning_onpolicy.datamodules.rewards.tiers import Wall


@dataclass(frozen=True)
class Setting:
    """How programs are tested.

    Args:
        wall: What stands around them.
        limits: Of each test.
        total_s: Seconds for all tests of a program; those that did not start by then are failed.
        partial: Score the fraction of tests passed; else 1 if all passed, and stop at the first that fails.
        zero_overtime: Score 0 if the tests took longer than ``total_s``.
    """

    wall: Wall
    limits: Limits
    total_s: float
    partial: bool
    zero_overtime: bool = False


def score(item: tuple[Setting, str, Sequence[Case]]) -> float:
    """The fraction of ``(setting, program, tests)`` that passes. Expected outputs do not leave this process.

    Raises:
        SandboxError: If the sandbox failed by itself.
    """
    setting, source, cases = item
    sandbox_child.adopt_orphans()  # a program that kills the server of its sandbox leaves its processes to this one
    end = time.monotonic() + setting.total_s
    passed = 0
    with Program(setting.wall, setting.limits, source, guardian=True) as program:
        for case in cases:
            if time.monotonic() >= end:
                break
            outcome = _run(program, case)
            if outcome.status == "ok" and case.passes(outcome.output):
                passed += 1
            elif not setting.partial:
                break
    if setting.zero_overtime and time.monotonic() >= end:
        return 0.0
    return passed / len(cases) if setting.partial else float(passed == len(cases))


def _run(program: Program, case: Case) -> Outcome:
    if isinstance(case, StdioCase):
        return program.run(case.stdin)
    return program.call(case.function, case.args)
