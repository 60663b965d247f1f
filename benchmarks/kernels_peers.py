"""Sides of `kernels.py` from other libraries, at their defaults, and the lists of all sides.

Libraries are imported when a side is made ready, so that one that is missing costs only its own row. Where a library
gives a scalar loss and nothing else, its side is that loss; `less` says so.

Legend: ``N`` tokens.
"""

from __future__ import annotations

import torch
from kernels_problem import Gradients, Outputs, Problem
from kernels_sides import DISTILL, POLICY, Run, Side, compiled, eager, ours, plain_loop
from torch.nn import functional as F

from lightning_onpolicy.kernels.tiles import DEFAULT_BUDGET_BYTES

ONE_GRADIENT = "one gradient for all tokens"


def torch_cross_entropy(reduction: str) -> Run:
    """`F.linear_cross_entropy` with its default chunks: per token (recomputes) or summed (gradient in forward)."""
    options = torch.nn.LinearCrossEntropyOptions()

    def run(p: Problem) -> tuple[Outputs, Gradients]:
        loss = F.linear_cross_entropy(p.hidden, p.weight, p.targets, reduction=reduction, options=options)
        return p.differentiate({"logp" if reduction == "none" else "sum_logp": -loss})

    return run


def trl_log_prob() -> Run:
    """What TRL's trainers call, with their width of 32768 vocabulary ids."""
    from trl.kernels import ChunkedLogProbFunction

    def run(p: Problem) -> tuple[Outputs, Gradients]:
        found = ChunkedLogProbFunction.apply(
            p.hidden, p.weight, None, p.targets, 1.0, 32768, None, 1.0, ("entropy",)
        )
        return p.differentiate({"logp": found[0], "entropy": found[1]})

    return run


def trl_divergence() -> Run:
    """What TRL's `DistillationTrainer` calls; beta 1 is the reverse KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(p: Problem) -> tuple[Outputs, Gradients]:
        heads = p.hidden, p.weight, None, p.teacher_hidden, p.teacher_weight, None
        return p.differentiate({"reverse_kl": ChunkedDivergenceFunction.apply(*heads, 1.0)[0]})

    return run


def liger_scaled() -> Run:
    """Hopper: its CuTe kernel; elsewhere its chunks of 512 tokens."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def run(p: Problem) -> tuple[Outputs, Gradients]:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            p.hidden, p.weight, p.targets, return_entropy=True
        )
        return p.differentiate({"logp": -nll, "entropy": entropy})

    return run


def liger_grpo() -> Run:
    """CISPO at ratio 1 on N sequences of one token, all in one chunk: ``-Σ advantage · logp / N``."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def run(p: Problem) -> tuple[Outputs, Gradients]:
        N = len(p.targets)
        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, loss_type="cispo", epsilon_high=5.0, chunk_size=N
        )
        mask = torch.ones_like(p.targets).unsqueeze(1)
        advantages = -N * p.upstream["logp"]
        value, _ = loss(p.hidden.unsqueeze(1), p.weight, p.targets.unsqueeze(1), mask, advantages)
        return p.differentiate({"weighted_logp": value})

    return run


def liger_cross_entropy() -> Run:
    """Triton row kernel, gradient in forward."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda p: p.differentiate({"sum_logp": -loss(p.weight, p.hidden, p.targets)})


def liger_chunked_kl(*, compile_chunks: bool) -> Run:
    """The soft part of the chunked JSD at beta 1."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compile_chunks
    )
    return lambda p: p.differentiate(
        {"mean_kl": loss(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.targets)}
    )


def liger_fused_kl() -> Run:
    """The Triton JSD at beta 1."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=1.0)
    return lambda p: p.differentiate(
        {"mean_kl": loss(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, None)}
    )


def apple(impl: str, filter_eps: str | None) -> Run:
    """Cut cross-entropy, per token."""
    from cut_cross_entropy import linear_cross_entropy

    def run(p: Problem) -> tuple[Outputs, Gradients]:
        loss = linear_cross_entropy(
            p.hidden, p.weight, p.targets, reduction="none", filter_eps=filter_eps, impl=impl
        )
        return p.differentiate({"logp": -loss})

    return run


