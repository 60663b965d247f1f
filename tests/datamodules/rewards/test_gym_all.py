"""Every task of reasoning-gym: gold has full marks, no answer is executed, malformed ones are wrong."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lightning_onpolicy.datamodules.given import group_of
from lightning_onpolicy.datamodules.gym import GymSource, reasoning_gym
from lightning_onpolicy.datamodules.rewards.gym import GymReward

pytest.importorskip("reasoning_gym", reason="needs the extra lightning-onpolicy[gym]")
pytestmark = pytest.mark.slow

TASKS = sorted(set(reasoning_gym().factory.DATASETS) - {"composite"})
# Tasks with many right answers say none in "answer"; some say one elsewhere.
EXAMPLES = {
    "graph_color": lambda metadata: json.dumps(metadata["possible_answer"]),
    "propositional_logic": lambda metadata: metadata["example_answer"],
    "rubiks_cube": lambda metadata: metadata["example_correct_answer"],
}
WITHOUT = {"boxnet", "rush_hour"}


@pytest.fixture(scope="module")
def reward():
    logging.disable(logging.WARNING)
    made = GymReward(workers=1, deadline_s=10.0, partial=True)
    yield made
    made.close()
    logging.disable(logging.NOTSET)


MALFORMED = [
    "no",
    "",
    "1",
    "[1]",
    "{}",
    '{"a": 1}',
    "[{}]",
    "null",
    "1e999",
    "nan",
    "inf",
    "0",
    "1 x 2",
    "1/0",
]


def hostile(mark: Path) -> list[str]:
    """Answers that leave a mark where an answer is evaluated, in the forms that evaluators know."""
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    spelled = "+".join(f"chr({ord(c)})" for c in touch)
    return [
        touch,
        f"[{touch}]",
        f"({touch}, 1)",
        f"eval({spelled})",
        f"0 or {touch}",
        f"x.__class__.__base__.__subclasses__() and {touch}",
        f"{{'a': {touch}}}",
        f"!!python/object/apply:pathlib.Path.touch [{str(mark)!r}]",
        f"cos\nsystem\n(S'touch {mark}'\ntR.",
        f"$(touch {mark})",
        "\x00\ud800",
        "[" * 3000,
        "(" * 3000 + ")" * 3000,
        "9" * 5000,
    ]


@pytest.mark.parametrize("task", TASKS)
def test_gold_scores_and_hostile_answers_do_nothing(reward: GymReward, task: str, tmp_path: Path) -> None:
    rows: list[Any] = [GymSource({task: {}}, size=2, split="all")[i] for i in range(2)]
    for row in rows:
        gold = row["answer"]
        if gold is None and task in EXAMPLES:
            gold = EXAMPLES[task](row["metadata"])
        mark = tmp_path / "executed"
        texts = hostile(mark)
        scores, malformed = reward.score(
            [group_of(row, *texts, *([] if gold is None else [str(gold)])), group_of(row, *MALFORMED)]
        )
        assert not mark.exists(), "an answer was executed"
        assert all(score is None or score < 1 for score in scores[: len(texts)])
        assert None not in malformed, "malformed answers are wrong, not unscored"
        # By chance one may be right ("no"); who takes most of them for right does not look.
        assert sum(score == 1 for score in malformed) <= 2
        if gold is None:
            assert task in WITHOUT
        else:
            assert scores[-1] == 1


def test_all_tasks_are_here() -> None:
    assert len(TASKS) >= 105, importlib.metadata.version("reasoning-gym")


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("coin_flip", ["0", "0.", "0/1", "1e-400"]),
        ("complex_arithmetic", ["nan", "nanj", "1+nanj"]),
        ("game_of_life_halting", ["yes", "False!", "1"]),
    ],
)
def test_scorers_that_took_anything_for_right_no_longer_do(
    reward: GymReward, task: str, answers: list[str]
) -> None:
    source = GymSource({task: {}}, size=6, split="all")
    for row in (source[i] for i in range(6)):
        right, *scores = reward.score([group_of(row, str(row["answer"]), *answers)])[0]
        assert right == 1
        assert all(score is not None and score < 1 for score in scores)
