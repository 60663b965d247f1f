"""Per-token statistics of a language-model head, from hidden states, without ``[tokens, vocab]`` logits.

One composable op instead of fused losses: any subset of statistics, each differentiable with arbitrary
per-token upstream gradients, so that policy-gradient and distillation losses stay ordinary PyTorch over its
outputs.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` rows of the head (true vocabulary and padding), ``K`` ids per
token; ``p`` student, ``q`` teacher, both at the same temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_onpolicy.kernels.checks import check
from lightning_onpolicy.kernels.divergences import CURVED
from lightning_onpolicy.kernels.epilogues import buffers, choose
from lightning_onpolicy.kernels.head_logits import accumulation_dtype, operand_dtype
from lightning_onpolicy.kernels.ops import Problem, token_stats_op
from lightning_onpolicy.kernels.sharding import VocabShard
from lightning_onpolicy.kernels.spec import TEACHER_OUTPUTS, TOPK_OUTPUTS, TeacherHead, TokenStats, TopK
from lightning_onpolicy.kernels.tiles import (
    DEFAULT_BUDGET_BYTES,
    kept_columns,
    strip_elements,
    tile_elements,
)
from lightning_onpolicy.kernels.topk import topk_kl


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
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    shard: VocabShard | None = None,
) -> TokenStats:
    """Statistics of ``p = softmax(soft_cap(logit_scale · hidden @ weightᵀ + bias) / temperature)``.

    Differentiable with respect to ``hidden``, ``weight`` and ``bias``, once (no double backward); gradients
    are computed only where ``requires_grad`` asks, so a frozen head costs no product for its weight.

    Outputs:
        - ``logp``: log p of the target.
        - ``lse``: log-sum-exp of the logits over the temperature.
        - ``entropy``: entropy of p, in nats.
        - ``logp_at_ids``: ``[N, K]`` log p at ``ids``.
        - ``reverse_kl``: KL(p || q); ``forward_kl``: KL(q || p).
        - ``jsd``: β KL(q || m) + (1-β) KL(p || m), m = β q + (1-β) p.
        - ``skew_forward_kl``: KL(q || α q + (1-α) p); ``skew_reverse_kl``: KL(p || (1-α) q + α p).
        - ``total_variation``: ½ Σ |p - q|.
        - ``topk_reverse_kl``, ``topk_forward_kl``: KL over the ids of ``topk`` and a bucket for all other
          ids.
        - ``max_logp``, ``argmax`` (int64): the most probable id; metrics, without gradient.

    Args:
        hidden: ``[N, H]`` last hidden states, after the final norm; floating point.
        weight: ``[V, H]`` output head.
        targets: ``[N]`` int64 ids, needed by ``logp``. There is no ignore index: see ``mask``. Ids outside the
            vocabulary raise on the CPU and give NaN elsewhere.
        outputs: Names of statistics to compute, in the order they come back.
        bias: ``[V]``, added after the scale. Ids with a bias of -inf have probability 0.
        temperature: Positive float or ``[N]`` tensor, applied to student and teacher; gets no gradient.
        soft_cap: Cap of ``cap · tanh(x / cap)`` (Gemma 2: ``final_logit_softcapping``), or None.
        logit_scale: Factor on the product (Cohere: ``logit_scale``).
        vocab_size: True vocabulary size; later rows of ``weight`` are padding with probability 0.
        ids: ``[N, K]`` int64, needed by ``logp_at_ids``.
        teacher: White-box teacher, needed by the divergences over the full vocabulary.
        topk: Teacher log-probabilities at K ids, needed by the top-k divergences.
        mask: ``[N]`` bool. Rows that are False are never computed, whatever their hidden states, ids,
            temperature and teacher hold: they come back as 0 in every output and get no gradient. All other
            arguments keep their N rows. Counting the rows waits for the device, once forward and once backward;
            callers that must not wait drop rows themselves.
        beta: Teacher share of the JSD mixture, in (0, 1). Towards 0 and 1 the JSD vanishes: its limits are
            not the KLs, which are outputs of their own.
        alpha: Share of the first argument in the skew KLs' mixture, in (0, 1).
        budget_bytes: Bytes of logits the call may hold, workspace included. Logits are kept for the backward
            pass (and for the second pass of the JSD, skew KLs and total variation) while the budget lasts, and
            recomputed past it. The workspace has a least size that depends neither on N nor on V: on the CPU
            16 MiB for each head and 1 MiB for each of two to eight intermediate results, elsewhere 32 MiB for each
            head (float32).
        shard: Where the heads' rows are split over ranks: this rank's share. ``weight``, ``bias`` and the
            teacher's are then its rows (or DTensors so sharded), all else is the same on every rank, and
            ``vocab_size`` counts the rows of all. Every rank gets the complete statistics and the complete
            gradient of ``hidden``, and must run the backward pass with the same upstream gradients. Ranks
            with tokens of their own use
            :func:`~lightning_onpolicy.kernels.gathering.gathered_token_stats`.

    Returns:
        Statistics by name, ``[N]`` float32 (float64 where ``hidden`` is float64).

    Raises:
        ValueError: If an output is unknown, a tensor that an output needs is missing, or a shape, dtype,
            device or range is wrong; the message names the argument.

    Example:
        >>> hidden, weight = torch.randn(3, 8), torch.randn(50, 8, requires_grad=True)
        >>> stats = token_stats(hidden, weight, torch.tensor([1, 2, 3]), outputs=("logp", "entropy"))
        >>> (-stats.logp.mean() - 0.01 * stats.entropy.mean()).backward()
        >>> weight.grad.shape
        torch.Size([50, 8])
    """
    total = 0
    if shard is None:
        teacher = _gather(teacher)
    else:
        total = shard.true_size(vocab_size)
        weight = shard.local("weight", weight, total)
        bias = None if bias is None else shard.local("bias", bias, total)
        teacher = None if teacher is None else shard.local_teacher(teacher, total)
        vocab_size = shard.own_size(total)
    size = check(
        hidden,
        weight,
        targets,
        outputs=outputs,
        bias=bias,
        temperature=temperature,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        ids=ids,
        teacher=teacher,
        topk=topk,
        mask=mask,
        beta=beta,
        alpha=alpha,
        budget_bytes=budget_bytes,
        sharded=shard is not None,
    )
    if topk is not None and mask is not None:
        # No support: both tails are everything, and the divergence is 0 in value and gradient.
        topk = replace(topk, logps=topk.logps.masked_fill(~mask.unsqueeze(1), -torch.inf))
    needs_teacher = any(name in TEACHER_OUTPUTS for name in outputs)
    used = teacher if needs_teacher else None
    index, columns = _index(outputs, targets, ids, topk)
    names = [name for name in outputs if name not in ("logp", "logp_at_ids", *TOPK_OUTPUTS)]
    if index is not None:
        names.append("index_logp")
    operand = operand_dtype(hidden, weight)
    itemsize = 8 if operand == torch.float64 else 4
    streams = 1 if used is None else 2
    curved = any(name in CURVED for name in names)
    epilogue = choose(hidden.device.type, accumulation_dtype(operand))
    device = hidden.device.type
    whole, strips = buffers(epilogue, streams, capped=soft_cap is not None, curved=curved)
    elements = tile_elements(device, budget_bytes, whole + strips, itemsize)
    trained = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    kept = 0
    if (trained and torch.is_grad_enabled()) or curved:
        left = budget_bytes - (whole * elements + strips * strip_elements(device, elements)) * itemsize
        kept = kept_columns(hidden.shape[0], size, bytes_left=left, streams=streams, itemsize=itemsize)
    problem = Problem(
        hidden=hidden,
        weight=weight,
        bias=bias,
        index=index,
        temperature=_temperature(temperature, hidden),
        teacher_hidden=None if used is None else used.hidden.detach(),
        teacher_weight=None if used is None else used.weight.detach(),
        teacher_bias=None if used is None or used.bias is None else used.bias.detach(),
        mask=mask,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        teacher_soft_cap=None if used is None else used.soft_cap,
        teacher_logit_scale=1.0 if used is None else used.logit_scale,
        vocab_size=size,
        beta=beta,
        alpha=alpha,
        operand_dtype=operand,
        teacher_operand_dtype=operand
        if used is None
        else operand_dtype(used.hidden, used.weight, like=hidden),
        tile_elements=elements,
        kept=kept,
        epilogue=epilogue,
        group=None if shard is None else shard.group,
        first_id=0 if shard is None else shard.start,
        total_size=total,
    )
    if shard is not None and not torch.compiler.is_compiling():
        shard.verify_same(hidden.device, _facts(names, problem))
    found = dict(zip(names, token_stats_op(",".join(names), *problem.arguments()), strict=False))
    picked = found.pop("index_logp", None)
    if picked is not None:
        parts = dict(zip(columns, picked.split(list(columns.values()), dim=1), strict=True))
        if "logp" in parts:
            found["logp"] = parts["logp"].squeeze(1)
        if "logp_at_ids" in parts:
            found["logp_at_ids"] = parts["logp_at_ids"]
        if topk is not None and "topk" in parts:
            for name in TOPK_OUTPUTS:
                if name in outputs:
                    found[name] = topk_kl(parts["topk"], topk.logps, reverse=name == "topk_reverse_kl")
    return TokenStats({name: found[name] for name in outputs})


def _index(
    outputs: Sequence[str], targets: Tensor | None, ids: Tensor | None, topk: TopK | None
) -> tuple[Tensor | None, dict[str, int]]:
    """All ids whose log-probabilities are wanted, side by side, and how many columns are whose."""
    parts: dict[str, Tensor] = {}
    if "logp" in outputs and targets is not None:
        parts["logp"] = targets.unsqueeze(1)
    if "logp_at_ids" in outputs and ids is not None:
        parts["logp_at_ids"] = ids
    if topk is not None and any(name in TOPK_OUTPUTS for name in outputs):
        parts["topk"] = topk.ids
    if not parts:
        return None, {}
    return torch.cat(list(parts.values()), dim=1), {name: part.shape[1] for name, part in parts.items()}


def _temperature(temperature: float | Tensor, hidden: Tensor) -> Tensor | None:
    if isinstance(temperature, Tensor):
        return temperature.detach()
    if temperature == 1:
        return None
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_full((hidden.shape[0],), temperature, dtype=dtype)


def _facts(names: Sequence[str], problem: Problem) -> dict[str, int | float | str | Tensor | None]:
    """What must be equal over the ranks of a shard, the shapes first."""
    p = problem
    return {
        "outputs": ",".join(names),
        "N (rows of hidden)": p.hidden.shape[0],
        "H (width of hidden)": p.hidden.shape[1],
        "K (ids per token)": 0 if p.index is None else p.index.shape[1],
        "vocab_size": p.total_size,
        "dtype": str(p.hidden.dtype),
        "hidden.requires_grad": p.hidden.requires_grad and torch.is_grad_enabled(),
        "hidden": p.hidden,
        "targets, ids or topk.ids": p.index,
        "mask": p.mask,
        "temperature": p.temperature,
        "teacher.hidden": p.teacher_hidden,
        "options": repr(
            (p.soft_cap, p.logit_scale, p.teacher_soft_cap, p.teacher_logit_scale, p.beta, p.alpha)
        ),
    }


def _gather(teacher: TeacherHead | None) -> TeacherHead | None:
    """The teacher with a plain weight and bias: sharded ones are gathered for the call."""
    # DTensors exist only in a process group; importing them takes longer than all else here.
    if teacher is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return teacher
    from torch.distributed.tensor import DTensor

    def plain(x: Tensor) -> Tensor:
        return x.full_tensor() if isinstance(x, DTensor) else x

    bias = None if teacher.bias is None else plain(teacher.bias)
    return replace(teacher, weight=plain(teacher.weight), bias=bias)
