"""Sides of `kernels.py` that need torch alone: our op, and what anybody would write instead.

A side takes a `Problem` and gives outputs and gradients.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` vocabulary; ``R`` rows of a chunk; ``z`` logits, ``l`` and ``k``
log-probabilities of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from kernels_problem import Gradients, Outputs, Problem
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_onpolicy.kernels import token_stats

Run = Callable[[Problem], tuple[Outputs, Gradients]]
POLICY, DISTILL = ("logp", "entropy"), ("reverse_kl",)


@dataclass(frozen=True)
class Side:
    """One way to compute the outputs of a question.

    Args:
        name: As in tables and plots.
        outputs: Keys of `kernels_problem.STATISTIC`.
        ready: Gives what runs it; imports its library.
        recomputes: Whether its backward pass forms the logits again.
        needs_cuda: Whether it has no path on the CPU.
        less: What ours does and it does not, in a few words; empty for a full equivalent.
        entry: Entry point, and whether it is public.
    """

    name: str
    outputs: tuple[str, ...]
    ready: Callable[[], Run]
    recomputes: bool = False
    needs_cuda: bool = False
    less: str = ""
    entry: str = ""


@dataclass(frozen=True)
class Question:
    """What is timed.

    Args:
        title: Of the plot.
        sides: Who answers.
        frozen: Whether the head gets no gradient.
    """

    title: str
    sides: list[Side]
    frozen: bool = False

    @property
    def teacher(self) -> bool:
        """Whether there are two heads."""
        return "reverse_kl" in self.sides[0].outputs


def ours(outputs: Sequence[str], budget_bytes: int | None) -> Run:
    """`token_stats`; without a budget it keeps all logits."""
    teacher = "reverse_kl" in outputs

    def run(p: Problem) -> tuple[Outputs, Gradients]:
        stats = token_stats(
            p.hidden,
            p.weight,
            p.targets if "logp" in outputs else None,
            outputs=outputs,
            teacher=p.teacher if teacher else None,
            budget_bytes=everything(p, teacher=teacher) if budget_bytes is None else budget_bytes,
        )
        return p.differentiate(dict(stats))

    return run


def everything(p: Problem, *, teacher: bool) -> int:
    """A budget in which all logits fit: their bytes in float32, and 1 GiB for the workspace."""
    return len(p.targets) * len(p.weight) * 4 * (2 if teacher else 1) + 2**30


def from_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    outputs: Sequence[str],
) -> tuple[Tensor, ...]:
    """Statistics from materialised logits: products in the dtype of the inputs, all else in float32."""
    logp_RV = F.linear(hidden, weight).float().log_softmax(1)
    if "reverse_kl" in outputs:
        with torch.no_grad():
            logq_RV = F.linear(teacher_hidden, teacher_weight).float().log_softmax(1)
        return (F.kl_div(logq_RV, logp_RV, reduction="none", log_target=True).sum(1),)
    picked_R = logp_RV.gather(1, targets.unsqueeze(1)).squeeze(1)
    return picked_R, -(logp_RV.exp() * logp_RV).sum(1)


def eager(outputs: Sequence[str]) -> Run:
    """All logits at once, and autograd."""

    def run(p: Problem) -> tuple[Outputs, Gradients]:
        tensors = p.hidden, p.weight, p.targets, p.teacher_hidden, p.teacher_weight
        return p.differentiate(dict(zip(outputs, from_logits(*tensors, outputs=outputs), strict=True)))

    return run


def chunk_rows(p: Problem) -> int:
    """Rows of the loops below: enough for products at full speed, few enough to save memory."""
    return 256 if p.hidden.device.type == "cpu" else 2048


def compiled(outputs: Sequence[str]) -> Run:
    """The same by chunks of rows, compiled, and checkpointed so that no chunk's logits are kept."""
    chunk = torch.compile(partial(from_logits, outputs=tuple(outputs)), fullgraph=True)

    def run(p: Problem) -> tuple[Outputs, Gradients]:
        by_rows = (x.split(chunk_rows(p)) for x in (p.hidden, p.targets, p.teacher_hidden))
        parts = [
            checkpoint(
                chunk, h, p.weight, y, t, p.teacher_weight, use_reentrant=False, preserve_rng_state=False
            )
            for h, y, t in zip(*by_rows, strict=True)
        ]
        values = [torch.cat(column) for column in zip(*parts, strict=True)]
        return p.differentiate(dict(zip(outputs, values, strict=True)))

    return run


