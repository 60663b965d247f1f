"""Responses that the data gives: which key counts, what they decode to, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import toys

from lightning_onpolicy.datamodules.batch import Completion, Prompt
from lightning_onpolicy.datamodules.given import given_group
from lightning_onpolicy.datamodules.rows import PLAIN, canonical

TOKENIZER = toys.tokenizer()


def completions(limit: int | None = None, **row: Any) -> list[Completion]:
    group = given_group(Prompt((1,), "t1", row, "row 7"), TOKENIZER, "response", limit)
    assert not group.on_policy
    return list(group.completions)


def test_text_is_closed_by_eos_and_ids_are_taken_as_they_are() -> None:
    """Catches: a response without its end, a reward that sees an empty text."""
    for row in ({"response": "t3 t4"}, {"response": ["t3 t4"], "response_ids": [9]}):
        [given] = completions(**row)
        assert given.ids.tolist() == [3, 4, 22] and given.text == "t3 t4"
    for row in ({"response_ids": [3, 4, 22]}, {"response_ids": [3, 4, 22], "response": None}):
        [given] = completions(**row)
        assert given.ids.tolist() == [3, 4, 22] and given.text == "t3 t4"
        assert bool(given.logprobs.isnan().all())


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"answer": "x"}, r"row 7.* has no response: key 'response' is not among \['answer'\]"),
        ({"response": None, "answer": "x"}, r"has no response: .*\['answer'\]"),
        ({"response": []}, "non-empty"),
        ({"response": ["t1", " "]}, "non-empty"),
        ({"response_ids": []}, "'response_ids' is empty"),
        ({"response": ["t1", "t2 \ud83d"]}, r"row 7.*'response'\[1\] holds '\\ud83d' at character 3"),
        (
            {"response": [{"role": "assistant", "content": "\ud83d"}]},
            r"row 7.*'response'\[0\]\['content'\] holds",
        ),
        ({"response": ["t1"], "finish_reasons": []}, "1 responses, but 0 entries in 'finish_reasons'"),
        ({"response": "t1 t2 t3"}, "has 4 tokens, max_response_tokens is 3"),
    ],
)
def test_what_is_no_response_is_an_error_that_names_the_row(row: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        completions(3, **row)


def test_an_absent_column_does_not_hide_the_assistants_message() -> None:
    """Tables keep absent values as None."""
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert canonical({"messages": talk, "response": None}, PLAIN, "here")["response"] == "a"
    assert canonical({"messages": talk, "response": "b"}, PLAIN, "here")["response"] == "b"
