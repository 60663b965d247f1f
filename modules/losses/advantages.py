"""What a response, or a token, was worth: advantages.

| kind | A | source |
|---|---|---|
| group_zscore | (R − m) / (s + eps) | GRPO, 2402.03300 |
| mean_centred | R − m | Dr. GRPO, 2503.20783 |
| leave_one_out | R_i − mean_{j≠i} R = G/(G − 1) · (R − m) | RLOO, 2402.14740 |
| reinforce_pp_baseline | R̃ = R − m, then (R̃ − mean R̃) / (std R̃ + eps) over the batch | 2501.03262; ProRL v2 |
| gae | Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t | PPO, 1506.02438 |

Legend: ``B`` sequences, ``T`` positions; R reward, m and s mean and standard deviation of a group's scored rewards, G
their number. ``reward_B`` is NaN where a response could not be scored: such a row takes no part in any mean or
deviation and its advantage is 0; it never counts as a reward of 0.

Departures: a group without a signal (one scored response, or all equal by max == min, where a deviation of 1e-8 would
be noise blown up) has advantage exactly 0, and takes no part in the moments of ``reinforce_pp_baseline``: the result
is the same whether or not a group filter dropped it before. Batch moments are population ones.
Groups are whole on their rank; they are computed on the CPU in float64, where sums have one order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.settings import AdvantageSpec, Std

Reduce = Callable[[Tensor, str], Tensor]  # (tensor, "sum" | "max") → the same over ranks


def alone(value: Tensor, op: str) -> Tensor:
    """The :data:`Reduce` of a single process."""
    return value


@dataclass(frozen=True)
class Groups:
    """Per-row statistics of the row's group, float64 on the CPU.

    Args:
        reward_B: Rewards, 0 where not scored.
        mean_B: m; 0 in a group without a scored row.
        count_B: G, scored rows.
        signal_B: bool; the row is scored and its group has two scored rewards that differ.
        index_B: int64 number of the row's group, from 0.
    """

    reward_B: Tensor
    mean_B: Tensor
    count_B: Tensor
    signal_B: Tensor
    index_B: Tensor

    @classmethod
    def of(cls, reward_B: Tensor, group_B: Tensor) -> Groups:
        """From rewards (NaN = not scored) and group numbers of any order."""
        if reward_B.shape != group_B.shape or reward_B.ndim != 1:
            raise ValueError(
                f"reward_B and group_B must be [B], got {tuple(reward_B.shape)} and {tuple(group_B.shape)}."
            )
        reward_B = reward_B.detach().cpu().double()
        names, index_B = torch.unique(group_B.detach().cpu(), return_inverse=True)
        scored_B = ~reward_B.isnan()
        nothing = torch.zeros(len(names), dtype=torch.float64)
        count = nothing.index_add(0, index_B, scored_B.double())
        known_B = torch.where(scored_B, reward_B, 0.0)
        mean = nothing.index_add(0, index_B, known_B) / count.clamp(min=1)
        low, high = nothing.clone(), nothing.clone()
        inf = float("inf")
        low.scatter_reduce_(0, index_B, torch.where(scored_B, reward_B, inf), "amin", include_self=False)
        high.scatter_reduce_(0, index_B, torch.where(scored_B, reward_B, -inf), "amax", include_self=False)
        return cls(known_B, mean[index_B], count[index_B], scored_B & (low < high)[index_B], index_B)

    def centred(self) -> Tensor:
        """``[B]`` R − m; exactly 0 without a signal."""
        return torch.where(self.signal_B, self.reward_B - self.mean_B, 0.0)

    def std(self, kind: Std) -> Tensor:
        """``[B]`` s of the row's group; 0 without a signal."""
        groups = torch.zeros(int(self.index_B.max()) + 1 if len(self.index_B) else 0, dtype=torch.float64)
        square = groups.index_add(0, self.index_B, self.centred() ** 2)[self.index_B]
        divisor = self.count_B - (1 if kind == "bessel" else 0)
        return (square / divisor.clamp(min=1)).sqrt()


def group_zscore(reward_B: Tensor, group_B: Tensor, *, std: Std = "bessel", eps: float = 1e-6) -> Tensor:
    """``[B]`` (R − m) / (s + eps).

    Args:
        reward_B: ``[B]`` rewards; NaN = not scored.
        group_B: ``[B]`` group numbers.
        std: ``bessel`` divides by G − 1, as ``torch.std`` does and with it TRL (eps 1e-4), verl (1e-6) and OpenRLHF
            (1e-9); ``population`` by G, so that binary rewards with accuracy a give √((1−a)/a) and −√(a/(1−a)).
            The paper does not say. Bessel's is smaller by √((G−1)/G).
        eps: Added to s; 0 is safe here.
    """
    groups = Groups.of(reward_B, group_B)
    z = groups.centred() / (groups.std(std) + eps)
    return torch.where(groups.signal_B, z, 0.0).to(reward_B)


