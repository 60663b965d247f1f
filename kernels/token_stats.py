"""Per-token statistics of a language-model head, from hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_onpolicy.kernels import reference
from lightning_onpolicy.kernels.spec import TeacherHead, TokenStats, TopK


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    outputs: Sequence[str] = ("logp",),
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    ids: Tensor | None = None,
    teacher: TeacherHead | None = None,
    topk: TopK | None = None,
    beta: float = 0.5,
    alpha: float = 0.1,
    budget_bytes: int = 512 * 2**20,
) -> TokenStats:
    """Per-token statistics of a language-model head, from hidden states."""
    return reference.token_stats(
        hidden, weight, targets, outputs=outputs, bias=bias, temperature=temperature, soft_cap=soft_cap,
        logit_scale=logit_scale, vocab_size=vocab_size, ids=ids, teacher=teacher, topk=topk, beta=beta, alpha=alpha,
    )
