"""From per-token losses to one number, always divided by the *global* count of the optimizer step."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_onpolicy.modules.outcome import Counts

Reduction = Literal["token_mean", "sequence_mean", "sum"]


def scatter(value_N: Tensor, mask_BT: Tensor) -> Tensor:
    """``[N]`` values of the graded tokens back at their places, 0 elsewhere: ``[B, T]``.

    Args:
        value_N: In row-major order of ``mask_BT[:, 1:]``.
        mask_BT: ``[B, T]`` bool; position 0 is never graded.
    """
    out = value_N.new_zeros(mask_BT.shape)
    out[:, 1:] = out[:, 1:].masked_scatter(mask_BT[:, 1:], value_N)
    return out


def aggregate(loss_N: Tensor, mask_BT: Tensor, counts: Counts, reduction: Reduction) -> Tensor:
    """A micro-batch's share of the step's loss.

    Args:
        loss_N: ``[N]`` per-token losses, in row-major order of ``mask_BT[:, 1:]``.
        mask_BT: ``[B, T]`` bool trained tokens.
        counts: Global counts of the step.
        reduction: ``token_mean``: Σ / tokens. ``sequence_mean``: Σ over sequences of their token mean / sequences.
            ``sum``: Σ (the learning rate then depends on the batch size).
    """
    if reduction == "sum":
        return loss_N.sum()
    if reduction == "token_mean":
        return loss_N.sum() / counts.tokens
    per_row = mask_BT[:, 1:].sum(1)
    weight_BT = (1.0 / per_row.clamp(min=1))[:, None].expand_as(mask_BT[:, 1:])
    return (loss_N * weight_BT[mask_BT[:, 1:]].to(loss_N.dtype)).sum() / counts.sequences