def plain_loop(outputs: Sequence[str]) -> Run:
    """Gradients of a chunk of rows while its logits are there, by hand, in place."""
    chunk = _kl_chunk if "reverse_kl" in outputs else _policy_chunk

    def run(p: Problem) -> tuple[Outputs, Gradients]:
        x_NH, w_VH = p.hidden.detach(), p.weight.detach()
        N, V = len(x_NH), len(w_VH)
        values = {name: x_NH.new_empty(N, dtype=torch.float32) for name in outputs}
        dx_NH, dw_VH = torch.empty_like(x_NH), None
        space = [x_NH.new_empty((min(chunk_rows(p), N), V), dtype=torch.float32) for _ in range(2)]
        for start in range(0, N, chunk_rows(p)):
            block = slice(start, min(start + chunk_rows(p), N))
            found, dz_RV = chunk(p, block, *(buffer[: block.stop - start] for buffer in space))
            for name, value in found.items():
                values[name][block] = value
            dz_RV = dz_RV.to(x_NH.dtype)
            torch.mm(dz_RV, w_VH, out=dx_NH[block])
            if not p.weight.requires_grad:
                continue
            if dw_VH is None:
                dw_VH = dz_RV.T @ x_NH[block]
            else:
                dw_VH.addmm_(dz_RV.T, x_NH[block])
        return values, (dx_NH,) if dw_VH is None else (dx_NH, dw_VH)

    return run


def _log_probs(x_RH: Tensor, w_VH: Tensor, out_RV: Tensor) -> Tensor:
    z_RV = torch.mm(x_RH, w_VH.T, out=out_RV if x_RH.dtype == out_RV.dtype else None)
    return torch.log_softmax(z_RV.float(), 1, out=out_RV)


def _policy_chunk(p: Problem, block: slice, l_RV: Tensor, p_RV: Tensor) -> tuple[Outputs, Tensor]:
    y_R1, up_R1, up_entropy_R1 = (
        x[block].unsqueeze(1) for x in (p.targets, p.upstream["logp"], p.upstream["entropy"])
    )
    _log_probs(p.hidden.detach()[block], p.weight.detach(), l_RV)
    logp_R1 = l_RV.gather(1, y_R1)
    torch.exp(l_RV, out=p_RV)
    entropy_R1 = -(p_RV * l_RV).sum(1, keepdim=True)
    l_RV.add_(entropy_R1).mul_(-up_entropy_R1).sub_(up_R1).mul_(p_RV).scatter_add_(1, y_R1, up_R1)
    return {"logp": logp_R1.squeeze(1), "entropy": entropy_R1.squeeze(1)}, l_RV


def _kl_chunk(p: Problem, block: slice, l_RV: Tensor, k_RV: Tensor) -> tuple[Outputs, Tensor]:
    _log_probs(p.hidden.detach()[block], p.weight.detach(), l_RV)
    _log_probs(p.teacher_hidden[block], p.teacher_weight, k_RV)
    gap_RV = torch.sub(l_RV, k_RV, out=k_RV)
    p_RV = l_RV.exp_()
    kl_R1 = (p_RV * gap_RV).sum(1, keepdim=True)
    gap_RV.sub_(kl_R1).mul_(p.upstream["reverse_kl"][block].unsqueeze(1)).mul_(p_RV)
    return {"reverse_kl": kl_R1.squeeze(1)}, gap_RV
