"""RolloutBatch and Sampling keep their contracts."""

from __future__ import annotations

import pytest
import torch
import toys

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, Sampling, collate


def completion(ids: list[int], finish: str = "eos") -> Completion:
    return Completion(torch.tensor(ids), -torch.arange(1.0, len(ids) + 1), finish)  # type: ignore[arg-type]


def test_collate_places_every_value_at_its_own_token() -> None:
    groups = [
        Group(Prompt((1, 2, 3), "a", uid="a"), (completion([4, 5]), completion([6], "length"))),
        Group(Prompt((7,), "b", uid="b"), (completion([8, 9, 10]),), on_policy=False),
    ]
    b = collate(groups, pad_id=0, rewards=[[1.0, None], [0.5]], reward_parts={"x": [[1, 0], [None]]})
    assert b.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0], [7, 8, 9, 10, 0]]
    assert b.response_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 1, 1, 1, 0]]
    assert b.attention_mask.int().tolist() == [[1] * 5, [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert b.sampler_logprobs.tolist() == [[0, 0, 0, -1, -2], [0, 0, 0, -1, 0], [0, -1, -2, -3, 0]]
    assert b.finished.tolist() == [True, False, True]
    assert b.group.tolist() == [0, 0, 1]
    assert b.policy_version.tolist() == [0, 0, -1]
    assert b.rewards[0] == 1.0
    assert b.rewards[1].isnan()
    assert b.reward_parts["x"][2].isnan()
    assert [p.uid for p in b.prompts] == ["a", "a", "b"]


def test_finished_comes_from_the_engine_not_from_the_last_token() -> None:
    """A response cut right after something that equals EOS is not finished; pad == eos changes nothing."""
    eos = 9
    groups = [Group(Prompt((1,), "a"), (completion([3, eos], "length"), completion([eos], "eos")))]
    b = collate(groups, pad_id=eos)
    assert b.finished.tolist() == [False, True]
    assert b.response_lengths.tolist() == [2, 1]


def test_collate_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="empty batch"):
        collate([], pad_id=0)
    group = Group(Prompt((1,), "a"), (completion([2]),))
    with pytest.raises(ValueError, match=r"rewards has \[2\] scores"):
        collate([group], pad_id=0, rewards=[[1.0, 2.0]])


def test_select_reorders_trims_and_slices_extras() -> None:
    b = toys.batch(0, groups=4, size=2)
    b = b.with_extra(score=torch.arange(8.0), per_token=torch.arange(8.0)[:, None].expand(b.input_ids.shape))
    part = b.select([5, 0])
    assert part.extra["score"].tolist() == [5.0, 0.0]
    assert part.texts == (b.texts[5], b.texts[0])
    assert part.input_ids.shape[1] == int(b.lengths[[5, 0]].max())
    assert part.extra["per_token"].shape == part.input_ids.shape
    with pytest.raises(ValueError, match="first dimension"):
        b.with_extra(bad=torch.zeros(3))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", -2),
        ("min_p", 1),
        ("max_new_tokens", 0),
        ("min_new_tokens", 999),
    ],
)
def test_sampling_names_the_key_that_is_wrong(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"sampling.{key} must be"):
        Sampling(**{key: value})  # type: ignore[arg-type]
