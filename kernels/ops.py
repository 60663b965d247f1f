"""The custom ops behind `token_stats`: schemas, fakes and autograd around the sweeps.

The backward is an op of its own, so that compiled graphs hold each as one node. Logits kept within the budget
are extra outputs of the forward op, since that is how an op hands tensors to its backward.

Masked rows are dropped inside the ops: how many remain depends on data, and outside no compiled graph could go
on past it. All shapes that leave the ops are those of N rows.

Legend: ``N`` tokens, of which ``n`` are not masked; ``H`` hidden size, ``V`` rows of the head, ``K`` indexed ids
per token, ``S`` saved statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_onpolicy.kernels.coefficients import coefficients
from lightning_onpolicy.kernels.divergences import CURVED, Mixing
from lightning_onpolicy.kernels.epilogues import SHIFTS, Upstream, load
from lightning_onpolicy.kernels.head_logits import HeadLogits, accumulation_dtype
from lightning_onpolicy.kernels.reduction import Reduction
from lightning_onpolicy.kernels.sweep import Wanted, sweep_backward, sweep_forward
from lightning_onpolicy.kernels.tile_logits import Heads
from lightning_onpolicy.kernels.tiles import kept_columns, plan

_PROBLEM = """
    Tensor hidden, Tensor weight, Tensor? bias, Tensor? index, Tensor? temperature,
    Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? mask,
    float? soft_cap, float logit_scale, float? teacher_soft_cap, float teacher_logit_scale,
    SymInt vocab_size, float beta, float alpha, ScalarType operand_dtype, ScalarType teacher_operand_dtype,
    SymInt tile_elements, SymInt kept, str epilogue, str? group, SymInt first_id, SymInt total_size
