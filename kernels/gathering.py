"""Ranks with tokens of their own and a head whose rows they share (FSDP2): the tokens travel, not the head.

Hidden states are gathered, every rank sweeps its rows for the tokens of all, and takes its own tokens'
statistics. With the loss ``Σ_r L_r`` over ranks, where ``L_r`` reads the statistics of rank r's tokens alone:

- The upstream gradient of all statistics is 0 in ``L_r`` outside r's tokens, so its sum over ranks is a
  concatenation: the gradient of *taking* rows is *gathering* them. ``token_stats`` then sees the same complete
  upstream gradient on every rank, as it must.
- ``token_stats`` returns the complete gradient of all hidden states on every rank, so that the gradient of
  *gathering* rows is *taking* one's own: a second sum would count it once per rank.

Gradients are therefore those of one process with all tokens and the loss ``Σ_r L_r``: of the hidden states on
the rank that brought them, of the weight's rows on the rank that holds them, needing no further reduction.
Autograd runs the backward nodes of several calls in the reverse order of the calls, whatever the losses made of
them, so that ranks meet in the same exchange.

Legend: ``N`` tokens of this rank, ``M`` tokens of all ranks, ``H`` hidden size, ``K`` ids per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_onpolicy.kernels.groups import group_of, join
from lightning_onpolicy.kernels.sharding import VocabShard
from lightning_onpolicy.kernels.spec import METRIC_OUTPUTS, TeacherHead, TokenStats, TopK
from lightning_onpolicy.kernels.token_stats import token_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class RankTokens:
    """How many tokens each rank of a group brings; made by :meth:`count` or :meth:`from_counts`.

    Args:
        group: Name of the process group.
        rank: This rank's number in the group.
        counts: Tokens per rank; some may be 0.
    """

    group: str
    rank: int
    counts: tuple[int, ...]

    @classmethod
    def count(cls, rows: int, group: ProcessGroup | None = None) -> RankTokens:
        """From this rank's number of tokens; a collective, which waits for the device.

        Args:
            rows: N.
            group: Process group, or None for all ranks.
        """
        member = join(group)
        found = [0] * member.ranks
        dist.all_gather_object(found, rows, group=group_of(member.group))
        return cls(member.group, member.rank, tuple(found))

    @classmethod
    def from_counts(cls, counts: Sequence[int], group: ProcessGroup | None = None) -> RankTokens:
        """From the counts of all ranks, without a collective.

        Args:
            counts: Tokens per rank; the same on every rank.
            group: Process group, or None for all ranks.

        Raises:
            ValueError: If there is not one count for each rank.
        """
        member = join(group)
        if len(counts) != member.ranks or min(counts) < 0:
            raise ValueError(f"counts must be {member.ranks} numbers >= 0, one for each rank: {counts}.")
        return cls(member.group, member.rank, tuple(counts))

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks, in the order of ranks.

        The gradient is this rank's rows of the upstream gradient, which must be complete and the same on every
        rank, as that of ``token_stats(..., shard=...)`` is.

        Args:
            x: ``[N, ...]``.

        Returns:
            ``[M, ...]``.

        Raises:
            ValueError: If ``x`` has not the rows that were counted; the message names the rank.
        """
        if x.shape[0] != self.counts[self.rank]:
            raise ValueError(
                f"rank {self.rank} brings {x.shape[0]} rows, but counted {self.counts[self.rank]} tokens."
            )
        out: Tensor = gather_rows_op(x, self.group, self.rank, list(self.counts))
        return out

    def take(self, stats: TokenStats) -> TokenStats:
        """Statistics of this rank's tokens.

        In the backward pass the ranks exchange upstream gradients, so each must run it, also one that brings no
        tokens: the sum of its empty statistics is a loss of 0 that takes part.

        Args:
            stats: Statistics of all M tokens.

        Returns:
            Those of this rank's N tokens.
        """
        first = sum(self.counts[: self.rank])
        rows = slice(first, first + self.counts[self.rank])
        out = {name: stats[name][rows] for name in stats if name in METRIC_OUTPUTS}
        # Side by side, so that one backward node sends all upstream gradients in one collective, whichever of
        # the outputs this rank's loss reads.
        columns = {name: x if x.ndim == 2 else x.unsqueeze(1) for name, x in stats.items() if name not in out}
        if columns:
            own = own_rows_op(torch.cat(list(columns.values()), 1), self.group, self.rank, list(self.counts))
            parts = own.split([x.shape[1] for x in columns.values()], 1)
            for name, part in zip(columns, parts, strict=True):
                out[name] = part if stats[name].ndim == 2 else part.squeeze(1)
        return TokenStats({name: out[name] for name in stats})


