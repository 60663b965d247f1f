"""Losses of an output head straight from hidden states: thin faces over `token_stats`, in PyTorch's manner.

Each is one call of :func:`~lightning_onpolicy.kernels.token_stats.token_stats` and a reduction: no
``[tokens, vocab]`` logits, float32 log-probabilities from half-precision operands, masked tokens never computed.
``reduction="none"`` gives per-token losses for any weighting. ``torch.nn.LinearCrossEntropyLoss`` owns its
weight; here the caller does, so that tied, sharded or frozen heads stay what they are.

Legend: ``...`` leading dimensions (tokens), ``H`` hidden size, ``V`` rows of the head.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_onpolicy.kernels.spec import TEACHER_OUTPUTS, TeacherHead
from lightning_onpolicy.kernels.tiles import DEFAULT_BUDGET_BYTES
from lightning_onpolicy.kernels.token_stats import token_stats

Reduction = Literal["mean", "sum", "none"]
Divergence = Literal[
    "reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"
]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    temperature: float | Tensor = 1.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of ``hidden @ weightᵀ``, for targets that are ids.

    As there, the mean is over the targets that are not ignored, and the mean of nothing is NaN with zero
    gradient: use ``"sum"`` and your own count where a micro-batch may hold no target. There is neither label
    smoothing nor class weights.

    Args:
        hidden: ``[..., H]`` last hidden states, after the final norm; floating point.
        weight: ``[V, H]`` output head.
        targets: ``[...]`` int64 ids.
        bias: ``[V]``, added after the scale.
        ignore_index: Target of tokens that are left out and never computed: their loss is 0. Counting the others
            waits for the device. None: every target counts, and nothing waits.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        z_loss: Weight of the squared log-sum-exp that is added per token (PaLM, 2204.02311, §5).
        temperature: Positive float or ``[...]`` tensor that divides the logits; gets no gradient.
        soft_cap: Final logit soft-cap, or None.
        logit_scale: Factor on the product.
        vocab_size: True vocabulary size; later rows of ``weight`` are padding with probability 0.
        budget_bytes: Bytes of logits the call may hold; see ``token_stats``.

    Returns:
        Scalar, or ``[...]`` for ``"none"``: float32 (float64 where ``hidden`` is).

    Raises:
        ValueError: If a shape, dtype or range is wrong; the message names the argument.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(50, 8, requires_grad=True)
        >>> targets = torch.randint(0, 50, (2, 5))
        >>> targets[:, :2] = -100  # the prompt
        >>> loss = linear_cross_entropy(hidden, weight, targets)
        >>> want = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
        >>> torch.allclose(loss, want)
        True
    """
    _check_reduction(reduction)
    if z_loss < 0:
        raise ValueError(f"z_loss must be >= 0, got {z_loss}.")
    shape = hidden.shape[:-1]
    targets_N = _rows("targets", targets, shape)
    mask_N = None if ignore_index is None else targets_N != ignore_index
    stats = token_stats(
        _flat(hidden),
        weight,
        targets_N,
        outputs=("logp", "lse") if z_loss else ("logp",),
        bias=bias,
        mask=mask_N,
        temperature=_temperature(temperature, shape),
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        budget_bytes=budget_bytes,
    )
    loss_N = -stats.logp
    if z_loss:
        loss_N = loss_N + z_loss * stats.lse.square()
    return _reduce(loss_N, mask_N, reduction, shape)


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: Divergence = "reverse_kl",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    beta: float = 0.5,
    alpha: float = 0.1,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
) -> Tensor:
    """Divergence between the next-token distributions of a student p and a frozen teacher q, over the full
    vocabulary.

    No factor T² is applied: multiply by it yourself where gradients of several temperatures are to compare.
    The mean of nothing is NaN with zero gradient, as in :func:`linear_cross_entropy`.

    Args:
        hidden: ``[..., H]`` student's last hidden states.
        weight: ``[V, H]`` student's output head.
        teacher_hidden: ``[..., Ht]`` teacher's last hidden states of the same tokens; gets no gradient.
        teacher_weight: ``[V2, Ht]`` teacher's output head; gets no gradient.
        divergence: ``"reverse_kl"`` KL(p || q), ``"forward_kl"`` KL(q || p), ``"jsd"``, ``"skew_forward_kl"``,
            ``"skew_reverse_kl"`` or ``"total_variation"``, as defined in ``token_stats``.
        mask: ``[...]`` bool, tokens that count; the others are never computed and their loss is 0. Counting them
            waits for the device. None: all.
        reduction: ``"mean"`` over the tokens that count, ``"sum"`` or ``"none"``.
        bias: ``[V]`` student's bias.
        teacher_bias: ``[V2]`` teacher's bias.
        temperature: Positive float or ``[...]`` tensor that divides both logits; gets no gradient.
        soft_cap: Student's final logit soft-cap, or None.
        teacher_soft_cap: Teacher's, or None.
        logit_scale: Factor on the student's product.
        teacher_logit_scale: Factor on the teacher's.
        vocab_size: True size of the vocabulary both share; later rows of either head are padding. Needed where
            the heads are padded to different sizes.
        beta: Teacher share of the JSD mixture, in (0, 1).
        alpha: Share of the first argument in the skew KLs' mixture, in (0, 1).
        budget_bytes: Bytes of logits the call may hold; see ``token_stats``.

    Returns:
        Scalar, or ``[...]`` for ``"none"``: float32 (float64 where ``hidden`` is).

    Raises:
        ValueError: If a shape, dtype, name or range is wrong; the message names the argument.

    Example:
        >>> student, teacher = torch.nn.Linear(8, 50, bias=False), torch.nn.Linear(16, 52, bias=False)
        >>> hidden, teacher_hidden = torch.randn(2, 5, 8), torch.randn(2, 5, 16)
        >>> loss = linear_distillation(
        ...     hidden, student.weight, teacher_hidden, teacher.weight, divergence="jsd", vocab_size=50
        ... )
        >>> loss.backward()
        >>> teacher.weight.grad is None
        True
    """
    _check_reduction(reduction)
    if divergence not in TEACHER_OUTPUTS:
        raise ValueError(f"divergence must be one of {', '.join(TEACHER_OUTPUTS)}; got {divergence!r}.")
    shape = hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            f"teacher_hidden has leading dimensions {list(teacher_hidden.shape[:-1])}; hidden has {list(shape)}."
        )
    mask_N = None if mask is None else _rows("mask", mask, shape)
    stats = token_stats(
        _flat(hidden),
        weight,
        outputs=(divergence,),
        bias=bias,
        mask=mask_N,
        teacher=TeacherHead(
            _flat(teacher_hidden),
            teacher_weight,
            teacher_bias,
            soft_cap=teacher_soft_cap,
            logit_scale=teacher_logit_scale,
        ),
        temperature=_temperature(temperature, shape),
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        beta=beta,
        alpha=alpha,
        budget_bytes=budget_bytes,
    )
    return _reduce(stats[divergence], mask_N, reduction, shape)


def _flat(hidden: Tensor) -> Tensor:
    # Not reshape(-1, …), which cannot infer a size where another is 0.
    return hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])


def _rows(name: str, x: Tensor, shape: torch.Size) -> Tensor:
    if x.shape != shape:
        raise ValueError(
            f"{name} must have the leading dimensions of hidden, {list(shape)}; has {list(x.shape)}."
        )
    return x.reshape(math.prod(shape))


def _temperature(temperature: float | Tensor, shape: torch.Size) -> float | Tensor:
    if isinstance(temperature, Tensor):
        return _rows("temperature", temperature, shape)
    return temperature


def _check_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}; got {reduction!r}.")


def _reduce(loss_N: Tensor, mask_N: Tensor | None, reduction: Reduction, shape: torch.Size) -> Tensor:
    """Masked rows are 0 already."""
    if reduction == "none":
        return loss_N.reshape(shape)
    if reduction == "sum":
        return loss_N.sum()
    return loss_N.mean() if mask_N is None else loss_N.sum() / mask_N.sum()