"""
_N_TENSORS = 9


@dataclass(frozen=True)
class Problem:
    """The arguments both ops share, in the order of their schemas.

    Args:
        hidden: ``[N, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        index: ``[N, K]`` int64 ids whose log-probabilities are wanted, or None.
        temperature: ``[N]``, or None for 1.
        teacher_hidden: ``[N, Ht]`` or None.
        teacher_weight: ``[V2, Ht]`` or None.
        teacher_bias: ``[V2]`` or None.
        mask: ``[N]`` bool, rows to compute, or None for all.
        soft_cap: Student's cap, or None.
        logit_scale: Student's scale.
        teacher_soft_cap: Teacher's cap, or None.
        teacher_logit_scale: Teacher's scale.
        vocab_size: True vocabulary size of both.
        beta: Teacher share of the JSD mixture.
        alpha: Skew.
        operand_dtype: Dtype of the student product's operands; float64 if and only if the teacher's is.
        teacher_operand_dtype: Dtype of the teacher product's operands.
        tile_elements: Elements of one workspace buffer.
        kept: Leading vocabulary ids whose logits are kept.
        epilogue: What is done to the tiles; one for both passes, see
            :mod:`~lightning_onpolicy.kernels.epilogues`.
        group: Process group over whose ranks the heads' rows are split, or None. The weights and biases are
            then this rank's rows, and so are ``vocab_size`` and ``kept``.
        first_id: Id of this rank's first row.
        total_size: True vocabulary size over all ranks; used with ``group``.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    index: Tensor | None
    temperature: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    mask: Tensor | None
    soft_cap: float | None
    logit_scale: float
    teacher_soft_cap: float | None
    teacher_logit_scale: float
    vocab_size: int
    beta: float
    alpha: float
    operand_dtype: torch.dtype
    teacher_operand_dtype: torch.dtype
    tile_elements: int
    kept: int
    epilogue: str = "eager"
    group: str | None = None
    first_id: int = 0
    total_size: int = 0

    def arguments(self) -> tuple[Any, ...]:
        """The fields, as the ops take them."""
        return tuple(getattr(self, item.name) for item in fields(self))

    def of_rows(self, rows: Tensor) -> Problem:
        """The problem of some rows: int64 ``[n]``. Stores of N rows hold more columns of fewer."""

        def take(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        kept = kept_columns(
            rows.shape[0],
            self.vocab_size,
            bytes_left=self.hidden.shape[0] * self.kept,
            streams=1,
            itemsize=1,
        )
        return replace(
            self,
            hidden=self.hidden[rows],
            index=take(self.index),
            temperature=take(self.temperature),
            teacher_hidden=take(self.teacher_hidden),
            mask=None,
            kept=kept,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits and statistics."""
        return accumulation_dtype(self.operand_dtype)

    @property
    def reduction(self) -> Reduction | None:
        """What completes the statistics over ranks, where the rows are split."""
        if self.group is None:
            return None
        return Reduction(self.group, self.first_id, self.vocab_size, self.total_size)

    @property
    def own_index(self) -> Tensor | None:
        """``index`` counted from this rank's first id."""
        return self.index if self.index is None or self.first_id == 0 else self.index - self.first_id

    def stores(self) -> tuple[Tensor, Tensor]:
        """Uninitialised flat stores for the kept logits of student and teacher."""
        size = self.hidden.shape[0] * self.kept
        teacher_size = 0 if self.teacher_hidden is None else size
        return self.hidden.new_empty(size, dtype=self.dtype), self.hidden.new_empty(
            teacher_size, dtype=self.dtype
        )

    def state_names(self, names: list[str]) -> list[str]:
        """Rows of the ``[S, N]`` state that the forward op saves for gradients of the outputs ``names``."""
        out = list(SHIFTS[: 2 if self.teacher_hidden is None else 4])
        return out + [name for name in ("entropy", "reverse_kl", *CURVED) if name in names]

    def empty(self, names: list[str]) -> list[Tensor]:
        """Uninitialised outputs and state: what fakes need, and the whole answer for N = 0."""
        N = self.hidden.shape[0]
        out = []
        for name in names:
            shape = (N, self.index.shape[1]) if name == "index_logp" and self.index is not None else (N,)
            out.append(self.hidden.new_empty(shape, dtype=torch.int64 if name == "argmax" else self.dtype))
        return [*out, self.hidden.new_empty((len(self.state_names(names)), N), dtype=self.dtype)]

    def heads(self, stores: tuple[Tensor, Tensor], *, with_teacher: bool) -> Heads:
        """Heads over the stores. The stores are laid out by the cut, so it ignores ``with_teacher``."""
        converted = [self.hidden.shape[1]] if self.weight.dtype != self.operand_dtype else []
        teacher = None
        if self.teacher_hidden is not None and self.teacher_weight is not None:
            if self.teacher_weight.dtype != self.teacher_operand_dtype:
                converted.append(self.teacher_hidden.shape[1])
            if with_teacher:
                teacher = self._head(
                    self.teacher_hidden,
                    self.teacher_weight,
                    self.teacher_bias,
                    self.teacher_soft_cap,
                    self.teacher_logit_scale,
                    self.teacher_operand_dtype,
                )
        tiling = plan(
            self.hidden.shape[0],
            self.vocab_size,
            self.kept,
            device_type=self.hidden.device.type,
            elements=self.tile_elements,
            converted_width=max(converted) if converted else None,
        )
        student = self._head(
            self.hidden, self.weight, self.bias, self.soft_cap, self.logit_scale, self.operand_dtype
        )
        return Heads(student, teacher, tiling, *stores)

    def _head(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        soft_cap: float | None,
        logit_scale: float,
        operand_dtype: torch.dtype,
    ) -> HeadLogits:
        return HeadLogits.prepare(
            hidden,
            weight,
            bias,
            temperature=self.temperature,
            soft_cap=soft_cap,
            logit_scale=logit_scale,
            vocab_size=self.vocab_size,
            operand_dtype=operand_dtype,
        )


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
    schema=f"(str outputs, {_PROBLEM}) -> Tensor[]",
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
        bool want_hidden, bool want_weight, bool want_bias, {_PROBLEM}) -> Tensor[]""",
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
    ctx.save_for_backward(*inputs[1 : 1 + _N_TENSORS], *saved)
    ctx.names, ctx.options = names, inputs[1 + _N_TENSORS :]


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
