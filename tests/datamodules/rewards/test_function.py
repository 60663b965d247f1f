"""Plain functions as rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.composite import score_all
from lightning_onpolicy.datamodules.rewards.function import FunctionReward


def group(answer: str, *texts: str) -> Group:
    completions = tuple(Completion(torch.tensor([1]), torch.zeros(1), "eos", text=t) for t in texts)
    return Group(Prompt((1,), "q", {"answer": answer}, "seven"), completions)


def test_it_sees_prompt_and_text_and_may_abstain() -> None:
    reward = FunctionReward(lambda prompt, text: None if not text else text == prompt.row["answer"])
    assert reward.score([group("a", "a", "b", ""), group("b", "b")]) == [[1.0, 0.0, None], [1.0]]
    assert isinstance(reward, Reward)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), "good", [1.0]])
def test_scores_that_are_no_numbers_name_the_prompt(value: Any) -> None:
    with pytest.raises(ValueError, match=r"returned .* for prompt 'seven': return a finite number, or None"):
        FunctionReward(lambda prompt, text: value).score([group("a", "a")])


def test_an_error_inside_says_whose_it_is() -> None:
    """Catches: "division by zero" in the middle of training, and nothing more."""
    for function, what in (
        (lambda prompt, text: 1 / 0, "division by zero"),
        (lambda text: 1.0, "positional argument"),
    ):
        with pytest.raises(
            RuntimeError, match=rf"<lambda> failed on prompt 'seven', called as f\(prompt, text\).*{what}"
        ):
            FunctionReward(function).score([group("a", "a")])


def test_what_is_no_reward_is_named() -> None:
    """Catches: "'function' object has no attribute 'score'", "object of type 'float' has no len()"."""
    with pytest.raises(ValueError, match=r"'mine' is a function.*wrap a function of"):
        score_all({"mine": lambda prompt, text: 1.0}, [group("a", "a")])  # type: ignore[dict-item]

    class Flat(Reward):
        def score(self, groups: Sequence[Group]) -> Any:
            return [1.0 for _ in groups]

    with pytest.raises(ValueError, match=r"'mine' returned \['no'\] scores per group.*one list per group"):
        score_all({"mine": Flat()}, [group("a", "a")])
