"""The custom ops behind `token_stats`: schemas, fakes and autograd around the sweeps.

The backward is an op of its own, so that compiled graphs hold both as single nodes. Logits kept within the budget
are extra outputs of the forward op, since that is how an op hands tensors to its backward.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` rows of the head, ``K`` indexed ids per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_onpolicy.kernels.coefficients import coefficients
from lightning_onpolicy.kernels.divergences import CURVED, Mixing
from lightning_onpolicy.kernels.head_logits import HeadLogits, accumulation_dtype
from lightning_onpolicy.kernels.sweep import Heads, Wanted, sweep_backward, sweep_forward
from lightning_onpolicy.kernels.tiles import plan


def state_names(names: list[str], teacher: bool) -> list[str]:
    """Rows of the ``[S, N]`` state that the forward op saves."""
    out = ["lse"]
    if teacher:
        out.append("teacher_lse")
    return out + [name for name in ("entropy", "reverse_kl", *CURVED) if name in names]


def _heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    soft_cap: float | None,
    logit_scale: float,
    teacher_soft_cap: float | None,
    teacher_logit_scale: float,
    vocab_size: int,
    operand_dtype: torch.dtype,
    tile_elements: int,
    kept: int,
    stores: tuple[Tensor, Tensor] | None,
) -> Heads:
    student = HeadLogits.prepare(
        hidden,
        weight,
        bias,
        temperature=temperature,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        operand_dtype=operand_dtype,
    )
    teacher = None
    widths = [] if weight.dtype == operand_dtype else [hidden.shape[1]]
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = HeadLogits.prepare(
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            temperature=temperature,
            soft_cap=teacher_soft_cap,
            logit_scale=teacher_logit_scale,
            vocab_size=vocab_size,
            operand_dtype=operand_dtype,
        )
        widths += [] if teacher_weight.dtype == operand_dtype else [teacher_hidden.shape[1]]
    tiling = plan(
        hidden.shape[0],
        vocab_size,
        kept,
        device_type=hidden.device.type,
        elements=tile_elements,
        converted_width=max(widths) if widths else None,
    )
    if stores is None:
        acc, size = accumulation_dtype(operand_dtype), hidden.shape[0] * kept
        stores = (
            hidden.new_empty(size, dtype=acc),
            hidden.new_empty(0 if teacher is None else size, dtype=acc),
        )
    return Heads(student, teacher, tiling, *stores)


@torch.library.custom_op("lightning_onpolicy::token_stats", mutates_args=())
def token_stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    temperature: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    outputs: str,
    soft_cap: float | None,
    logit_scale: float,
    teacher_soft_cap: float | None,
    teacher_logit_scale: float,
    vocab_size: int,
    beta: float,
    alpha: float,
    operand_dtype: torch.dtype,
    tile_elements: int,
    kept: int,
) -> list[Tensor]:
    """The comma-separated ``outputs`` in order, then state ``[S, N]``, kept student and teacher logits (flat)."""
    names = outputs.split(",")
    _check_ids(index, vocab_size)
    with torch.autocast(hidden.device.type, enabled=False):
        heads = _heads(
            hidden,
            weight,
            bias,
            temperature,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            soft_cap,
            logit_scale,
            teacher_soft_cap,
            teacher_logit_scale,
            vocab_size,
            operand_dtype,
            tile_elements,
            kept,
            None,
        )
        if hidden.shape[0] == 0:
            results = _empty(hidden, index, names, teacher_hidden is not None, accumulation_dtype(operand_dtype))
        else:
            out, state = sweep_forward(heads, names, index, Mixing(beta, alpha))
            rows = [state[name] for name in state_names(names, teacher_hidden is not None)]
            results = [out[name] for name in names] + [torch.stack(rows)]
    return [*_distinct(results), heads.kept_z, heads.kept_t]


@token_stats_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    temperature: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    outputs: str,
    soft_cap: float | None,
    logit_scale: float,
    teacher_soft_cap: float | None,
    teacher_logit_scale: float,
    vocab_size: int,
    beta: float,
    alpha: float,
    operand_dtype: torch.dtype,
    tile_elements: int,
    kept: int,
) -> list[Tensor]:
    teacher = teacher_hidden is not None
    acc = accumulation_dtype(operand_dtype)
    size = hidden.shape[0] * kept
    stores = [hidden.new_empty(size, dtype=acc), hidden.new_empty(size if teacher else 0, dtype=acc)]
    return [*_empty(hidden, index, outputs.split(","), teacher, acc), *stores]


@torch.library.custom_op("lightning_onpolicy::token_stats_backward", mutates_args=())
def token_stats_backward_op(
    table: Tensor,
    sparse: Tensor | None,
    state: Tensor,
    kept_z: Tensor,
    kept_t: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    temperature: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    terms: str,
    soft_cap: float | None,
    logit_scale: float,
    teacher_soft_cap: float | None,
    teacher_logit_scale: float,
    vocab_size: int,
    beta: float,
    alpha: float,
    operand_dtype: torch.dtype,
    tile_elements: int,
    kept: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> list[Tensor]:
    """Gradients of hidden states, weight and bias; empty where not wanted.

    ``table`` holds the coefficients named by the comma-separated ``terms``; ``state`` starts with the rows ``lse``
    and, with a teacher, ``teacher_lse``.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        # A gradient that does not touch the teacher's logits does not compute them.
        uses_teacher = any(name in terms.split(",") for name in ("c", "d", *CURVED))
        heads = _heads(
            hidden,
            weight,
            bias,
            temperature,
            teacher_hidden if uses_teacher else None,
            teacher_weight if uses_teacher else None,
            teacher_bias if uses_teacher else None,
            soft_cap,
            logit_scale,
            teacher_soft_cap,
            teacher_logit_scale,
            vocab_size,
            operand_dtype,
            tile_elements,
            kept,
            (kept_z, kept_t),
        )
        rows = {"lse": state[0]}
        if uses_teacher:
            rows["teacher_lse"] = state[1]
        grad_hidden, grad_weight, grad_bias = sweep_backward(
            heads,
            hidden,
            dict(zip(terms.split(","), table, strict=True)),
            index,
            sparse,
            rows,
            Mixing(beta, alpha),
            Wanted(want_hidden, want_weight, want_bias),
            weight,
        )
        # dz is the gradient of the unscaled product; the bias is added after the scale.
        grad_bias = grad_bias.div_(logit_scale) if want_bias else grad_bias
    return [
        grad_hidden.to(hidden.dtype),
        grad_weight,
        grad_bias if bias is None else grad_bias.to(bias.dtype),
    ]


