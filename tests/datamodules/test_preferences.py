"""Preference pairs as batches: sides, groups, one cut for both; held-out pairs once each, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys

from lightning_onpolicy.datamodules import PairDataModule
from lightning_onpolicy.datamodules.batch import Prompt, RolloutBatch
from lightning_onpolicy.datamodules.judged import PREFERRED
from lightning_onpolicy.datamodules.preferences import preference_rows
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.sources import FileSource

TOKENIZER = toys.tokenizer()
EOS = 22
ROWS = [
    {"prompt": f"t{i}", "uid": f"p{i}", "chosen": f"t{i} t5", "rejected": [f"t{i} t6", "t7"][: 1 + i % 2]}
    for i in range(5)
]


def data(rank: int = 0, world: int = 1, **settings: Any) -> PairDataModule:
    module = PairDataModule(train=ROWS, val=ROWS, **settings)
    shard = None if world == 1 else {"rank": rank, "num_replicas": world}
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(tokenizer=TOKENIZER),
        distributed_sampler_kwargs=shard,
        limit_train_batches=1.0,
    )
    return module


@pytest.mark.parametrize("bad", ["t1 \ud83d", [{"role": "assistant", "content": "\ud83d"}]])
def test_half_a_character_is_named(bad: Any) -> None:
    """Catches: a tokenizer's TypeError in the middle of training."""
    prompts = [Prompt((3,), "t3", {**ROWS[0], "rejected": bad}, "p0")]
    with pytest.raises(ValueError, match=r"'rejected'.*half of a character"):
        preference_rows(prompts, TOKENIZER, "chosen", "rejected", 2)


def test_rows_are_a_group_per_prompt_with_both_sides() -> None:
    """Catches: sides swapped, a prompt's answers in another's group, an EOS after a cut answer."""
    prompts = [Prompt((3,), "t3", row) for row in ROWS[:2]]
    batch = preference_rows(prompts, TOKENIZER, "chosen", "rejected", 2)
    assert batch.group.tolist() == [0, 0, 1, 1, 1]
    assert batch.extra[PREFERRED].tolist() == [True, False, True, False, False]
    found = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.response_mask, strict=True)]
    assert found == [[0, 5], [0, 6], [1, 5], [1, 6], [7, EOS]]
    assert batch.finished.tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("bad", [None, [], "absent"])
def test_a_row_without_an_answer_is_named(bad: Any) -> None:
    row = {"chosen": "t1"} if bad == "absent" else {"chosen": "t1", "rejected": bad}
    with pytest.raises(ValueError, match=r"row 'p9' has no answer under 'rejected'.*rejected_key"):
        preference_rows([Prompt((3,), "t3", row, "p9")], TOKENIZER, "chosen", "rejected", None)


ASKED = [
    {"role": "system", "content": "t9"},
    {"role": "user", "content": "t1"},
    {"role": "assistant", "content": "t2"},
    {"role": "user", "content": "t3"},
]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def from_file(folder: Path, *rows: dict[str, Any]) -> RolloutBatch:
    """The batch of a file's rows, as the loaders make it."""
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = PromptStream(FileSource(file), TOKENIZER, shuffle=False)
    return preference_rows(stream.take(len(rows)), TOKENIZER, "chosen", "rejected", None)


def test_one_pair_in_any_form_is_one_batch(tmp_path: Path) -> None:
    """A prompt or a conversation of one turn; answers as texts, lists, turns, or conversations with the prompt's."""
    user = [{"role": "user", "content": "t3 t4"}]
    forms = [
        {"prompt": "t3 t4", "chosen": "t5", "rejected": "t6 t7"},
        {"messages": user, "chosen": ["t5"], "rejected": ["t6 t7"]},
        {"prompt": "t3 t4", "chosen": [said("t5")], "rejected": [said("t6 t7")]},
        {"prompt": "t3 t4", "chosen": [*user, said("t5")], "rejected": [*user, said("t6 t7")]},
        {"messages": user, "chosen": [*user, said("t5")], "rejected": "t6 t7"},
    ]
    whole = from_file(tmp_path, *forms)
    first = whole.select([0, 1])
    for i in range(len(forms)):
        batch = whole.select([2 * i, 2 * i + 1])
        for name in ("input_ids", "attention_mask", "response_mask"):
            assert torch.equal(getattr(batch, name), getattr(first, name)), (i, name)
        assert batch.extra[PREFERRED].tolist() == [True, False]


def test_a_conversation_is_the_prompt_as_a_whole(tmp_path: Path) -> None:
    """Catches: only the last question asked, earlier answers of the assistant trained on."""
    row = {"messages": ASKED, "chosen": [*ASKED, said("t5")], "rejected": [*ASKED, said("t6 t7")]}
    batch = from_file(tmp_path, row)
    prompt = TOKENIZER.encode(
        TOKENIZER.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    )
    for i, answer in enumerate(([5, EOS], [6, 7, EOS])):
        ids = batch.input_ids[i][batch.attention_mask[i]].tolist()
        assert ids == [*prompt, *answer]
        assert batch.input_ids[i][batch.response_mask[i]].tolist() == answer


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"chosen": "t1"}, "no answer under 'rejected'"),
        ({"chosen": "t1", "rejected": [1, 2]}, "no answer under 'rejected'"),
        ({"chosen": [{"role": "user", "content": "t2"}], "rejected": "t1"}, "'chosen' must end with a text by the a"),
        ({"chosen": [*ASKED, said("t5")], "rejected": "t1"}, "'chosen' does not continue the row's prompt"),
    ],
)  # fmt: skip
def test_the_file_and_line_of_an_unusable_pair_are_named(
    tmp_path: Path, bad: dict[str, Any], named: str
) -> None:
    good = {"prompt": "t3", "chosen": "t1", "rejected": "t2"}
    with pytest.raises(ValueError, match=rf"pairs\.jsonl line 2\).*{named}"):
        from_file(tmp_path, good, {"prompt": "t3", **bad})


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_held_out_pairs_count_once_in_every_pass(world: int, size: int) -> None:
    """Catches: a last batch filled up with the first prompts, a second pass that starts where the first ended."""
    loaders = [data(rank, world, prompts_per_batch=size).val_dataloader() for rank in range(world)]
    for _ in range(2):
        passes = [list(loader) for loader in loaders]
        assert {len(batches) for batches in passes} == {len(loaders[0])}, "ranks keep step"
        seen = [
            batch.prompts[i].uid
            for batches in passes
            for batch in batches
            for i in range(len(batch))
            if batch.extra["counted"][i] and batch.extra[PREFERRED][i]
        ]
        assert sorted(seen) == [row["uid"] for row in ROWS]


def test_training_goes_on_from_where_it_was() -> None:
    loader = data(prompts_per_batch=2, steps_per_epoch=4).train_dataloader()
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    resumed = data(prompts_per_batch=2, steps_per_epoch=4).train_dataloader()
    resumed.load_state_dict(state)
    rest, again = list(batches), list(resumed)
    assert [b.texts for b in rest] == [b.texts for b in again] and len(rest) == 3
    assert len({text for batch in rest for text in batch.texts}) > 5


def test_a_stage_without_a_source_is_named() -> None:
    module = data()
    module.sources["test"] = None
    with pytest.raises(ValueError, match=r"data\.test is missing"):
        module.test_dataloader()
    module.sources["val"] = None
    assert module.val_dataloader() == []