def quack() -> Run:
    """Its chunks of 4096 tokens; on Hopper, where shapes allow, with scaled exponentials."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda p: p.differentiate(
        {"sum_logp": -chunked_linear_cross_entropy(p.hidden, p.weight, p.targets, reduction="sum")}
    )


def _own(outputs: tuple[str, ...]) -> list[Side]:
    """Ours in its modes, and what anybody would write."""
    entry = "lightning_onpolicy.kernels.token_stats"
    return [
        Side("ours, logits kept", outputs, lambda: ours(outputs, None), entry=entry),
        Side("ours, none kept", outputs, lambda: ours(outputs, 0), recomputes=True, entry=entry),
        Side(
            "ours, default budget",
            outputs,
            lambda: ours(outputs, DEFAULT_BUDGET_BYTES),
            recomputes=True,
            entry=entry,
        ),
        Side("PyTorch, eager", outputs, lambda: eager(outputs)),
        Side("PyTorch, compiled chunks", outputs, lambda: compiled(outputs), recomputes=True),
        Side(
            "plain loop, gradient in forward",
            outputs,
            lambda: plain_loop(outputs),
            less="upstream gradients known beforehand",
        ),
    ]


_SUMS = ("sum_logp",)
_LOGP = ("logp",)
POLICY_SIDES = [
    *_own(POLICY),
    Side(
        "TRL chunked log-prob",
        POLICY,
        trl_log_prob,
        recomputes=True,
        entry="trl.kernels.ChunkedLogProbFunction (public)",
    ),
    Side(
        "Liger scaled CE",
        POLICY,
        liger_scaled,
        recomputes=True,
        entry="liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction (public)",
    ),
    Side(
        "Liger GRPO",
        ("weighted_logp",),
        liger_grpo,
        recomputes=True,
        less="no entropy; a loss",
        entry="liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss (public)",
    ),
    Side(
        "Liger fused linear CE",
        _SUMS,
        liger_cross_entropy,
        needs_cuda=True,
        less=f"no entropy; {ONE_GRADIENT}",
        entry="liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss (public)",
    ),
    Side(
        "torch linear CE, per token",
        _LOGP,
        lambda: torch_cross_entropy("none"),
        recomputes=True,
        less="no entropy",
        entry="torch.nn.functional.linear_cross_entropy, default LinearCrossEntropyOptions (public)",
    ),
    Side(
        "torch linear CE, summed",
        _SUMS,
        lambda: torch_cross_entropy("sum"),
        less=f"no entropy; {ONE_GRADIENT}",
        entry="torch.nn.functional.linear_cross_entropy, default LinearCrossEntropyOptions (public)",
    ),
    Side(
        "Apple CCE",
        _LOGP,
        lambda: apple("cce", "auto"),
        recomputes=True,
        needs_cuda=True,
        less="no entropy; skips small gradients",
        entry="cut_cross_entropy.linear_cross_entropy (public)",
    ),
    Side(
        "Apple CCE, no filter",
        _LOGP,
        lambda: apple("cce", None),
        recomputes=True,
        needs_cuda=True,
        less="no entropy",
        entry="cut_cross_entropy.linear_cross_entropy, filter_eps=None (public)",
    ),
    Side(
        "Apple CCE, torch.compile",
        _LOGP,
        lambda: apple("torch_compile", None),
        less="no entropy",
        entry="cut_cross_entropy.linear_cross_entropy, impl='torch_compile' (public)",
    ),
    Side(
        "QuACK linear CE",
        _SUMS,
        quack,
        needs_cuda=True,
        less=f"no entropy; {ONE_GRADIENT}",
        entry="quack.linear_cross_entropy.chunked_linear_cross_entropy (public)",
    ),
]
DISTILL_SIDES = [
    *_own(DISTILL),
    Side(
        "TRL chunked divergence",
        DISTILL,
        trl_divergence,
        recomputes=True,
        entry="trl.kernels.chunked_divergence.ChunkedDivergenceFunction (not exported by trl.kernels)",
    ),
    Side(
        "Liger chunked JSD",
        ("mean_kl",),
        lambda: liger_chunked_kl(compile_chunks=True),
        less=ONE_GRADIENT,
        entry="liger_kernel.chunked_loss.LigerFusedLinearJSDLoss (public)",
    ),
    Side(
        "Liger chunked JSD, not compiled",
        ("mean_kl",),
        lambda: liger_chunked_kl(compile_chunks=False),
        less=ONE_GRADIENT,
        entry="liger_kernel.chunked_loss.LigerFusedLinearJSDLoss, compiled=False (public)",
    ),
    Side(
        "Liger fused linear JSD",
        ("mean_kl",),
        liger_fused_kl,
        needs_cuda=True,
        less=ONE_GRADIENT,
        entry="liger_kernel.transformers.LigerFusedLinearJSD (public)",
    ),
]
