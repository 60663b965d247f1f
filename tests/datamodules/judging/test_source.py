"""Items from files, and as prompts for a judge in training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import judges
import pytest

from lightning_onpolicy.datamodules.given import group_of
from lightning_onpolicy.datamodules.judging.module import ItemLoader, JudgingDataModule
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate
from lightning_onpolicy.datamodules.judging.rejection import item_row
from lightning_onpolicy.datamodules.judging.source import JudgeSource, cases_of, read_items
from lightning_onpolicy.datamodules.rewards.judgement import JudgementReward, ReadableReward

GOOD: dict[str, Any] = {"prompt": "1+1=", "responses": ["2", "3"], "labels": [1, 0]}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "items.jsonl", *(item_row(item) for item in judges.items(5)))


def test_items_survive_their_file(file: Path) -> None:
    for item, known in zip(read_items(file), judges.items(5), strict=True):
        assert (item.messages, item.responses, item.labels, item.uid, item.source) == (
            known.messages,
            known.responses,
            known.labels,
            known.uid,
            known.source,
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [1, 1]}, "line 1: .*largest label is not unique"),
        ({"labels": [1]}, "line 1: .*1 labels for 2 responses"),
        ({"labels": ["good", "bad"]}, "line 1: key 'labels' must hold numbers"),
        ({"labels": None}, "line 1: key 'labels' is missing"),
        ({"responses": []}, "line 1: key 'responses'"),
        ({"responses": "2"}, "line 1: key 'responses'"),
        ({"prompt": None, "messages": []}, "line 1: key 'messages' holds no turn"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_items(write(tmp_path / "x.jsonl", {**GOOD, **change}), labelled=True)


def test_a_name_that_stands_twice_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: the uid 'a' stands already in .* line 1"):
        read_items(write(tmp_path / "x.jsonl", {**GOOD, "uid": "a"}, {**GOOD, "uid": "a"}))
    with pytest.raises(ValueError, match="holds no item"):
        read_items(write(tmp_path / "y.jsonl"))


def test_rows_show_every_item_in_orders_of_its_own_with_labels_to_match(file: Path) -> None:
    source = JudgeSource(file, orders_per_item=12, seed=3)
    items = {item.uid: item for item in source.items}
    assert len(source) == 60
    seen: dict[str, set[tuple[int, ...]]] = {}
    for row in (source[i] for i in range(60)):
        item = items[row["item"]]
        assert item.labels is not None
        assert judges.shown(row["prompt"]) == [item.responses[i] for i in row["order"]]
        assert row["labels"] == [item.labels[i] for i in row["order"]]
        seen.setdefault(row["item"], set()).add(tuple(row["order"]))
    assert all(len(orders) > 3 for orders in seen.values())
    again = JudgeSource(file, orders_per_item=12, seed=3)
    assert [again[i] for i in range(60)] == [source[i] for i in range(60)]
    assert [JudgeSource(file, orders_per_item=12, seed=4)[i] for i in range(60)] != [
        source[i] for i in range(60)
    ]
    assert [JudgeSource(file)[i] for i in range(5)] != [] and len({source[i]["uid"] for i in range(60)}) == 60


def test_the_reward_does_not_depend_on_the_order_shown(file: Path) -> None:
    source = JudgeSource(file, orders_per_item=6)
    rows = [source[i] for i in range(30)]
    right = [judges.by_content(row["prompt"], 0) for row in rows]
    best_last = [f"\\boxed{{{', '.join('5' for _ in row['labels'])}}}" for row in rows]  # a tie at the top
    groups = [group_of(row, *texts, "no box") for row, *texts in zip(rows, right, best_last, strict=True)]
    assert JudgementReward().score(groups) == [[1.0, -1.0, -1.0]] * 30
    assert ReadableReward().score(groups) == [[1.0, 1.0, 0.0]] * 30
    assert JudgementReward(wrong=0.0).score(groups) == [[1.0, 0.0, 0.0]] * 30
    for wrong in (1.0, float("nan")):
        with pytest.raises(ValueError, match="wrong must be below 1"):
            JudgementReward(wrong=wrong)


def test_scores_in_the_thinking_do_not_count() -> None:
    row = {"prompt": "?", "labels": [1.0, 0.0], "low": 1, "high": 10}
    texts = ["\\boxed{1, 9}</think>\\boxed{9, 1}", "\\boxed{9, 1}</think>none"]
    assert JudgementReward().score([group_of(row, *texts)]) == [[1.0, -1.0]]
    assert JudgementReward(think_end=None).score([group_of(row, *texts)]) == [[1.0, 1.0]]


def test_scores_in_a_thinking_that_the_chat_template_opened_do_not_count() -> None:
    """Catches: +1 for a guess in mid-thought, cut or ended, where the template writes the opening tag."""
    row = {"prompt": "?<assistant><think>\n", "labels": [1.0, 0.0], "low": 1, "high": 10}
    group = group_of(row, "\\boxed{9, 1}? Wait", "\\boxed{1, 9}</think>\\boxed{9, 1}")
    cut = dataclasses.replace(group.completions[0], finish="length")
    group = dataclasses.replace(group, completions=(*group.completions, cut))
    assert JudgementReward().score([group]) == [[-1.0, 1.0, -1.0]]
    assert ReadableReward().score([group]) == [[0.0, 1.0, 0.0]]
    assert JudgementReward(think_end=None).score([group]) == [[1.0, 1.0, 1.0]]


def test_a_row_that_is_no_judges_is_named() -> None:
    with pytest.raises(
        ValueError, match="lacks \\['labels', 'low', 'high'\\]: its prompts must come from JudgeSource"
    ):
        JudgementReward().score([group_of({"prompt": "?"}, "x")])


def test_labelled_items_are_a_benchmark(tmp_path: Path, file: Path) -> None:
    cases = cases_of(file)
    assert [case.correct for case in cases] == [(item.best,) for item in judges.items(5)]
    single = write(
        tmp_path / "s.jsonl",
        {**GOOD, "responses": ["2"], "labels": [1]},
        {**GOOD, "responses": ["3"], "labels": [0]},
    )
    assert [(c.kind, c.correct) for c in cases_of(single)] == [("single", (0,)), ("single", ())]


def test_a_rank_without_items_has_one_empty_batch() -> None:
    """Lightning refuses a loader without batches, and the other ranks would wait for this one in the report."""
    assert [len(batch) for batch in ItemLoader([], 4)] == [0] and len(ItemLoader([], 4)) == 1
    assert [len(batch) for batch in ItemLoader(range(5), 4)] == [4, 1] and len(ItemLoader(range(5), 4)) == 2


def test_the_data_module_shares_out_whole_items(file: Path) -> None:
    class Shard:
        def __init__(self, rank: int) -> None:
            self.distributed_sampler_kwargs = {"rank": rank, "num_replicas": 2}

    parts = []
    for rank in range(2):
        data = JudgingDataModule(predict=str(file), test={"items": str(file)}, items_per_batch=2)
        data.trainer = Shard(rank)  # type: ignore[assignment]
        parts.append([item.uid for batch in data.predict_dataloader() for item in batch])
        assert [case.item.uid for batch in data.test_dataloader() for case in batch] == parts[-1]
    assert sorted(parts[0] + parts[1]) == [f"item{i}" for i in range(5)] and not set(parts[0]) & set(parts[1])
    with pytest.raises(ValueError, match=r"data\.predict is missing"):
        JudgingDataModule(test={"items": str(file)}).predict_dataloader()
    with pytest.raises(ValueError, match=r"data\.test is missing"):
        JudgingDataModule(predict=str(file)).test_dataloader()


def test_items_of_one_response_among_others_are_asked_for_a_yes_or_a_no(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", GOOD, {"prompt": "2+2=", "responses": ["5"], "labels": [0]})
    several, single = (JudgeSource(file)[index] for index in range(2))
    assert (several["low"], several["high"]) == (1, 10) and "answer-2-" in several["prompt"]
    assert (single["low"], single["high"]) == (0, 1) and "\\boxed{0} or \\boxed{1}" in single["prompt"]
    scored = JudgementReward().score([group_of(single, "\\boxed{0}", "\\boxed{1}", "\\boxed{5}")])
    assert scored == [[1.0, -1.0, -1.0]]


def test_a_template_that_asks_for_a_yes_or_a_no_is_that_of_single_responses(tmp_path: Path) -> None:
    """Catches: a template of one's own that is put aside silently for the packaged one."""
    mine = tmp_path / "mine.jinja"
    mine.write_text("Right? {{ responses[0] }}")
    file = write(tmp_path / "x.jsonl", {"prompt": "2+2=", "responses": ["5"], "labels": [0]})
    assert JudgeSource(file, JudgeTemplate(str(mine), 0, 1))[0]["prompt"] == "Right? 5"
    other = JudgeTemplate(str(mine), 0, 1)
    assert JudgeSource(file, single=other)[0]["prompt"] == "Right? 5"
