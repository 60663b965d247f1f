"""The data module of meta models: which trajectory is on which side, how often it comes, and that it can go on."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toys
from trajectories import line, lines, write

from lightning_onpolicy.datamodules.judged import PREFERRED
from lightning_onpolicy.datamodules.judging.meta import READABLE
from lightning_onpolicy.datamodules.trajectories import TrajectoryDataModule


def module(
    path: Any, *, rank: int = 0, world: int = 1, stage: str = "fit", **settings: Any
) -> TrajectoryDataModule:
    """Set up, under as much of a Trainer as it looks at."""
    data = TrajectoryDataModule(path, **{"val_fraction": 0.3, "prompts_per_batch": 4, **settings})
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        precision_plugin=SimpleNamespace(convert_input=lambda x: x),
        lightning_module=SimpleNamespace(tokenizer=toys.tokenizer()),
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world},
        limit_train_batches=1.0,
    )
    data.setup(stage)
    return data


def uids(batches: Any) -> list[str]:
    """Names of the rows that count."""
    return [
        p.uid
        for batch in batches
        for p, counted in zip(batch.prompts, batch.extra["counted"].tolist(), strict=True)
        if counted
    ]


def test_no_item_is_on_both_sides_and_more_files_move_none(tmp_path: Path) -> None:
    """Catches: a split by trajectory; one that depends on how many there are."""
    one, two = write(tmp_path / "1.jsonl", lines(40, 3)), write(tmp_path / "2.jsonl", lines(70, 2, first=20))
    before = module(one).sides
    after = module([two, one]).sides
    names = {side: {t.item.uid for t in after[side]} for side in after}
    assert not names["train"] & names["val"] and len(names["train"] | names["val"]) == 90
    for side, trajectories in before.items():
        assert {t.item.uid for t in trajectories} == names[side] & {f"i{i}" for i in range(40)}
    assert len(after["train"]) + len(after["val"]) == 40 * 3 + 70 * 2
    assert {t.item.uid for t in module(one, split_seed=1).sides["val"]} != names["val"] & {
        f"i{i}" for i in range(40)
    }
    assert [t.item.uid for t in module(one, seed=9).sides["val"]] == [t.item.uid for t in before["val"]]


def test_one_uid_in_two_sources_is_on_one_side(tmp_path: Path) -> None:
    rows = lines(30, 1) + lines(30, 1, source="other", messages=[{"role": "user", "content": "t1"}])
    sides = module(write(tmp_path / "t.jsonl", rows)).sides
    for side in sides.values():
        names = {source: {t.item.uid for t in side if t.item.source == source} for source in ("toy", "other")}
        assert names["toy"] == names["other"] != set()


def test_wrong_ones_stay_hinted_ones_go_and_unreadable_ones_are_not_validated_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = lines(30, 4)
    unread = [line(f"i{i}", 9, outcome="missing") for i in range(30)]
    hinted = [line(f"i{i}", number, hinted=True) for i in range(30) for number in (5, 6)]
    silent = [line(f"i{i}", 11, outcome="unanswered") for i in range(30)]
    path = write(tmp_path / "t.jsonl", rows + unread + hinted + silent)
    with caplog.at_level("INFO"):
        data = module(path)
    held = {t.item.uid for t in data.sides["val"]}
    assert 0 < len(held) < 30
    wrong = sum(not row["right"] for row in rows + unread if row["uid"] not in held)
    balance = data.balance["train"]
    assert balance.trajectories - balance.right == wrong > 0 and balance.unreadable == 30 - len(held)
    assert balance.trajectories == 5 * (30 - len(held))
    assert data.balance["val"].trajectories == 4 * len(held) and data.balance["val"].unreadable == 0
    assert not all(t.right for t in data.sides["val"])
    assert "90 hinted or unanswered trajectories are left out" in caplog.text
    assert f"train: {balance}" in caplog.text and f"val: {data.balance['val']}" in caplog.text
    readable = module(path, unreadable=False).balance["train"]
    assert (readable.trajectories, readable.unreadable, readable.right) == (
        4 * (30 - len(held)),
        0,
        balance.right,
    )
    batches = list(itertools.islice(data.train_dataloader(), len(data.train_dataloader())))
    assert any(not batch.extra[READABLE].all() for batch in batches)
    assert {bool(x) for batch in batches for x in batch.extra[PREFERRED]} == {True, False}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_held_out_judgement_counts_once_in_every_pass(world: int, tmp_path: Path) -> None:
    """Catches: the ragged end counted twice, ranks of unequal length, a second pass that starts elsewhere."""
    path = write(tmp_path / "t.jsonl", lines(30, 3))
    ranks = [module(path, rank=r, world=world) for r in range(world)]
    loaders: list[Any] = [data.val_dataloader() for data in ranks]
    assert len({len(loader) for loader in loaders}) == 1
    expected = sorted(f"{t.item.uid}/{i}" for i, t in enumerate(ranks[0].sides["val"]))
    assert len(expected) % (4 * world) != 0, "there is a ragged end"
    for _ in range(3):
        assert sorted(uid for loader in loaders for uid in uids(loader)) == expected


def test_a_validation_that_is_cut_short_scores_the_same_judgements_every_time(tmp_path: Path) -> None:
    """Catches: under ``limit_val_batches`` another part of the held-out judgements in every pass."""
    data = module(write(tmp_path / "t.jsonl", lines(30, 4)))
    loader: Any = data.val_dataloader()
    assert len(loader) > 4
    passes = [uids(itertools.islice(loader, 3)) for _ in range(3)]
    assert passes[0] == passes[1] == passes[2] and len(passes[0]) == 12
    assert passes[0] == [f"{t.item.uid}/{i}" for i, t in enumerate(data.sides["val"][:12])]
    batches = iter(loader)
    first = uids([next(batches)])
    other: Any = data.val_dataloader()
    other.load_state_dict(loader.state_dict())  # one that goes on in the middle of a pass does so
    every = uids(loader)
    assert first + uids(other)[: len(every) - len(first)] == every
    assert uids(other) == every


def test_training_epochs_are_permutations_that_differ(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", lines(30, 2))
    data = module(path)
    size = len(data.sides["train"])
    data = module(path, prompts_per_batch=size)
    loader = data.train_dataloader()
    assert len(loader) == 1
    epochs = [uids(loader) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(sorted(epochs[0]))} and len(
        set(epochs[0])
    ) == size
    assert epochs[0] == uids(module(path, prompts_per_batch=size).train_dataloader())
    assert epochs[0] != uids(module(path, prompts_per_batch=size, seed=1).train_dataloader())
    assert len(module(path, steps_per_epoch=7).train_dataloader()) == 7
    assert len(module(path).train_dataloader()) == -(-size // 4)


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", lines(30, 2))
    whole = module(path, steps_per_epoch=5).train_dataloader()
    expected = [b.input_ids for _ in range(3) for b in whole]
    first = module(path, steps_per_epoch=5).train_dataloader()
    got = [b.input_ids for b in first] + [b.input_ids for b in itertools.islice(first, 2)]
    second = module(path, steps_per_epoch=5).train_dataloader()
    second.load_state_dict(first.state_dict() | {"position": 2})
    got += [b.input_ids for _ in range(2) for b in second]
    assert len(got) == 15 and all(x.equal(y) for x, y in zip(got, expected, strict=True))
    more = module([path, write(tmp_path / "2.jsonl", lines(9, 1, first=50))]).train_dataloader()
    with pytest.raises(ValueError, match="source_size: saved"):
        more.load_state_dict(first.state_dict())


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    rows = lines(30, 4)
    for right in (True, False):
        path = write(tmp_path / "one_kind.jsonl", [row for row in rows if row["right"] == right])
        with pytest.raises(ValueError, match=r"right judgements from wrong ones, .*one_kind\.jsonl"):
            module(path)
        assert module(path, stage="validate").sides["val"]
    path = write(tmp_path / "t.jsonl", lines(30, 4))
    with pytest.raises(ValueError, match=r"val_fraction must be in \[0, 1\), got 1"):
        module(path, val_fraction=1)
    with pytest.raises(ValueError, match="holds out no readable judgement"):
        module(path, val_fraction=1e-6)
    everything = module(path, val_fraction=0)
    assert everything.val_dataloader() == [] and len(everything.sides["train"]) == 120
    with pytest.raises(ValueError, match=r"set data\.val_fraction above 0"):
        everything.test_dataloader()
    with pytest.raises(ValueError, match=r"max_prompt_tokens is 3"):
        next(iter(module(path, max_prompt_tokens=3).train_dataloader()))
    hinted = write(tmp_path / "hinted.jsonl", lines(30, 4, hinted=True))
    with pytest.raises(ValueError, match="0 trajectories of 0 items"):
        module(hinted)
