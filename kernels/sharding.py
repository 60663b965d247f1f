"""Which rows of the output heads this rank holds, and the arguments of `token_stats` cut to them.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` rows of the head over all ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_onpolicy.kernels.groups import group_of, join
from lightning_onpolicy.kernels.spec import TeacherHead

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class VocabShard:
    """The rows of output heads that this rank holds, for ``token_stats(..., shard=...)``.

    Made by :meth:`from_rows`, :meth:`from_bounds` or :meth:`from_dtensor`, which also make the process group
    known to the ops.

    Args:
        group: Name of the process group over whose ranks the rows are split.
        rank: This rank's number in the group.
        bounds: Rank r holds ids ``[bounds[r], bounds[r + 1])``, which may be none; the first bound is 0.
        verify: Whether every call compares its arguments over the ranks, at the price of a collective and
            of waiting for the device. None: on the CPU only.
    """

    group: str
    rank: int
    bounds: tuple[int, ...]
    verify: bool | None = None

    def __post_init__(self) -> None:
        _check_bounds(self.bounds)
        if not 0 <= self.rank < len(self.bounds) - 1:
            raise ValueError(
                f"bounds are those of {len(self.bounds) - 1} ranks; there is no rank {self.rank}."
            )

    @classmethod
    def from_rows(
        cls,
        rows: int,
        group: ProcessGroup | None = None,
        *,
        start: int | None = None,
        verify: bool | None = None,
    ) -> VocabShard:
        """From this rank's number of rows; a collective over the group.

        Args:
            rows: Rows of the weight on this rank, padding included.
            group: Process group, or None for all ranks.
            start: Id of its first row, where the caller knows it; None: rows follow each other in the order
                of ranks.
            verify: See the class.

        Raises:
            ValueError: If the shards do not tile ``[0, V)`` in the order of ranks; the message names the rank.
        """
        member = join(group)
        found: list[tuple[int | None, int]] = [(None, 0)] * member.ranks
        dist.all_gather_object(found, (start, rows), group=group_of(member.group))
        bounds = (0, *accumulate(size for _, size in found))
        for rank, ((given, _), want) in enumerate(zip(found, bounds, strict=False)):
            if given not in (None, want):
                raise ValueError(
                    f"rank {rank} starts at id {given}, but the ranks before it hold ids [0, {want}): shards must "
                    "tile the vocabulary in the order of ranks."
                )
        return cls(member.group, member.rank, bounds, verify)

    @classmethod
    def from_bounds(
        cls, bounds: tuple[int, ...], group: ProcessGroup | None = None, *, verify: bool | None = None
    ) -> VocabShard:
        """From the bounds of all ranks, without a collective.

        Args:
            bounds: As in the class; the same on every rank.
            group: Process group, or None for all ranks.
            verify: See the class.

        Raises:
            ValueError: If there is not one shard for each rank of the group.
        """
        member = join(group)
        if len(bounds) != member.ranks + 1:
            raise ValueError(
                f"bounds must have {member.ranks + 1} entries for {member.ranks} ranks: {bounds}."
            )
        return cls(member.group, member.rank, tuple(bounds), verify)

    @classmethod
    def from_dtensor(cls, weight: Tensor, *, verify: bool | None = None) -> VocabShard:
        """From a sharded weight, as of FSDP2 or ``distribute_tensor``; without a collective.

        Args:
            weight: ``[V, H]`` DTensor with placement ``Shard(0)`` on a 1-D mesh.
            verify: See the class.

        Raises:
            ValueError: If it is anything else.
        """
        from torch.distributed.tensor import DTensor

        if not isinstance(weight, DTensor):
            raise ValueError(
                f"weight is a {type(weight).__name__}, not a DTensor: for plain rows use VocabShard.from_rows."
            )
        return cls.from_bounds(_rows_of(weight), weight.device_mesh.get_group(), verify=verify)

    @property
    def start(self) -> int:
        """Id of this rank's first row."""
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        """One past the id of its last row."""
        return self.bounds[self.rank + 1]

    def true_size(self, vocab_size: int | None) -> int:
        """True vocabulary size over all ranks: ``vocab_size``, or all rows.

        Raises:
            ValueError: If there are fewer rows than that.
        """
        if vocab_size is None:
            return self.bounds[-1]
        if not 0 < vocab_size <= self.bounds[-1]:
            raise ValueError(
                f"vocab_size must be in [1, V={self.bounds[-1]}] (rows of all ranks), got {vocab_size}."
            )
        return vocab_size

    def own_size(self, total: int) -> int:
        """How many of this rank's rows belong to a true vocabulary of ``total`` ids."""
        return max(0, min(self.stop, total) - self.start)

    def local(self, name: str, x: Tensor, total: int, *, exact: bool = True) -> Tensor:
        """This rank's rows of a weight or bias: ``x`` itself, or the local part of a DTensor.

        Args:
            name: What ``x`` is, for errors.
            x: Rows of this rank, or a DTensor sharded like ``bounds``.
            total: True vocabulary size.
            exact: Whether rows of padding must be cut like ``bounds`` too.

        Raises:
            ValueError: If ``x`` holds other rows; the message names the rank.
        """
        if _is_dtensor(x):
            bounds = _rows_of(x)
            limit = self.bounds[-1] if exact else total
            if [min(b, limit) for b in bounds] != [min(b, limit) for b in self.bounds]:
                raise ValueError(
                    f"{name} is cut at rows {bounds}, shard at {self.bounds}: redistribute it, or make the shard "
                    "from it."
                )
            x = x.to_local()
        rows, want = x.shape[0], self.stop - self.start
        if rows != want and (exact or self.stop < total or rows < self.own_size(total)):
            raise ValueError(
                f"{name} has {rows} rows on rank {self.rank}, whose shard is ids [{self.start}, {self.stop})."
            )
        return x

    def local_teacher(self, teacher: TeacherHead, total: int) -> TeacherHead:
        """The teacher with this rank's rows, its padding named as such.

        Raises:
            ValueError: If it holds other rows, or has another vocabulary.
        """
        if teacher.vocab_size not in (None, total):
            raise ValueError(
                f"student and teacher must share one vocabulary: sizes are {total} and {teacher.vocab_size}."
            )
        weight = self.local("teacher.weight", teacher.weight, total, exact=False)
        bias = None if teacher.bias is None else self.local("teacher.bias", teacher.bias, total, exact=False)
        return replace(teacher, weight=weight, bias=bias, vocab_size=self.own_size(total))

    def verify_same(
        self, device: torch.device, facts: Mapping[str, int | float | str | Tensor | None]
    ) -> None:
        """Compare facts over the ranks, in one collective, if ``verify`` says so.

        Args:
            device: Where the collective runs.
            facts: The same names on every rank; of tensors, the sum of their bit patterns is compared.

        Raises:
            ValueError: On all ranks, if a fact differs; the message names it and a rank.
        """
        if not (device.type == "cpu" if self.verify is None else self.verify):
            return
        own = torch.tensor([_print(x) for x in facts.values()], dtype=torch.int64, device=device)
        ranks = len(self.bounds) - 1
        found = own.new_empty((ranks, len(facts)))
        dist.all_gather(list(found.unbind(0)), own, group=group_of(self.group))
        first, *others = found.tolist()
        for rank, other in enumerate(others, 1):
            for (name, value), a, b in zip(facts.items(), first, other, strict=True):
                if a != b:
                    values = f" ({b} and {a})" if isinstance(value, int) else ""
                    raise ValueError(
                        f"ranks {rank} and 0 of the group call token_stats with different {name}{values}: over a "
                        "shard's ranks all arguments but the heads' rows must be equal; ranks with tokens of their "
                        "own use gathered_token_stats."
                    )


