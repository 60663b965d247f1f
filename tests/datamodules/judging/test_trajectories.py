"""Files of trajectories: what is refused and where, the split by item, and what a meta model gets to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toys
from trajectories import line, lines, write

from lightning_onpolicy.datamodules.judged import PREFERRED
from lightning_onpolicy.datamodules.judging.meta import ITEM, READABLE, MetaReading, TrajectorySource
from lightning_onpolicy.datamodules.judging.trajectories import (
    Balance,
    Trajectory,
    held_out,
    read_trajectories,
)
from lightning_onpolicy.datamodules.prompts import PromptStream

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # the prompt and nothing else


def one(**more: Any) -> dict[str, Any]:
    """A right judgement of responses a and b, of which b is the better one and was shown first."""
    return line("x", outcome="ok") | {
        "responses": ["a", "b"],
        "labels": [0.0, 1.0],
        "order": [1, 0],
        "scores": [2, 9],
        "right": True,
        "text": "so",
        **more,
    }


def read(tmp_path: Path, *rows: dict[str, Any]) -> list[Trajectory]:
    return read_trajectories([write(tmp_path / "t.jsonl", list(rows))])


def test_what_is_in_the_file_is_read(tmp_path: Path) -> None:
    rows = [one(), one(uid=3, labels=[1], responses=["a"], order=[0], scores=[0], right=False, reference="r")]
    first, second = read(tmp_path, *rows)
    assert (first.item.uid, first.item.labels, first.item.reference) == ("x", (0.0, 1.0), None)
    assert first.item.messages == tuple(rows[0]["messages"])
    assert (first.sample.order, first.sample.scores, first.sample.text) == ((1, 0), (2, 9), "so")
    assert (first.right, first.hinted, second.right) == (True, False, False)
    assert (second.item.uid, second.item.reference, second.item.responses) == ("3", "r", ("a",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"right": False},
            r"t\.jsonl line 2: item 'x': 'right' is False, but of scores \(2, 9\) .* must be True",
        ),
        ({"scores": [9, 2]}, r"line 2: .*'right' is True, but .* must be False"),
        ({"scores": [9, 9]}, r"line 2: .*must be False"),
        ({"scores": None, "outcome": "missing"}, r"line 2: .*'right' is True, but of scores None"),
        ({"right": 1}, r"line 2: key 'right' must be true or false, got int"),
        ({"hinted": ...}, r"line 2: key 'hinted' is missing"),
        ({"text": None}, r"line 2: key 'text' must be a text, got NoneType"),
        ({"uid": ...}, r"line 2: key 'uid' is missing"),
        ({"messages": []}, r"line 2: key 'messages' holds no turn"),
        ({"responses": []}, r"line 2: key 'responses' must be a list of one or more"),
        ({"labels": None}, r"line 2: key 'labels' must be a list"),
        ({"labels": [0, True]}, r"line 2: key 'labels' must hold finite numbers"),
        ({"labels": [0, float("nan")]}, r"line 2: key 'labels' must hold finite numbers"),
        ({"labels": [1, 1]}, r"line 2: item 'x': the largest label is not unique"),
        ({"labels": [0, 1, 2]}, r"line 2: item 'x': 3 labels for 2"),
        ({"order": [0, 2]}, r"line 2: item 'x': order \(0, 2\) is no order of 2"),
        ({"order": [0.0, 1]}, r"line 2: key 'order' must hold whole numbers"),
        ({"scores": [2]}, r"line 2: item 'x': 1 scores for 2"),
        ({"outcome": "fine"}, r"line 2: item 'x': outcome must be one of"),
        ({"outcome": "count"}, r"line 2: item 'x': outcome count with scores"),
        ({"responses": ["a", "c"]}, r"line 2: key 'uid': 'x' of source 'toy' is another item in .*line 1"),
    ],
)
def test_a_line_that_is_wrong_is_refused_with_its_place(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    bad = {key: value for key, value in one(**change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        read(tmp_path, one(), bad)


def test_files_that_are_empty_or_named_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [])
    with pytest.raises(ValueError, match=r"no trajectory in .*t\.jsonl"):
        read_trajectories([path])
    with pytest.raises(ValueError, match=r"named twice: .*t\.jsonl"):
        read_trajectories([path, path])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_trajectories([tmp_path / "nowhere.jsonl"])


def test_the_split_is_by_name_alone_and_nested() -> None:
    """Catches: a split by trajectory or by place, and Python's own hash, which changes from process to process."""
    names = [f"i{i}" for i in range(4000)]
    small, large = ({n for n in names if held_out(n, fraction, seed=0)} for fraction in (0.1, 0.3))
    assert small < large
    assert len(small) == pytest.approx(400, abs=4 * 19) and len(large) == pytest.approx(1200, abs=4 * 29)
    other = {n for n in names if held_out(n, 0.1, seed=1)}
    assert len(small & other) == pytest.approx(40, abs=4 * 7)
    assert sorted(small)[:4] == ["i100", "i1002", "i1013", "i1040"], "on every machine"


