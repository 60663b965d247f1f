"""What every rank of a run knows, side by side."""

from __future__ import annotations

from typing import Any

import torch


def gathered_by_rank(state: Any) -> dict[str, Any]:
    """Every rank's state under its number; all ranks must call it."""
    states: list[Any] = [state]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        states = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, state)
    return {str(rank): one for rank, one in enumerate(states)}