def _check_bounds(bounds: tuple[int, ...]) -> None:
    if len(bounds) < 2 or bounds[0] != 0 or any(a > b for a, b in pairwise(bounds)) or bounds[-1] < 1:
        raise ValueError(f"bounds must rise from 0 to the number of rows, got {bounds}.")


def _is_dtensor(x: Tensor) -> TypeGuard[DTensor]:
    # DTensors exist only in a process group; importing them takes longer than all else here.
    if type(x) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _rows_of(x: DTensor) -> tuple[int, ...]:
    """Bounds of the rows of a ``Shard(0)`` DTensor: equal chunks, as many as there are rows for."""
    from torch.distributed.tensor import Shard

    mesh, placements = x.device_mesh, x.placements
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ValueError(
            f"the head's rows must be split over a 1-D mesh, Shard(0); it is {placements} on a mesh of "
            f"{mesh.ndim} dimensions."
        )
    V, ranks = x.shape[0], mesh.size()
    chunk = -(-V // ranks)
    return tuple(min(rank * chunk, V) for rank in range(ranks + 1))


def _print(value: int | float | str | Tensor | None) -> int:
    """An int64 that is equal for equal values: of tensors, the sum of the bit patterns, in any order."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous()
        return int(flat.view(_BITS[flat.element_size()]).sum(dtype=torch.int64))
    return value if isinstance(value, int) else zlib.crc32(repr(value).encode())