def test_the_balance_counts(tmp_path: Path) -> None:
    rows = [one(), one(), one(scores=[2, 1], right=False), one(uid="y")]
    rows.append(one(uid="z", scores=None, outcome="truncated", right=False))
    balance = Balance.of(read(tmp_path, *rows))
    assert balance == Balance(items=3, trajectories=5, right=3, unreadable=1, mixed=1)
    assert str(balance).startswith(
        "5 trajectories of 3 items: 3 right, 2 wrong (1 of them unreadable), wrong/"
    )
    assert "wrong/right = 0.67; both in 1 items" in str(balance)
    assert "inf" in str(Balance.of(read(tmp_path, rows[-1])))


def test_the_meta_model_reads_what_the_judge_saw_and_wrote_but_no_label(tmp_path: Path) -> None:
    thought = "t1 </think> t2 </think> t3 t4"
    seen = {"responses": ["alpha", "omega"], "labels": [0.25, 0.75], "reference": "secret"}
    rows = [
        one(**seen, text=thought),
        one(**seen, order=[0, 1], scores=[9, 2], right=False, text="t5"),
        one(uid="y", scores=None, outcome="truncated", right=False, text="t6"),
        one(uid="z", scores=None, outcome="missing", right=False, text=""),
    ]
    tokenizer = toys.tokenizer(template=CHAT)

    def batch(reading: MetaReading) -> Any:
        source = TrajectorySource(read(tmp_path, *rows), reading)
        prompts = PromptStream(source, tokenizer, shuffle=False).take(4)
        return prompts, reading.batch(prompts, tokenizer)

    prompts, rows_B = batch(MetaReading())
    shown = [[p.text.index(word) for word in ("alpha", "omega")] for p in prompts[:2]]
    assert shown[0][0] > shown[0][1] and shown[1][0] < shown[1][1], "the order that was shown"
    assert not any(secret in p.text for p in prompts for secret in ("secret", "0.25", "0.75"))
    replies = [
        tokenizer.decode(ids[mask]) for ids, mask in zip(rows_B.input_ids, rows_B.response_mask, strict=True)
    ]
    assert replies == ["t3 t4 <eos>", "t5 <eos>", "t6", "<eos>"]
    assert rows_B.extra[PREFERRED].tolist() == [True, False, False, False]
    assert rows_B.extra[READABLE].tolist() == [True, True, False, False]
    assert rows_B.group.tolist() == [0, 0, 1, 2]
    assert len(set(rows_B.extra[ITEM].tolist())) == 3 and rows_B.extra[ITEM][0] == rows_B.extra[ITEM][1]
    for i, prompt in enumerate(prompts):
        assert rows_B.input_ids[i][: len(prompt.ids)].tolist() == list(prompt.ids)

    whole = batch(MetaReading(think_end=None, max_reply_tokens=4))[1]
    assert tokenizer.decode(whole.input_ids[0][whole.response_mask[0]]) == "t1 <unk> t2 <unk>"
    assert whole.finished.tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"reading\.max_reply_tokens must be >= 1"):
        MetaReading(max_reply_tokens=0)


def test_made_up_trajectories_are_right_and_wrong(tmp_path: Path) -> None:
    """Of the helper that other tests learn from."""
    found = read(tmp_path, *lines(20, 4))
    assert {("t7" in t.sample.text.split()) == t.right for t in found} == {True}
    assert 20 < Balance.of(found).right < 60
