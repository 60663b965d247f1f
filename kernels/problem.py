"""One call of `token_stats` as its ops take it: tensors, options, and how the work is cut.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` rows of the head, ``K`` indexed ids per token; ``S`` saved statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_onpolicy.kernels.divergences import CURVED
from lightning_onpolicy.kernels.epilogues import SHIFTS
from lightning_onpolicy.kernels.head_logits import HeadLogits, accumulation_dtype
from lightning_onpolicy.kernels.reduction import Reduction
from lightning_onpolicy.kernels.tile_logits import Heads
from lightning_onpolicy.kernels.tiles import kept_columns, plan

#: The fields' part of the ops' schemas.
SCHEMA = """
    Tensor hidden, Tensor weight, Tensor? bias, Tensor? index, Tensor? temperature,
    Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? mask,
    float? soft_cap, float logit_scale, float? teacher_soft_cap, float teacher_logit_scale,
    SymInt vocab_size, float beta, float alpha, ScalarType operand_dtype, ScalarType teacher_operand_dtype,
    SymInt tile_elements, SymInt kept, str epilogue, str? group, SymInt first_id, SymInt total_size
"""
#: Leading fields that are tensors.
N_TENSORS = 9


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