@token_stats_backward_op.register_fake
def _(
    table: Tensor,
    sparse: Tensor | None,
    state: Tensor,
    kept_z: Tensor,
    kept_t: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *args: Any,
) -> list[Tensor]:
    *_, want_hidden, want_weight, want_bias = args
    acc = kept_z.dtype
    return [
        torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if want_hidden
        else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        if want_weight
        else hidden.new_empty(0, dtype=acc),
        hidden.new_empty(weight.shape[0] if want_bias else 0, dtype=acc if bias is None else bias.dtype),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, options = inputs[:8], inputs[8:]
    names = options[0].split(",")
    state, kept_z, kept_t = output[len(names) :]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(
        state, kept_z, kept_t, *(x for name, x in zip(names, output, strict=False) if name == "max_logp")
    )
    ctx.save_for_backward(*tensors, state, kept_z, kept_t)
    ctx.names, ctx.options = names, options[1:]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *tensors, state, kept_z, kept_t = ctx.saved_tensors
    bias, index, temperature, teacher_hidden = tensors[2], tensors[3], tensors[4], tensors[5]
    wanted = ctx.needs_input_grad[:3]
    grads_by_name = dict(zip(ctx.names, grads, strict=False))
    saved = dict(zip(state_names(ctx.names, teacher_hidden is not None), state.unbind(0), strict=True))
    logit_scale = ctx.options[1]
    factor = logit_scale if temperature is None else logit_scale / temperature.to(state.dtype)
    found = coefficients(grads_by_name, saved, factor)
    results = token_stats_backward_op(
        found.table,
        found.sparse,
        state,
        kept_z,
        kept_t,
        *tensors[:3],
        index if found.sparse is not None else None,
        *tensors[4:],
        ",".join(found.names),
        *ctx.options,
        *wanted[:2],
        wanted[2] and bias is not None,
    )
    out = [grad if want else None for grad, want in zip(results, wanted, strict=True)]
    return (*out, *([None] * 16))


token_stats_op.register_autograd(_backward, setup_context=_setup_context)


def _empty(
    hidden: Tensor, index: Tensor | None, names: list[str], teacher: bool, acc: torch.dtype
) -> list[Tensor]:
    """Uninitialised statistics and state, as their shapes: fakes, and the whole answer for N = 0."""
    N = hidden.shape[0]
    out = []
    for name in names:
        shape = (N, index.shape[1]) if name == "index_logp" and index is not None else (N,)
        out.append(hidden.new_empty(shape, dtype=torch.int64 if name == "argmax" else acc))
    out.append(hidden.new_empty((len(state_names(names, teacher)), N), dtype=acc))
    return out


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous tensors that own their memory: an op's outputs may not alias one another."""
    return [x.contiguous() for x in tensors]


def _check_ids(index: Tensor | None, vocab_size: int) -> None:
    """Ids must be in the vocabulary. Checked on the CPU only: elsewhere it would wait for the device."""
    if index is None or index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"targets and ids must be in [0, vocab_size={vocab_size}), found {low if low < 0 else high}; "
            "drop masked tokens before calling token_stats."
        )
