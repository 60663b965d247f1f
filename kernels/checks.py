"""Validation of `token_stats` arguments: every message names the argument and says what it must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_onpolicy.kernels.spec import OUTPUTS, TEACHER_OUTPUTS, TOPK_OUTPUTS, TeacherHead, TopK


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    outputs: Sequence[str],
    bias: Tensor | None,
    temperature: float | Tensor,
    soft_cap: float | None,
    logit_scale: float,
    vocab_size: int | None,
    ids: Tensor | None,
    teacher: TeacherHead | None,
    topk: TopK | None,
    mask: Tensor | None,
    beta: float,
    alpha: float,
    budget_bytes: int,
    sharded: bool = False,
) -> int:
    """Check everything that can be checked without reading a tensor.

    The arguments are those of ``token_stats``; ``sharded`` says that the heads are one rank's rows, of which
    there may be none in the true vocabulary.

    Returns:
        The true vocabulary size.

    Raises:
        ValueError: See :func:`~lightning_onpolicy.kernels.token_stats.token_stats`.
    """
    _names(outputs, targets, ids, teacher, topk)
    _matrix("hidden", hidden, (None, None))
    N, H = hidden.shape
    least = 0 if sharded else 1
    size = _head("", weight, bias, vocab_size, H, hidden, least)
    _ids("targets", targets, (N,), hidden)
    _ids("ids", ids, (N, None), hidden)
    if mask is not None:
        if mask.shape != (N,) or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool [N={N}], is {mask.dtype} {list(mask.shape)}.")
        _same_device("mask", mask, hidden)
    if topk is not None:
        _ids("topk.ids", topk.ids, (N, None), hidden)
        if topk.logps.shape != topk.ids.shape:
            raise ValueError(
                f"topk.logps has shape {tuple(topk.logps.shape)}; topk.ids has {tuple(topk.ids.shape)}."
            )
    if teacher is not None:
        _matrix("teacher.hidden", teacher.hidden, (N, None))
        _same_device("teacher.hidden", teacher.hidden, hidden)
        teacher_size = _head(
            "teacher.",
            teacher.weight,
            teacher.bias,
            teacher.vocab_size,
            teacher.hidden.shape[1],
            hidden,
            least,
        )
        if vocab_size is not None and teacher.vocab_size is None:
            teacher_size = min(teacher_size, vocab_size)
        if teacher_size != size:
            raise ValueError(
                f"student and teacher must share one vocabulary: sizes are {size} and {teacher_size}. "
                "If a head is padded, pass the true size as vocab_size."
            )
    _positive("soft_cap", soft_cap)
    _positive("teacher.soft_cap", None if teacher is None else teacher.soft_cap)
    if logit_scale == 0:
        raise ValueError("logit_scale must not be 0.")
    if isinstance(temperature, Tensor):
        if temperature.shape != (N,):
            raise ValueError(f"temperature must be a float or [N={N}], has shape {tuple(temperature.shape)}.")
        if temperature.requires_grad:
            raise ValueError("temperature gets no gradient; pass temperature.detach().")
        _same_device("temperature", temperature, hidden)
    else:
        _positive("temperature", temperature)
    for name, share in (("beta", beta), ("alpha", alpha)):
        if not 0 < share < 1:
            raise ValueError(
                f"{name} must be in (0, 1), got {share}; its limits are reverse_kl and forward_kl."
            )
    if budget_bytes < 0:
        raise ValueError(f"budget_bytes must be >= 0, got {budget_bytes}.")
    return size


def _names(
    outputs: Sequence[str],
    targets: Tensor | None,
    ids: Tensor | None,
    teacher: TeacherHead | None,
    topk: TopK | None,
) -> None:
    if isinstance(outputs, str) or len(outputs) == 0:
        raise ValueError(f"outputs must be a non-empty sequence of names, got {outputs!r}.")
    missing = (
        ("targets", targets is None, ("logp",)),
        ("ids", ids is None, ("logp_at_ids",)),
        ("teacher", teacher is None, TEACHER_OUTPUTS),
        ("topk", topk is None, TOPK_OUTPUTS),
    )
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"outputs has {name!r}; it accepts {', '.join(OUTPUTS)}.")
        for argument, absent, users in missing:
            if absent and name in users:
                raise ValueError(f"output {name!r} needs the argument {argument!r}.")


def _head(
    prefix: str,
    weight: Tensor,
    bias: Tensor | None,
    vocab_size: int | None,
    width: int,
    hidden: Tensor,
    least: int,
) -> int:
    _matrix(f"{prefix}weight", weight, (None, width))
    _same_device(f"{prefix}weight", weight, hidden)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{prefix}bias must be [V={weight.shape[0]}], has shape {tuple(bias.shape)}.")
        _same_device(f"{prefix}bias", bias, hidden)
    if vocab_size is None:
        return weight.shape[0]
    if not least <= vocab_size <= weight.shape[0]:
        raise ValueError(f"{prefix}vocab_size must be in [{least}, V={weight.shape[0]}], got {vocab_size}.")
    return vocab_size


def _matrix(name: str, x: Tensor, shape: tuple[int | None, int | None]) -> None:
    if x.ndim != 2 or any(want not in (None, got) for want, got in zip(shape, x.shape, strict=True)):
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} must be a [{want}] matrix, has shape {tuple(x.shape)}; flatten batch and time."
        )
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, is {x.dtype}.")


def _ids(name: str, x: Tensor | None, shape: tuple[int | None, ...], hidden: Tensor) -> None:
    if x is None:
        return
    if x.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, x.shape, strict=True)):
        want = ", ".join("K" if size is None else f"N={size}" for size in shape)
        raise ValueError(f"{name} must have shape [{want}], has {tuple(x.shape)}.")
    if x.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, is {x.dtype}.")
    _same_device(name, x, hidden)


def _same_device(name: str, x: Tensor, hidden: Tensor) -> None:
    if x.device != hidden.device:
        raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}; move it there.")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}.")
