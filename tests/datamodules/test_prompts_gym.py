"""Generated tasks: reproducible, mixed by weight, split by the prompt's text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from lightning_onpolicy.datamodules.gym import GymSource, load_tasks, split_of

pytest.importorskip("reasoning_gym", reason="needs the extra lightning-onpolicy[gym]")

TASKS = {
    "chain_sum": {
        "weight": 3,
        "config": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        "prompt": "{{ metadata.expression | replace(' ', '') }}=",
    },
    "spell_backward": {"weight": 1},
}


def test_rows_depend_on_arguments_and_index_alone() -> None:
    forward = GymSource(TASKS, size=40, seed=5)
    backward = GymSource(TASKS, size=40, seed=5)
    rows = [forward[i] for i in range(40)]
    assert rows == [backward[i] for i in reversed(range(40))][::-1]
    assert rows != [GymSource(TASKS, size=40, seed=6)[i] for i in range(40)]
    assert len({r["uid"] for r in rows}) == 40


def test_rows_hold_what_rewards_need() -> None:
    for row in map(GymSource(TASKS, size=12).__getitem__, range(12)):
        assert row["metadata"]["source_dataset"] == row["source"]
        json.dumps(row)
        if row["source"] == "chain_sum":
            assert eval(row["prompt"].rstrip("=")) == int(row["answer"])
            assert row["config"] == TASKS["chain_sum"]["config"]
        else:
            assert row["prompt"] == row["question"]  # no template: the question itself


def test_splits_are_disjoint_by_the_rule() -> None:
    sources = [GymSource(TASKS, size=150, split=split) for split in ("train", "heldout", "all")]
    prompts = {s.split: {s[i]["prompt"] for i in range(150)} for s in sources}
    assert {split_of(p) for p in prompts["train"]} == {"train"}
    assert {split_of(p) for p in prompts["heldout"]} == {"heldout"}
    assert {split_of(p) for p in prompts["all"]} == {"train", "heldout"}
    share = sum(split_of(f"prompt {i}") == "heldout" for i in range(5000)) / 5000
    assert abs(share - 0.1) < 0.02


def test_any_run_of_rows_is_mixed_by_weight() -> None:
    source = GymSource(TASKS, size=400)
    for start in (0, 37, 300):
        count = Counter(source[i]["source"] for i in range(start, start + 80))
        assert abs(count["chain_sum"] - 60) <= 2


def test_tasks_come_from_a_file_and_from_the_package(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(yaml.safe_dump(TASKS))
    assert load_tasks(str(file)) == load_tasks(TASKS)
    packaged = GymSource("onpolicy://quickstart/tasks.yaml", size=30, split="heldout")
    assert all(len(packaged[i]["prompt"]) < 60 for i in range(30))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "non-empty mapping"),
        ({"composite": {}}, "'composite' mixes other tasks"),
        ({"chain_summ": {}}, r"no tasks named \['chain_summ'\]"),
        ({"chain_sum": {"wieght": 2}}, "chain_sum.*keys among weight, config, prompt"),
        ({"chain_sum": {"weight": 0}}, r"chain_sum\.weight must be a positive number"),
        ({"chain_sum": {"config": {"seed": 3}}}, r"chain_sum\.config .*without seed and size"),
        ({"chain_sum": {"prompt": "{question}"}}, "chain_sum.*must use question or metadata"),
        ({"chain_sum": {"prompt": "{{ answer }}"}}, "must use question or metadata and nothing else.*answer"),
        ({"chain_sum": {"prompt": "{{ question"}}, "chain_sum.*not a Jinja template"),
    ],
)
def test_malformed_mixes_are_named(tasks: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GymSource(tasks)


def test_a_task_without_prompts_in_the_split_says_so() -> None:
    tasks = {"chain_sum": {"prompt": "always the same{{ question[:0] }}"}}
    other = "heldout" if split_of("always the same") == "train" else "train"
    with pytest.raises(ValueError, match=f"chain_sum.*no {other} prompt"):
        GymSource(tasks, size=3, split=other)[0]


def test_settings_and_indices_out_of_range() -> None:
    with pytest.raises(ValueError, match="size"):
        GymSource(TASKS, size=0)
    with pytest.raises(ValueError, match="split"):
        GymSource(TASKS, split="test")
    with pytest.raises(IndexError, match="row 5"):
        GymSource(TASKS, size=5)[5]
