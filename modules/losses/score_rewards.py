"""From scores to rewards: what the student of generative adversarial distillation (GAD) maximises.

The paper's reward is the score itself, sg(s_p) (2511.10643). Two options stand between it and the advantages, both off
by default: a clamp (2604.28123 has ±10) and the removal of what length explains, the artefact that discriminators of
text fall for most.

Legend: ``B`` student rows, ``R`` teacher rows, ``A`` student rows that have a pair; sg = stop-gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.advantages import Groups, Reduce, alone
from lightning_onpolicy.modules.losses.adversarial import Loss, Pairs, wide


def teacher_mean(teacher_R: Tensor, pairs: Pairs, rows: int) -> Tensor:
    """``[B]`` mean score of the teacher's answers to each student row's prompt; NaN on rows without a pair.

    Args:
        teacher_R: ``[R]`` scores.
        pairs: What is compared.
        rows: B.
    """
    mean_A = pairs.per_row(wide(teacher_R.detach())[pairs.teacher_C])
    return mean_A.new_full((rows,), float("nan")).index_copy(0, pairs.row_A, mean_A)


def clamped_reward(score_B: Tensor, bound: float, centre_B: Tensor | None = None) -> Loss:
    """``[B]`` sg(s) − centre within ±bound: a score that ran away moves the student no further than the bound.

    Args:
        score_B: ``[B]`` scores; NaN (not scored) stays NaN.
        bound: Largest absolute reward.
        centre_B: ``[B]`` what is 0, such as :func:`teacher_mean`. None clamps the score itself, which Bradley–Terry
            leaves free by c(x): with a ``score_penalty`` or ``cross_entropy`` only does that say anything.

    Returns:
        Rewards; metric ``reward_clamped`` over scored rows: 1 where the bound acts. A group clamped as a whole has
        equal rewards and teaches nothing.
    """
    reward_B = wide(score_B.detach())
    if centre_B is not None:
        reward_B = reward_B - centre_B
    known_B = reward_B[~reward_B.isnan()]
    return reward_B.clamp(-bound, bound), {"reward_clamped": (known_B.abs() > bound).to(known_B)}


def debiased_reward(
    reward_B: Tensor, length_B: Tensor, group_B: Tensor, *, reduce: Reduce = alone
) -> tuple[Tensor, Tensor]:
    """Rewards less what a least-squares line on length explains within groups.

    The line is one for the whole batch, so that the eight rewards of a group are not fitted by a line of their own; its
    slope times the distance to the group's mean length comes off. What is left has no linear relation to length: a bias
    is gone, and so is whatever merit came with length.

    Args:
        reward_B: ``[B]`` rewards; NaN = not scored. Groups whose rewards are all equal are left as they are.
        length_B: ``[B]`` lengths, or their logarithms.
        group_B: ``[B]`` group numbers.
        reduce: Sums over ranks; called once on every rank, whatever the rewards.

    Returns:
        Rewards ``[B]``, and the slope: reward per unit of length.
    """
    rewards = Groups.of(reward_B, group_B)
    lengths = Groups.of(torch.where(reward_B.isnan(), float("nan"), length_B.double()), group_B)
    spread_B = torch.where(rewards.signal_B, lengths.centred(), 0.0)
    sums = torch.stack([(rewards.centred() * spread_B).sum(), (spread_B**2).sum()])
    cross, square = reduce(sums, "sum").unbind()
    slope = torch.where(square > 0, cross / square.clamp(min=1e-300), 0.0)
    return reward_B - (slope * spread_B).to(reward_B), slope
