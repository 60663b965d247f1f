"""The custom ops behind `token_stats`: schemas, fakes and autograd around the sweeps.

The backward is an op of its own, so that compiled graphs hold each as one node. Logits kept within the budget
are extra outputs of the forward op, since that is how an op hands tensors to its backward.

Masked rows are dropped inside the ops: how many remain depends on data, and outside no compiled graph could go
on past it. All shapes that leave the ops are those of N rows.

Legend: ``N`` tokens, of which ``n`` are not masked; ``H`` hidden size, ``V`` rows of the head, ``K`` indexed ids
per token, ``S`` saved statistics.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lightning_onpolicy.kernels.coefficients import coefficients
from lightning_onpolicy.kernels.divergences import CURVED, Mixing
from lightning_onpolicy.kernels.epilogues import SHIFTS, Upstream, load
from lightning_onpolicy.kernels.problem import N_TENSORS, SCHEMA, Problem
from lightning_onpolicy.kernels.sweep import Wanted, sweep_backward, sweep_forward


def forward(outputs: str, *arguments: Any) -> list[Tensor]:
    """The comma-separated ``outputs`` in order, then the state ``[S, N]`` and both stores of kept logits."""
    problem, names = Problem(*arguments), outputs.split(",")
    stores = problem.stores()
    if problem.mask is None:
        return [*_statistics(problem, names, stores), *stores]
    rows = _rows(problem.mask)
    *values, state = _statistics(problem.of_rows(rows), names, stores)
    *whole, whole_state = (x.zero_() for x in problem.empty(names))
    for x, value in zip(whole, values, strict=True):
        x[rows] = value
    whole_state[:, rows] = state
    return [*whole, whole_state, *stores]


def _statistics(problem: Problem, names: list[str], stores: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Outputs and state of a problem without mask; fills the stores."""
    _check_ids(problem.index, problem.vocab_size if problem.group is None else problem.total_size)
    if problem.hidden.shape[0] == 0:
        return problem.empty(names)
    # Operand dtypes are this library's choice (operand_dtype); autocast would round the operands again.
    with torch.autocast(problem.hidden.device.type, enabled=False):
        heads = problem.heads(stores, with_teacher=True)
        mixing = Mixing(problem.beta, problem.alpha)
        out, state = sweep_forward(
            heads, names, problem.own_index, mixing, load(problem.epilogue), problem.reduction
        )
        rows = torch.stack([state[name] for name in problem.state_names(names)])
    return [*(out[name] for name in names), rows]


def _rows(mask: Tensor) -> Tensor:
    """``[n]`` int64 numbers of the rows to compute. Waits for the device: n is a shape."""
    return mask.nonzero().squeeze(1)


token_stats_op = torch.library.custom_op(
    "lightning_onpolicy::token_stats",
    forward,
    mutates_args=(),
    schema=f"(str outputs, {SCHEMA}) -> Tensor[]",
)


@token_stats_op.register_fake
def _(outputs: str, *arguments: Any) -> list[Tensor]:
    problem = Problem(*arguments)
    return [*problem.empty(outputs.split(",")), *problem.stores()]


