"""The reasoning-gym reward: right answers score, hostile ones do nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt
from lightning_onpolicy.datamodules.gym import GymSource
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.gym import GymReward

pytest.importorskip("reasoning_gym", reason="needs the extra lightning-onpolicy[gym]")
from lightning_onpolicy.datamodules.rewards import gym_worker

SUMS = {"chain_sum": {"config": {"min_terms": 2, "max_terms": 2}, "prompt": "{{ metadata.expression }} ="}}


def group(row: dict[str, object], texts: list[str]) -> Group:
    completions = tuple(Completion(torch.tensor([1]), torch.zeros(1), "eos", text=t) for t in texts)
    return Group(Prompt((1,), str(row["prompt"]), row, str(row["uid"]), str(row["source"])), completions)


@pytest.fixture(scope="module")
def reward():
    made = GymReward(workers=1, deadline_s=3.0, partial=True)
    yield made
    made.close()


def test_stripped_answers_are_scored_group_by_group(reward: GymReward) -> None:
    source = GymSource("onpolicy://quickstart/tasks.yaml", size=60)
    rows = [source[i] for i in range(60)]
    scores = reward.score(
        [group(r, [str(r["answer"]), f" {r['answer']}\n", "no"][: 2 + i % 2]) for i, r in enumerate(rows)]
    )
    assert [len(s) for s in scores] == [2 + i % 2 for i in range(60)]
    assert all(s[:2] == [1.0, 1.0] for s in scores)
    assert all(s[2] < 1 for s in scores[1::2])
    assert isinstance(reward, Reward)
    assert not reward.failures


def test_partial_credit_is_kept_or_dropped(reward: GymReward) -> None:
    row = GymSource(SUMS, size=1)[0]
    answers = [str(row["answer"]), f"the answer is {row['answer']}"]
    full, part = reward.score([group(row, answers)])[0]
    assert full == 1
    assert 0 < part < 1
    strict = GymReward()
    strict.pool = reward.pool
    assert strict.score([group(row, answers)]) == [[1.0, 0.0]]


def test_a_step_of_short_answers_is_cheap(reward: GymReward) -> None:
    source = GymSource(SUMS, size=64)
    groups = [group(row, [str(row["answer"]), "1", "2", "3"]) for row in map(source.__getitem__, range(64))]
    reward.score(groups)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        reward.score(groups)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


@pytest.mark.parametrize("task", sorted(gym_worker.LITERAL_TASKS | gym_worker.SYMPY_TASKS))
def test_answers_are_never_executed(reward: GymReward, task: str, tmp_path: Path) -> None:
    row = GymSource({task: {}}, size=1)[0]
    mark = tmp_path / "executed"
    calls = [
        f"open({str(mark)!r}, 'w')",
        f"__import__('pathlib').Path({str(mark)!r}).touch()",
        f"[open({str(mark)!r}, 'w')]",
        f"eval({'+'.join(f'chr({ord(c)})' for c in f'open({str(mark)!r},chr(119))')})",
        f"x.__class__.__base__.__subclasses__()[open({str(mark)!r}, 'w')]",
    ]
    right, *scores = reward.score([group(row, [str(row["answer"]), *calls])])[0]
    assert not mark.exists()
    assert all(s is not None and s < 0.2 for s in scores)
    assert right == 1
    assert not reward.failures


@pytest.mark.parametrize(
    ("answer", "formula"),
    [
        ("(7 + 3) * 2 - 10/5", True),
        ("x**2 + 3*x*sin(2*x) - exp(-0.5*x) + C", True),
        ("2x^3", True),
        ("", True),
        ("open(1)", False),
        ("x.y", False),
        ("1 . y", False),
        ("_", False),
        ("'a'", False),
        ("[1]", False),
        ("x = 1", False),
        ("\uff45val(1)", False),
    ],
)
def test_what_counts_as_a_formula(answer: str, formula: bool) -> None:
    assert gym_worker.is_formula(answer) is formula


def test_answers_written_as_lists_still_get_their_partial_credit(reward: GymReward) -> None:
    row = GymSource({"spiral_matrix": {}}, size=1)[0]
    assert reward.score([group(row, [f"[{', '.join(str(row['answer']).split())}]", "[1"])]) == [[0.1, 0.0]]


def test_a_formula_that_explodes_is_not_scored() -> None:
    row = GymSource({"countdown": {}}, size=1)[0]
    impatient = GymReward(workers=1, deadline_s=1.0)
    assert impatient.score([group(row, ["9**9**9**9"])]) == [[None]]
    assert impatient.failures == {"timeout": 1}
    impatient.close()


def test_rows_that_are_no_tasks_are_refused(reward: GymReward) -> None:
    row = GymSource(SUMS, size=1)[0]
    with pytest.raises(ValueError, match="'seven' has the source 'list', which is not a reasoning-gym task"):
        reward.score([group({**row, "uid": "seven", "source": "list"}, ["1"])])
    del row["metadata"]
    with pytest.raises(ValueError, match=r"lacks \['metadata'\]; it has \['answer'"):
        reward.score([group(row, ["1"])])
