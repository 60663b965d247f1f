"""From a discriminator's scores to the generator's rewards: weight, bound, length, and what verifiers say.

Legend: ``B`` sampled rows. NaN: not scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.advantages import Reduce, alone
from lightning_onpolicy.modules.losses.score_rewards import clamped_reward, debiased_reward


@dataclass(frozen=True)
class AdversarialReward:
    """What the generator is paid for.

    Args:
        weight: Of the discriminator's score.
        task: Of the data module's own reward (verifiers); 0 leaves it a metric.
        bound: Largest distance of a score from the teacher's mean score for that prompt; null leaves scores alone.
        clip: Largest absolute reward, after adding up; null leaves it.
        debias: Take off what a line on length explains within groups (merit that comes with length goes too).

    Raises:
        ValueError: If a number is out of range.
    """

    weight: float = 1.0
    task: float = 0.0
    bound: float | None = None
    clip: float | None = None
    debias: bool = False

    def __post_init__(self) -> None:
        if self.weight < 0 or self.task < 0 or self.weight + self.task == 0:
            raise ValueError(
                f"reward.weight and reward.task must be >= 0 and not both 0, got {self.weight} and {self.task}."
            )
        for key in ("bound", "clip"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"reward.{key} must be positive or null, got {value}.")


def adversarial_reward(
    spec: AdversarialReward,
    score_B: Tensor,
    teacher_B: Tensor,
    task_B: Tensor,
    length_B: Tensor,
    group_B: Tensor,
    reduce: Reduce = alone,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``[B]`` rewards and metrics.

    Args:
        spec: What counts.
        score_B: Scores of the sampled rows, from the discriminator before its update on them.
        teacher_B: Mean score of the teacher's answers to each row's prompt.
        task_B: The verifiers' total.
        length_B: Tokens of the responses.
        group_B: Group numbers.
        reduce: Sums over ranks.
    """
    means: dict[str, Tensor] = {}
    reward_B = score_B.detach()
    if spec.bound is not None:
        reward_B, means = clamped_reward(score_B, spec.bound, teacher_B)
    if spec.debias:
        reward_B, slope = debiased_reward(reward_B, length_B, group_B, reduce=reduce)
        means["length_slope"] = slope[None]
    reward_B = spec.weight * reward_B
    if spec.task:
        reward_B = reward_B + spec.task * task_B
    if spec.clip is not None:
        reward_B = reward_B.clamp(-spec.clip, spec.clip)
    return reward_B.to(torch.float32), means
