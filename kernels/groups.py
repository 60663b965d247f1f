"""Process groups by name: schemas of custom ops hold strings, not groups.

torch 2.13 looks a group up by name only in private functions, hence a table of our own. It holds the groups
weakly, so that a destroyed group is gone from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_GROUPS: WeakValueDictionary[str, ProcessGroup] = WeakValueDictionary()


class Member(NamedTuple):
    """This process in a group: the group's name, this rank's number in it and how many ranks it has."""

    group: str
    rank: int
    ranks: int


def join(group: ProcessGroup | None) -> Member:
    """Make ``group`` (None: all ranks) known by its name.

    Raises:
        ValueError: If there is no process group, or this process is not in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("no process group: call torch.distributed.init_process_group first.")
    found = dist.group.WORLD if group is None else group
    assert found is not None
    rank = dist.get_rank(found)
    if rank < 0:
        raise ValueError(f"global rank {dist.get_rank()} is not in the group it was given.")
    _GROUPS[found.group_name] = found
    return Member(found.group_name, rank, dist.get_world_size(found))


def group_of(name: str) -> ProcessGroup:
    """The group that :func:`join` has made known as ``name``."""
    group = _GROUPS.get(name)
    if group is None:
        raise RuntimeError(
            f"process group {name!r} is gone or was never joined in this process: make a new VocabShard or "
            "RankTokens from a live group."
        )
    return group
