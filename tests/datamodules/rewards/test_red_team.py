"""The red team: hostile programs and answers score 0 or nothing, the host stays as it was, honest ones are scored.

``tests/helpers/hostile.py`` has the attempts and, for each, what it takes to stop it. Where a tier does not stop one by
design (the lower tier has no answer to the network, for example), the test demands that it gets through: the
table must say what is, and so must the statement that users read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from hostile import ANSWERS, PROGRAMS, Hostile, Needs, left_behind

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt
from lightning_onpolicy.datamodules.gym import GymSource
from lightning_onpolicy.datamodules.rewards.code import CodeReward
from lightning_onpolicy.datamodules.rewards.gym import GymReward
from lightning_onpolicy.datamodules.rewards.instructions import InstructionReward
from lightning_onpolicy.datamodules.rewards.math import MathReward
from lightning_onpolicy.datamodules.rewards.sandbox import find
from lightning_onpolicy.datamodules.rewards.stem import ChoiceReward, NumericReward
from lightning_onpolicy.datamodules.rewards.tiers import Tier, Wall

CANARY = "canary"


def block(source: str) -> str:
    return f"So:\n```python\n{source}\n```\n"


def group(row: dict[str, object], *texts: str) -> Group:
    completions = tuple(Completion(torch.tensor([1]), torch.zeros(1), "eos", text=t) for t in texts)
    return Group(Prompt((1,), "", row, str(row.get("uid", "")), str(row.get("source", ""))), completions)


@dataclass
class Host:
    """What programs must not reach, and how to see that they did not."""

    folder: Path
    port: int
    unused_port: int
    unix: str

    @property
    def names(self) -> dict[str, str]:
        return {
            "@PORT@": str(self.port),
            "@UNIX@": self.unix,
            "@LISTEN@": str(self.unused_port),
            "@PUBLIC@": str(self.folder / "public"),
            "@PRIVATE@": str(self.folder / "private"),
            "@FOLDER@": str(self.folder),
            "@PID@": str(os.getpid()),
            "@SITE@": str(Path(hostile.__file__).parents[2] / "src"),
        }

    def fill(self, source: str) -> str:
        for name, value in self.names.items():
            source = source.replace(name, value)
        return source

    def plant(self) -> None:
        for name in ("public", "private", "deleted", "linked"):
            (self.folder / name).write_text(CANARY)
        (self.folder / "public").chmod(0o666)
        (self.folder / "private").chmod(0o600)
        self.planted = {path.name: path.stat().st_mtime_ns for path in self.folder.iterdir()}

    def changed(self) -> set[str]:
        now = {
            path.name: path.stat().st_mtime_ns for path in self.folder.iterdir() if path.read_text() == CANARY
        }
        return {name for name, when in self.planted.items() if now.get(name) != when}


@contextlib.contextmanager
def a_host() -> Iterator[Host]:
    # Not pytest's own folder, whose parents are closed to others: what keeps a program out must be our wall.
    folder = Path(tempfile.mkdtemp(prefix="onpolicy-host-", dir="/tmp"))
    folder.chmod(0o755)
    name = f"onpolicy-{os.getpid()}-{time.monotonic_ns()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        udp.bind(tcp.getsockname())
        unix.bind(f"\0{name}")
        unix.listen()
        with socket.create_server(("127.0.0.1", 0)) as spare:
            unused_port = spare.getsockname()[1]
        host = Host(folder, tcp.getsockname()[1], unused_port, name)
        host.plant()
        yield host
    shutil.rmtree(folder)


@dataclass
class Result:
    """What came of all attempts against one tier."""

    scores: dict[str, float | None]
    honest: list[float | None]
    afterwards: list[float | None]
    seconds: float
    calm_seconds: float
    changed: set[str]
    still_listening: bool
    temporary: list[str]
    processes: list[str]
    at_home: bool


def attack(wall: Wall) -> Result:
    """All programs, each followed by an honest one, against one tier."""
    with a_host() as host, pytest.MonkeyPatch.context() as patch:
        scratch = Path(tempfile.mkdtemp(prefix="onpolicy-scratch-", dir="/tmp"))
        scratch.chmod(0o755)
        patch.setenv("TMPDIR", str(scratch))  # workers inherit it
        here = os.getcwd(), dict(os.environ)
        reward = CodeReward(
            workers=2, deadline_s=1.0, total_s=1.0, tier=wall.tier.label, memory_bytes=2**28, processes=16
        )
        groups = [
            group({"tests": case.tests or hostile.SQUARE}, block(host.fill(case.source))) for case in PROGRAMS
        ]
        honest = [group({"tests": hostile.SQUARE}, block(hostile.HONEST))] * len(groups)
        calm = [
            group(
                {"tests": hostile.SQUARE + hostile.FUNCTION},
                block(f"{hostile.HONEST_FUNCTION}\nif __name__ == '__main__': {hostile.HONEST}"),
            )
        ] * 8
        try:
            reward.pool.start()
            start = time.monotonic()
            scores = [
                s[0] for s in reward.score([g for pair in zip(groups, honest, strict=True) for g in pair])
            ]
            seconds = time.monotonic() - start
            start = time.monotonic()
            afterwards = [s[0] for s in reward.score(calm)]
            calm_seconds = time.monotonic() - start
        finally:
            reward.close()
        with socket.socket() as probe:
            still_listening = probe.connect_ex(("127.0.0.1", host.unused_port)) == 0
        temporary = [str(p) for p in scratch.iterdir()]
        shutil.rmtree(scratch)
        end = time.monotonic() + 5
        while (processes := left_behind()) and time.monotonic() < end:
            time.sleep(0.05)
        changed = host.changed()
        at_home = (os.getcwd(), dict(os.environ)) == here
        Path("/dev/shm/onpolicy-canary").unlink(missing_ok=True)
        Path("/usr/onpolicy-canary").unlink(missing_ok=True)
    return Result(
        dict(zip([case.name for case in PROGRAMS], scores[::2], strict=True)),
        scores[1::2],
        afterwards,
        seconds,
        calm_seconds,
        changed,
        still_listening,
        temporary,
        processes,
        at_home,
    )


@pytest.mark.slow
@pytest.mark.parametrize("tier", list(Tier), ids=[tier.label for tier in Tier])
def test_hostile_programs_get_nothing(tier: Tier) -> None:
    wall = find(tier)
    if not isinstance(wall, Wall):
        pytest.skip(f"tier {tier.label}: {wall}")
    result = attack(wall)
    expected = {case.name: expectation(case, wall) for case in PROGRAMS}
    # What scored 1 and should not got through; what scored 0 and should not is stopped after all, so that the table
    # and the statement that users read are out of date.
    assert not {name: score for name, score in result.scores.items() if score not in expected[name]}

    within_reach = {"public"} if wall.tier is Tier.SUBPROCESS else set()
    if not Needs.ANOTHER_USER.met(wall):
        within_reach |= {"private", "deleted", "linked"}
    assert result.changed == within_reach
    assert not result.still_listening
    assert not result.temporary
    assert not result.processes
    assert result.at_home

    assert result.honest == [1.0] * len(PROGRAMS)
    assert result.afterwards == [1.0] * 8
    assert result.seconds < 90
    assert result.calm_seconds < 5


def expectation(case: Hostile, wall: Wall) -> set[float | None]:
    """The scores that this attempt may get behind that wall."""
    if case.needs.met(wall):
        return {0.0, None}
    return {1.0} if case.certain else {0.0, 1.0, None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["countdown", "polynomial_multiplication", "spiral_matrix", "n_queens", "chain_sum"]
)
def test_hostile_answers_get_nothing(task: str, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra lightning-onpolicy[gym]")
    row = GymSource({task: {}}, size=1)[0]
    mark = tmp_path / "mark"
    answers = [answer.replace("@MARK@", str(mark)) for answer in ANSWERS]
    reward = GymReward(workers=2, deadline_s=1.0)
    try:
        reward.pool.start()
        right = str(row["answer"])
        start = time.monotonic()
        scores = reward.score([group(row, *(text for answer in answers for text in (answer, right)))])[0]
        seconds = time.monotonic() - start
    finally:
        reward.close()
    assert set(scores[::2]) <= {0.0, None}
    assert scores[1::2] == [1.0] * len(answers)
    assert not mark.exists()
    assert seconds < 30


SHORT = {"workers": 2, "deadline_s": 1.0}
VERIFIERS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "math": (lambda: MathReward(**SHORT), {"answer": "x + 7/3"}, "\\boxed{\\frac73 + x}"),
    "choice": (lambda: ChoiceReward(**SHORT), {"answer": "C"}, "\\boxed{C}"),
    "numeric": (lambda: NumericReward(**SHORT), {"answer": "20 m/s"}, "\\boxed{72 km/h}"),
    "instructions": (
        lambda: InstructionReward(**SHORT),
        {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["serendipity"]}]},
        "Serendipity!",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VERIFIERS)
def test_hostile_answers_get_nothing_from_other_verifiers(name: str, tmp_path: Path) -> None:
    """As they are, in a box and after "the answer is"; a right answer between each two of them is scored."""
    if name == "math":
        pytest.importorskip("math_verify", reason="needs the extra lightning-onpolicy[verify]")
    make, row, right = VERIFIERS[name]
    mark = tmp_path / "mark"
    answers = [answer.replace("@MARK@", str(mark)) for answer in ANSWERS]
    texts = [
        form.format(answer) for answer in answers for form in ("{}", "\\boxed{{{}}}", "The answer is {}")
    ]
    reward = make()
    try:
        reward.pool.start()
        start = time.monotonic()
        scores = reward.score([group(row, *(text for attempt in texts for text in (attempt, right)))])[0]
        seconds = time.monotonic() - start
    finally:
        reward.close()
    assert set(scores[::2]) <= {0.0, None}
    assert scores[1::2] == [1.0] * len(texts)
    assert not mark.exists()
    assert seconds < 60


def test_there_are_enough_of_them() -> None:
    assert len(PROGRAMS) >= 40
    assert len({case.name for case in PROGRAMS}) == len(PROGRAMS)
    assert len(ANSWERS) >= 30
