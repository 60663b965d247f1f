"""PPO's critic: generalised advantages from values, and the value loss.

Legend: ``B`` sequences, ``T`` positions, ``N`` trained tokens in row-major order of ``mask_BT[:, 1:]``. The value at
position t is that of the state *before* token t; γ and λ count trained tokens, not positions, so that observations
between two of them do not discount.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.advantages import Reduce, alone


def gae(
    reward_BT: Tensor,
    value_BT: Tensor,
    mask_BT: Tensor,
    bootstrap_B: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (1506.02438, eq. 16); with γ = λ = 1 and no critic, the reward to go.

    Args:
        reward_BT: ``[B, T]`` rewards of single tokens; an outcome reward sits on the last trained token. A row with a
            NaN in the mask could not be scored: its advantages are 0 and its returns are its values, so that neither
            loss moves it.
        value_BT: ``[B, T]`` values, ignored outside the mask, NaN included.
        mask_BT: ``[B, T]`` bool trained tokens.
        bootstrap_B: ``[B]`` value of the state after the last token: 0 where the response ended by itself; where it
            was cut, the critic's value there if the cut is no fault of the response, or 0 if it is to count as failed.
        gamma: Discount, in [0, 1].
        lam: λ, in [0, 1].

    Returns:
        ``[B, T]`` advantages and returns (advantage + value), both 0 outside the mask.
    """
    unscored_B = (reward_BT.isnan() & mask_BT).any(1)
    reward_BT = torch.where(mask_BT & ~unscored_B[:, None], reward_BT, 0.0)
    value_BT = torch.where(mask_BT, value_BT, 0.0)
    advantage_BT = torch.zeros_like(value_BT)
    following_B, running_B = bootstrap_B.to(value_BT), torch.zeros_like(value_BT[:, 0])
    for t in range(value_BT.shape[1] - 1, -1, -1):
        delta_B = reward_BT[:, t] + gamma * following_B - value_BT[:, t]
        inside_B = mask_BT[:, t]
        running_B = torch.where(inside_B, delta_B + gamma * lam * running_B, running_B)
        following_B = torch.where(inside_B, value_BT[:, t], following_B)
        advantage_BT[:, t] = torch.where(inside_B & ~unscored_B, running_B, 0.0)
    return advantage_BT, advantage_BT + value_BT


def whiten(advantage_BT: Tensor, mask_BT: Tensor, eps: float = 1e-6, reduce: Reduce = alone) -> Tensor:
    """``[B, T]`` (A − mean A) / (std A + eps) over the mask and all ranks, population moments; 0 outside.

    Args:
        advantage_BT: ``[B, T]``.
        mask_BT: ``[B, T]`` bool: trained tokens of scored rows.
        eps: Added to the standard deviation.
        reduce: Sums over ranks. It is called twice on every rank.
    """
    known_N = advantage_BT[mask_BT].detach().double()
    total, moment = reduce(
        torch.stack([known_N.new_tensor(float(len(known_N))), known_N.sum()]), "sum"
    ).unbind()
    mean = moment / total.clamp(min=1)
    square = reduce(((known_N - mean) ** 2).sum()[None], "sum")[0]
    white_BT = (advantage_BT.double() - mean) / ((square / total.clamp(min=1)).sqrt() + eps)
    return torch.where(mask_BT, white_BT, 0.0).to(advantage_BT)


def value_loss(
    value_N: Tensor, value_old_N: Tensor, return_N: Tensor, clip: float | None = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped squared error: ½ max((V − R)², (V_old + clip(V − V_old) − R)²).

    Args:
        value_N: ``[N]`` values, with gradient.
        value_old_N: ``[N]`` values when the rollout was graded.
        return_N: ``[N]`` returns.
        clip: Largest move of a value that still pays; None leaves it.

    Returns:
        ``[N]`` loss; metrics ``value_clipped`` (1 where the gradient is cut) and ``value``.
    """
    error_N = (value_N - return_N) ** 2
    cut_N = torch.zeros_like(error_N)
    if clip is not None:
        near_N = value_old_N + (value_N - value_old_N).clamp(-clip, clip)
        other_N = (near_N - return_N) ** 2
        cut_N = ((other_N > error_N) & ((value_N - value_old_N).abs() > clip)).to(error_N)
        error_N = torch.maximum(error_N, other_N)
    return 0.5 * error_N, {"value_clipped": cut_N.detach(), "value": value_N.detach()}
