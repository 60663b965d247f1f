"""Target lengths in prompts: reproducible, in range, written where the user speaks."""

from __future__ import annotations

import pytest

from lightning_onpolicy.datamodules.targets import TargetLengthSource


def test_targets_are_kept_in_the_row_and_said_in_the_prompt() -> None:
    rows = [{"prompt": f"q{i}", "answer": i} for i in range(200)]
    source = TargetLengthSource(rows, low=10, high=20, target_key="n")
    made = [source[i] for i in range(len(source))]
    assert {row["n"] for row in made} == set(range(10, 21))
    assert all(row["prompt"] == f"q{i}\n\nThink for {row['n']} tokens." for i, row in enumerate(made))
    assert made == [source[i] for i in range(200)], "row i is a function of i"
    assert made != [TargetLengthSource(rows, 10, 20, target_key="n", seed=1)[i] for i in range(200)]
    assert rows[0] == {"prompt": "q0", "answer": 0}


def test_conversations_are_asked_in_the_last_message_of_the_user() -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    row = TargetLengthSource([{"messages": turns}], 5, 5, request=" ({tokens})")[0]
    assert [m["content"] for m in row["messages"]] == ["a", "b (5)", "c"]
    assert turns[1]["content"] == "b"


def test_what_cannot_be_asked_is_an_error() -> None:
    for settings, key in (
        ({"low": 0}, "low"),
        ({"low": 9, "high": 8}, "high"),
        ({"request": "x"}, "request"),
    ):
        with pytest.raises(ValueError, match=key):
            TargetLengthSource([], **settings)
    with pytest.raises(ValueError, match="row 0 of 'list'"):
        TargetLengthSource([{"messages": []}])[0]