def backward(
    terms: str,
    table: Tensor,
    sparse: Tensor | None,
    state: Tensor,
    kept_z: Tensor,
    kept_t: Tensor,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    *arguments: Any,
) -> list[Tensor]:
    """Gradients of hidden states, weight and bias; empty where not wanted.

    ``table`` holds the coefficients named by the comma-separated ``terms``; ``state`` starts with the rows
    of ``SHIFTS``.
    """
    problem, names = Problem(*arguments), terms.split(",")
    if problem.mask is not None:
        rows = _rows(problem.mask)
        part, found = problem.of_rows(rows), None if sparse is None else sparse[rows]
        wanted = (want_hidden, want_weight, want_bias)
        of_rows = backward(
            terms, table[:, rows], found, state[:, rows], kept_z, kept_t, *wanted, *part.arguments()
        )
        if want_hidden:
            of_rows[0] = torch.zeros_like(problem.hidden).index_copy_(0, rows, of_rows[0])
        return of_rows
    with torch.autocast(problem.hidden.device.type, enabled=False):
        # A gradient that does not touch the teacher's logits does not compute them.
        with_teacher = any(name in names for name in ("c", "d", *CURVED))
        grad_hidden, grad_weight, grad_bias = sweep_backward(
            problem.heads((kept_z, kept_t), with_teacher=with_teacher),
            problem.hidden,
            problem.weight,
            Upstream(
                dict(zip(names, table, strict=True)),
                problem.own_index if sparse is not None else None,
                sparse,
                dict(zip(SHIFTS, state[: 4 if with_teacher else 2], strict=False)),
                Mixing(problem.beta, problem.alpha),
            ),
            Wanted(want_hidden, want_weight, want_bias),
            load(problem.epilogue),
        )
    if problem.reduction is not None and want_hidden:
        problem.reduction.sum_(grad_hidden)
    if problem.bias is not None:
        # dz is the gradient of the unscaled product; the bias is added after the scale.
        grad_bias = grad_bias.div_(problem.logit_scale).to(problem.bias.dtype)
    return [grad_hidden.to(problem.hidden.dtype), grad_weight, grad_bias]


token_stats_backward_op = torch.library.custom_op(
    "lightning_onpolicy::token_stats_backward",
    backward,
    mutates_args=(),
    schema=f"""(str terms, Tensor table, Tensor? sparse, Tensor state, Tensor kept_z, Tensor kept_t,
        bool want_hidden, bool want_weight, bool want_bias, {SCHEMA}) -> Tensor[]""",
)


@token_stats_backward_op.register_fake
def _(
    terms: str,
    table: Tensor,
    sparse: Tensor | None,
    state: Tensor,
    kept_z: Tensor,
    kept_t: Tensor,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    *arguments: Any,
) -> list[Tensor]:
    problem = Problem(*arguments)
    like = (problem.hidden, problem.weight, problem.bias)
    return [
        problem.hidden.new_empty(
            x.shape if want and x is not None else (0,), dtype=(state if x is None else x).dtype
        )
        for x, want in zip(like, (want_hidden, want_weight, want_bias), strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    names = inputs[0].split(",")
    saved = output[len(names) :]
    metrics = [x for name, x in zip(names, output, strict=False) if name == "max_logp"]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved, *metrics)
    ctx.save_for_backward(*inputs[1 : 1 + N_TENSORS], *saved)
    ctx.names, ctx.options = names, inputs[1 + N_TENSORS :]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *tensors, state, kept_z, kept_t = ctx.saved_tensors
    problem = Problem(*tensors, *ctx.options)
    wanted = list(ctx.needs_input_grad[1:4])
    factor: Tensor | float = problem.logit_scale
    if problem.temperature is not None:
        factor = problem.logit_scale / problem.temperature.to(state.dtype)
    found = coefficients(
        dict(zip(ctx.names, grads, strict=False)),
        dict(zip(problem.state_names(ctx.names), state.unbind(0), strict=True)),
        factor,
    )
    results = token_stats_backward_op(
        ",".join(found.names), found.table, found.sparse, state, kept_z, kept_t, *wanted, *problem.arguments()
    )
    out = [grad if want else None for grad, want in zip(results, wanted, strict=True)]
    return (None, *out, *([None] * (len(fields(Problem)) - len(out))))


token_stats_op.register_autograd(_backward, setup_context=_setup_context)


def _check_ids(index: Tensor | None, vocab_size: int) -> None:
    """Ids must be in the vocabulary. Checked on the CPU only: elsewhere it would wait for the device."""
    if index is None or index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"targets and ids must be in [0, vocab_size={vocab_size}), found {low if low < 0 else high}; "
            "pass mask= for masked tokens."
        )
