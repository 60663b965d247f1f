"""Decoding in step: a deadline, and equal numbers of forward passes on every rank of a sharded policy."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule


def has_peers() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_sharded(policy: nn.Module) -> bool:
    """Whether a forward pass of ``policy`` is a collective: FSDP2."""
    return any(isinstance(module, FSDPModule) for module in policy.modules())


class Pace:
    """What is agreed before every forward pass of a rollout.

    A rank that still has rows calls ``tick(working=True)`` before each forward pass, a rank that is done
    calls ``tick(working=False)`` and, while that says True, a forward pass whose result it ignores. All ranks
    thus make equally many passes, whatever their prompts, waves and lengths.

    Args:
        deadline_s: Seconds that the rollout may take; None: any.
        shared: Whether ranks go in step (one small all-reduce per pass over the default process group).
        device: Where the all-reduced tensor lives.
    """

    def __init__(self, deadline_s: float | None, shared: bool, device: torch.device) -> None:
        self.deadline_s, self.shared, self.device = deadline_s, shared, device
        self.rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self.steps = 0
        self._start = time.monotonic()

    def tick(self, working: bool, unfinished: int) -> bool:
        """Announce a forward pass.

        Args:
            working: Whether this rank has rows to decode.
            unfinished: Completions that are not finished yet, for the error message.

        Returns:
            Whether any rank makes a forward pass now.

        Raises:
            TimeoutError: On every rank, if the deadline has passed on one of them.
            RuntimeError: If another rank called :meth:`refuse`.
        """
        elapsed = time.monotonic() - self._start
        late = working and self.deadline_s is not None and elapsed > self.deadline_s
        any_works, late_rank, refusing_rank = self._agree(working, late, refuses=False)
        if refusing_rank is not None:
            raise RuntimeError(
                f"rollout: rank {refusing_rank} refused its prompts, so rank {self.rank} stops too; "
                f"the log of rank {refusing_rank} says why."
            )
        if late_rank is not None:
            raise TimeoutError(
                f"rollout: rank {late_rank} passed its deadline_s at step {self.steps}; on rank "
                f"{self.rank}, {unfinished} completions were unfinished after {elapsed:.1f} s "
                f"(deadline_s={self.deadline_s}). "
                "Raise deadline_s, or lower sampling.max_new_tokens, the number of prompts or n."
            )
        self.steps += 1
        return any_works

    def refuse(self) -> None:
        """Tell the other ranks, instead of a first tick, that this one raises an error."""
        self._agree(working=False, late=False, refuses=True)

    def _agree(self, working: bool, late: bool, refuses: bool) -> tuple[bool, int | None, int | None]:
        """Whether any rank works; the (highest) rank that is late; the one that refuses."""
        mine = (int(working), (self.rank + 1) * late, (self.rank + 1) * refuses)
        if self.shared:
            flags = torch.tensor(mine, device=self.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            mine = (int(flags[0]), int(flags[1]), int(flags[2]))
        works, late_rank, refusing = mine
        return bool(works), late_rank - 1 if late_rank else None, refusing - 1 if refusing else None