def gathered_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    shard: VocabShard,
    mask: Tensor | None = None,
    tokens: RankTokens | None = None,
    temperature: float | Tensor = 1.0,
    ids: Tensor | None = None,
    teacher: TeacherHead | None = None,
    topk: TopK | None = None,
    **options: Any,
) -> TokenStats:
    """`token_stats` of this rank's tokens with a head that is split over ranks; a collective.

    Gradients are those of one process with the tokens of all ranks and the sum of their losses. Every rank must
    run the backward pass through one of the results, or none.

    Args:
        hidden: ``[N, H]`` hidden states of this rank; N may differ over ranks and be 0.
        weight: This rank's rows of the head, or a DTensor.
        targets: ``[N]`` int64.
        shard: This rank's share of the head's rows.
        mask: ``[N]`` bool, given on every rank or on none.
        tokens: How many tokens each rank brings; None counts them, which waits for the device.
        temperature: Positive float, the same on every rank, or ``[N]``.
        ids: ``[N, K]`` int64.
        teacher: Teacher with this rank's tokens' hidden states and this rank's rows of its head.
        topk: Teacher log-probabilities at K ids of this rank's tokens.
        **options: Other arguments of ``token_stats``, the same on every rank.

    Returns:
        Statistics of this rank's N tokens.

    Raises:
        ValueError: See :func:`~lightning_onpolicy.kernels.token_stats.token_stats`.
    """
    if tokens is None:
        tokens = RankTokens.count(hidden.shape[0], group_of(shard.group))
    if teacher is not None:
        teacher = replace(teacher, hidden=tokens.gather(teacher.hidden.detach()))
    if topk is not None:
        topk = TopK(tokens.gather(topk.ids), tokens.gather(topk.logps.detach()))
    stats = token_stats(
        tokens.gather(hidden),
        weight,
        None if targets is None else tokens.gather(targets),
        temperature=tokens.gather(temperature) if isinstance(temperature, Tensor) else temperature,
        ids=None if ids is None else tokens.gather(ids),
        teacher=teacher,
        topk=topk,
        shard=shard,
        mask=None if mask is None else tokens.gather(mask),
        **options,
    )
    return tokens.take(stats)


def gather_rows(x: Tensor, group: str, rank: int, counts: list[int]) -> Tensor:
    """Rows of all ranks. Shorter ones are padded for the wire: gloo gathers equal sizes only."""
    longest = max(counts)
    out = x.new_empty((len(counts), longest, *x.shape[1:]))
    # Counts and trailing sizes are equal on all ranks, so all of them skip an empty exchange.
    if out.numel():
        padded = x.contiguous()
        if x.shape[0] < longest:
            padded = x.new_zeros((longest, *x.shape[1:]))
            padded[: x.shape[0]] = x
        dist.all_gather(list(out.unbind(0)), padded, group=group_of(group))
    return torch.cat([part[:count] for part, count in zip(out, counts, strict=True)])


def own_rows(x: Tensor, group: str, rank: int, counts: list[int]) -> Tensor:
    """This rank's rows, copied: outputs of an op may not alias its inputs."""
    return x.narrow(0, sum(counts[:rank]), counts[rank]).clone()


_SCHEMA = "(Tensor x, str group, int rank, SymInt[] counts) -> Tensor"
gather_rows_op = torch.library.custom_op(
    "lightning_onpolicy::gather_rows", gather_rows, mutates_args=(), schema=_SCHEMA
)
own_rows_op = torch.library.custom_op(
    "lightning_onpolicy::own_rows", own_rows, mutates_args=(), schema=_SCHEMA
)


@gather_rows_op.register_fake
def _(x: Tensor, group: str, rank: int, counts: list[int]) -> Tensor:
    return x.new_empty((sum(counts), *x.shape[1:]))


@own_rows_op.register_fake
def _(x: Tensor, group: str, rank: int, counts: list[int]) -> Tensor:
    return x.new_empty((counts[rank], *x.shape[1:]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.where = inputs[1:]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return own_rows_op(grad, *ctx.where), None, None, None


def _own_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return gather_rows_op(grad, *ctx.where), None, None, None


gather_rows_op.register_autograd(_gather_backward, setup_context=_remember)
own_rows_op.register_autograd(_own_backward, setup_context=_remember)
