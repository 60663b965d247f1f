"""The oracle: every statistic of `token_stats` in plain eager PyTorch over materialised logits.

The one implementation that tests and benchmarks compare with. Runs in float64 when the hidden states are
float64 and in float32 otherwise (half-precision inputs are upcast first), and gets its gradients from
autograd.

Legend: ``N`` tokens, ``H`` hidden, ``V`` vocabulary, ``K`` ids; ``p`` student and ``q`` teacher at one
temperature; ``logp_NV`` and ``logq_NV`` are their log-probabilities.

Sources: generalised JSD, Agarwal et al., "On-Policy Distillation of Language Models" (2306.13649), eq. 1;
skew KL, Ko et al., "DistiLLM" (2402.03898), eq. 4 and 5; the tail bucket treats all ids outside the support
as one event.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_onpolicy.kernels.spec import OUTPUTS, TeacherHead, TokenStats, TopK


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """``soft_cap(logit_scale · hidden @ weightᵀ + bias) / temperature`` over the true vocabulary.

    Args:
        hidden: ``[N, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        temperature: Scalar or ``[N]``.
        soft_cap: Cap of ``cap · tanh(x / cap)``, or None.
        logit_scale: Factor on the product.
        vocab_size: True vocabulary size; rows of ``weight`` past it are dropped.

    Returns:
        ``[N, vocab_size]`` float32, or float64 where ``hidden`` is.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    x_NV = logit_scale * (hidden.to(dtype) @ weight[:vocab_size].to(dtype).T)
    if bias is not None:
        x_NV = x_NV + bias[:vocab_size].to(dtype)
    if soft_cap is not None:
        x_NV = soft_cap * torch.tanh(x_NV / soft_cap)
    if isinstance(temperature, Tensor):
        return x_NV / temperature.to(dtype).unsqueeze(1)
    return x_NV / temperature


def entropy(logp_NV: Tensor) -> Tensor:
    """``-Σ p log p`` per row, ``[N]``."""
    return -_times(logp_NV.exp(), logp_NV).sum(1)


def kl(loga_NV: Tensor, logb_NV: Tensor) -> Tensor:
    """``KL(a || b) = Σ a (log a - log b)`` per row, ``[N]``."""
    return _times(loga_NV.exp(), _minus(loga_NV, logb_NV)).sum(1)


def jsd(logp_NV: Tensor, logq_NV: Tensor, beta: float) -> Tensor:
    """``β KL(q || m) + (1 - β) KL(p || m)`` with ``m = β q + (1 - β) p``, per row, ``[N]``."""
    logm_NV = _mix(logq_NV, logp_NV, beta)
    return beta * kl(logq_NV, logm_NV) + (1 - beta) * kl(logp_NV, logm_NV)


def skew_forward_kl(logp_NV: Tensor, logq_NV: Tensor, alpha: float) -> Tensor:
    """``KL(q || α q + (1 - α) p)`` per row, ``[N]``."""
    return kl(logq_NV, _mix(logq_NV, logp_NV, alpha))


def skew_reverse_kl(logp_NV: Tensor, logq_NV: Tensor, alpha: float) -> Tensor:
    """``KL(p || (1 - α) q + α p)`` per row, ``[N]``."""
    return kl(logp_NV, _mix(logp_NV, logq_NV, alpha))


def total_variation(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """``½ Σ |p - q|`` per row, ``[N]``."""
    return 0.5 * (logp_NV.exp() - logq_NV.exp()).abs().sum(1)


def topk_kl(logp_NK: Tensor, logq_NK: Tensor, *, reverse: bool) -> Tensor:
    """KL over K ids and one bucket that holds the rest of the vocabulary, with tail masses 1 - Σ, ``[N]``.

    Args:
        logp_NK: ``[N, K]`` student log-probabilities at the ids.
        logq_NK: ``[N, K]`` teacher log-probabilities; entries of -inf are not part of the support.
        reverse: KL(p || q) instead of KL(q || p).
    """
    logq_NK = logq_NK.to(logp_NK.dtype)
    logp_NK = torch.where(logq_NK > -math.inf, logp_NK, -math.inf)
    tail_p, tail_q = ((1 - x.exp().sum(1, keepdim=True)).clamp(min=0).log() for x in (logp_NK, logq_NK))
    student, teacher = torch.cat((logp_NK, tail_p), 1), torch.cat((logq_NK, tail_q), 1)
    return kl(student, teacher) if reverse else kl(teacher, student)


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
    mask: Tensor | None = None,
    beta: float = 0.5,
    alpha: float = 0.1,
) -> TokenStats:
    """`lightning_onpolicy.kernels.token_stats` over full ``[N, V]`` logits; the same arguments without the
    budget.

    Raises:
        ValueError: If an output is unknown.
        AssertionError: If a tensor that an output needs is missing.
    """
    if mask is not None:
        rows = mask.nonzero().squeeze(1)
        kept = token_stats(
            hidden[rows],
            weight,
            None if targets is None else targets[rows],
            outputs=outputs,
            bias=bias,
            temperature=temperature[rows] if isinstance(temperature, Tensor) else temperature,
            soft_cap=soft_cap,
            logit_scale=logit_scale,
            vocab_size=vocab_size,
            ids=None if ids is None else ids[rows],
            teacher=None if teacher is None else replace(teacher, hidden=teacher.hidden[rows]),
            topk=None if topk is None else TopK(topk.ids[rows], topk.logps[rows]),
            beta=beta,
            alpha=alpha,
        )
        zeros = {name: x.new_zeros(mask.shape + x.shape[1:]) for name, x in kept.items()}
        return TokenStats({name: zeros[name].index_copy(0, rows, x) for name, x in kept.items()})
    size = vocab_size if vocab_size is not None else weight.shape[0]
    if teacher is not None:
        size = min(size, teacher.vocab_size or teacher.weight.shape[0])
    logits_NV = logits(
        hidden,
        weight,
        bias,
        temperature=temperature,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        vocab_size=size,
    )
    logp_NV = logits_NV.log_softmax(1)

    def at(index_NK: Tensor | None) -> Tensor:
        assert index_NK is not None
        return logp_NV.gather(1, index_NK)

    def versus_teacher(divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        assert teacher is not None
        with torch.no_grad():
            logq_NV = logits(
                teacher.hidden.to(logp_NV.dtype),
                teacher.weight,
                teacher.bias,
                temperature=temperature,
                soft_cap=teacher.soft_cap,
                logit_scale=teacher.logit_scale,
                vocab_size=size,
            ).log_softmax(1)
        return divergence(logp_NV, logq_NV)

    def versus_topk(reverse: bool) -> Tensor:
        assert topk is not None
        return topk_kl(at(topk.ids), topk.logps, reverse=reverse)

    make: dict[str, Callable[[], Tensor]] = {
        "logp": lambda: at(None if targets is None else targets.unsqueeze(1)).squeeze(1),
        "lse": lambda: logits_NV.logsumexp(1),
        "entropy": lambda: entropy(logp_NV),
        "logp_at_ids": lambda: at(ids),
        "reverse_kl": lambda: versus_teacher(kl),
        "forward_kl": lambda: versus_teacher(lambda p, q: kl(q, p)),
        "jsd": lambda: versus_teacher(lambda p, q: jsd(p, q, beta)),
        "skew_forward_kl": lambda: versus_teacher(lambda p, q: skew_forward_kl(p, q, alpha)),
        "skew_reverse_kl": lambda: versus_teacher(lambda p, q: skew_reverse_kl(p, q, alpha)),
        "total_variation": lambda: versus_teacher(total_variation),
        "topk_reverse_kl": lambda: versus_topk(True),
        "topk_forward_kl": lambda: versus_topk(False),
        "max_logp": lambda: logp_NV.detach().amax(1),
        "argmax": lambda: logp_NV.argmax(1),
    }
    unknown = [name for name in outputs if name not in make]
    if unknown:
        raise ValueError(f"outputs has {unknown}; it accepts {OUTPUTS}.")
    return TokenStats({name: make[name]() for name in outputs})


def _mix(loga_NV: Tensor, logb_NV: Tensor, share: float) -> Tensor:
    """``log(share · a + (1 - share) · b)``."""
    return torch.logaddexp(loga_NV + math.log(share), logb_NV + math.log1p(-share))


def _times(prob_NV: Tensor, value_NV: Tensor) -> Tensor:
    """``prob · value`` with ``0 · anything = 0``, in value and in gradient."""
    return prob_NV * torch.where(prob_NV > 0, value_NV, torch.zeros_like(value_NV))


def _minus(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """``a - b`` with ``-inf - x = 0``: such ids have no mass under ``a``."""
    keep_NV = a_NV > -math.inf
    zero = torch.zeros_like(a_NV)
    return torch.where(keep_NV, torch.where(keep_NV, a_NV, zero) - torch.where(keep_NV, b_NV, zero), zero)
