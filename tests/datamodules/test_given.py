"""Responses that the data gives: which key counts, what they decode to, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toys
from fits import trainer
from lightning.pytorch.callbacks import Callback

from lightning_onpolicy.datamodules.batch import Completion, Prompt, Sampling
from lightning_onpolicy.datamodules.given import given_group, text_completion
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.rows import PLAIN, canonical
from lightning_onpolicy.modules.distill import OnPolicyDistill

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


def test_a_tokenizer_without_eos_closes_nothing() -> None:
    """Catches: a TypeError of torch's, deep in a data loader."""
    bare = toys.tokenizer()
    bare.eos_token = None
    with pytest.raises(ValueError, match=r"the tokenizer has no EOS.*tokenizer_config\.json"):
        text_completion("t1", bare)
    assert text_completion("t1", bare, cut=True).ids.tolist() == [1]


def test_every_given_answer_has_its_turn(tmp_path: Path) -> None:
    """Catches: a row's second answer that no epoch shows, where groups are smaller than what is given."""
    seen: list[str] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            seen.extend(outputs["batch"].texts)

    data = OnPolicyDataModule(
        train=[{"prompt": "t1", "response": ["t2", "t3", "t4"]}],
        prompts_per_batch=2,
        group_size=1,
        steps_per_epoch=8,
        on_policy_fraction=0.0,
        off_policy="dataset",
    )
    module = OnPolicyDistill(toys.policy(0), toys.policy(1), "jsd")
    trainer(tmp_path, [Look()]).fit(module, datamodule=data)
    assert set(seen) == {"t2", "t3", "t4"} and len(seen) == 16


def test_what_was_cut_is_not_taught_to_end(tmp_path: Path) -> None:
    """From `predict` to training. Catches: an EOS behind an answer that ran out of tokens."""
    policy = toys.policy(0, scale=3.0)
    module = OnPolicyDistill(policy, toys.policy(1))
    data = OnPolicyDataModule(
        predict=[{"prompt": f"t{i}"} for i in range(8)],
        sampling=Sampling(max_new_tokens=3),
        eval_group_size=1,
    )
    run = trainer(tmp_path, [])
    rows = [row for batch in run.predict(module, datamodule=data) for row in batch]
    assert {row["finish_reason"] for row in rows} == {"length", "stop"}
    for row in rows:
        given = {"response": row["response"] or "t1", "finish_reason": row["finish_reason"]}
        prompt = Prompt((1,), row["prompt"], given)
        (completion,) = given_group(prompt, policy.tokenizer, "response", None).completions
        assert completion.finish == ("eos" if row["finished"] else "length")