def mean_centred(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """``[B]`` R − m (arguments as in :func:`group_zscore`)."""
    return Groups.of(reward_B, group_B).centred().to(reward_B)


def leave_one_out(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """``[B]`` R − the mean of the group's other scored rewards (arguments as in :func:`group_zscore`)."""
    groups = Groups.of(reward_B, group_B)
    return (groups.centred() * groups.count_B / (groups.count_B - 1).clamp(min=1)).to(reward_B)


def reinforce_pp_baseline(
    reward_B: Tensor,
    group_B: Tensor,
    *,
    weight_B: Tensor | None = None,
    eps: float = 1e-6,
    reduce: Reduce = alone,
) -> Tensor:
    """``[B]`` R − m, whitened over the whole batch.

    Args:
        reward_B: ``[B]`` rewards; NaN = not scored.
        group_B: ``[B]`` group numbers.
        weight_B: ``[B]`` weight of each row in the batch moments: its number of trained tokens whitens over tokens;
            None, each row once.
        eps: Added to the batch's standard deviation.
        reduce: Sums over ranks. It is called twice on every rank, whatever the rewards.
    """
    groups = Groups.of(reward_B, group_B)
    weight = torch.ones_like(groups.reward_B) if weight_B is None else weight_B.detach().cpu().double()
    weight = torch.where(groups.signal_B, weight, 0.0)
    centred = groups.centred()
    total, moment = reduce(torch.stack([weight.sum(), (weight * centred).sum()]), "sum").unbind()
    mean = moment / total.clamp(min=1e-300)
    square = reduce((weight * (centred - mean) ** 2).sum()[None], "sum")[0]
    std = (square / total.clamp(min=1e-300)).sqrt()
    white = (centred - mean) / (std + eps)
    return torch.where(groups.signal_B, white, 0.0).to(reward_B)


def advantages(
    spec: AdvantageSpec, reward_B: Tensor, group_B: Tensor, tokens_B: Tensor, reduce: Reduce = alone
) -> Tensor:
    """``[B]`` advantages of the kind asked for.

    Args:
        spec: Kind and its settings.
        reward_B: ``[B]`` rewards; NaN = not scored.
        group_B: ``[B]`` group numbers.
        tokens_B: ``[B]`` trained tokens per row.
        reduce: Sums over ranks.

    Raises:
        ValueError: For ``gae``, which needs values: :func:`~lightning_onpolicy.modules.losses.critic.gae`.
    """
    if spec.kind == "gae":
        raise ValueError("advantage.kind gae has an advantage per token, from values: losses.critic.gae.")
    if spec.kind == "group_zscore":
        return group_zscore(reward_B, group_B, std=spec.std, eps=spec.eps)
    if spec.kind == "mean_centred":
        return mean_centred(reward_B, group_B)
    if spec.kind == "leave_one_out":
        return leave_one_out(reward_B, group_B)
    weight_B = tokens_B if spec.whiten == "token" else None
    return reinforce_pp_baseline(reward_B, group_B, weight_B=weight_B, eps=spec.eps, reduce=reduce)


def group_summary(
    reward_B: Tensor, group_B: Tensor, correct: float = 1.0 - 1e-6, graded_B: Tensor | None = None
) -> dict[str, Tensor]:
    """What the groups say about the data, as values to take the mean of.

    Args:
        reward_B: ``[B]`` rewards; NaN = not scored.
        group_B: ``[B]`` group numbers.
        correct: A response is correct if it is graded at least this.
        graded_B: ``[B]`` what says whether a response is correct; default: the rewards.

    Returns:
        ``pass_rate`` per scored row; per group with two scored rows or more ``constant_groups`` (1 if it teaches
        nothing), ``solved_groups`` (1 if all are correct) and ``group_std`` (population).
    """
    groups = Groups.of(reward_B, group_B)
    scored = ~reward_B.detach().cpu().isnan()
    right = scored & ((groups.reward_B if graded_B is None else graded_B.detach().cpu()) >= correct)
    # One row stands for each group: its first scored one.
    order = torch.arange(len(scored))
    first = torch.full((int(groups.index_B.max()) + 1 if len(scored) else 0,), len(scored))
    first.scatter_reduce_(0, groups.index_B[scored], order[scored], "amin")
    rows = first[first < len(scored)]
    rows = rows[groups.count_B[rows] > 1]
    hits = torch.zeros(len(first), dtype=torch.float64).index_add(0, groups.index_B, right.double())
    return {
        "pass_rate": right[scored].double(),
        "constant_groups": (~groups.signal_B[rows]).double(),
        "solved_groups": (hits[groups.index_B[rows]] == groups.count_B[rows]).double(),
        "group_std": groups.std("population")[rows],
    }
