"""Plain functions as rewards."""

from __future__ import annotations

import pytest
import torch

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.function import FunctionReward


def group(answer: str, *texts: str) -> Group:
    completions = tuple(Completion(torch.tensor([1]), torch.zeros(1), "eos", text=t) for t in texts)
    return Group(Prompt((1,), "q", {"answer": answer}, "seven"), completions)


def test_it_sees_prompt_and_text_and_may_abstain() -> None:
    reward = FunctionReward(lambda prompt, text: None if not text else text == prompt.row["answer"])
    assert reward.score([group("a", "a", "b", ""), group("b", "b")]) == [[1.0, 0.0, None], [1.0]]
    assert isinstance(reward, Reward)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_scores_that_are_no_numbers_name_the_prompt(value: float) -> None:
    with pytest.raises(ValueError, match=r"'seven'; return None"):
        FunctionReward(lambda prompt, text: value).score([group("a", "a")])
