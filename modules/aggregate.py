"""From per-token losses to one number, always divided by the *global* count of the optimizer step."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_onpolicy.modules.losses.rows import scatter as scatter
from lightning_onpolicy.modules.outcome import Counts

Reduction = Literal["token_mean", "sequence_mean", "sum"]
PolicyReduction = Literal["token_mean", "sequence_mean", "sum", "sequence_sum", "constant"]


def aggregate(
    loss_N: Tensor,
    mask_BT: Tensor,
    counts: Counts,
    reduction: PolicyReduction,
    length: int | None = None,
) -> Tensor:
    """A micro-batch's share of the step's loss; 0 where nothing is trained.

    Args:
        loss_N: ``[N]`` per-token losses, in row-major order of ``mask_BT[:, 1:]``.
        mask_BT: ``[B, T]`` bool trained tokens.
        counts: Global counts of the step, of the same mask.
        reduction: ``token_mean``: Σ / tokens. ``sequence_mean``: Σ over sequences of their token mean / sequences.
            ``sum``: Σ (the learning rate then depends on the batch size). ``sequence_sum``: Σ / sequences.
            ``constant``: Σ / (sequences · length), Dr. GRPO's (2503.20783), which no response's own length enters.
        length: Of ``constant``: the longest response allowed, in tokens.

    Raises:
        ValueError: If ``constant`` has no length.
    """
    if reduction == "sum":
        return loss_N.sum()
    if reduction == "token_mean":
        return loss_N.sum() / (counts.tokens or 1.0)
    sequences = counts.sequences or 1.0
    if reduction == "sequence_sum":
        return loss_N.sum() / sequences
    if reduction == "constant":
        if length is None:
            raise ValueError("reduction constant needs reduction_length: the longest response, in tokens.")
        return loss_N.sum() / (sequences * length)
    per_row = mask_BT[:, 1:].sum(1)
    weight_BT = (1.0 / per_row.clamp(min=1))[:, None].expand_as(mask_BT[:, 1:])
    return (loss_N * weight_BT[mask_BT[:, 1:]].to(loss_N.dtype)).sum() / sequences
