"""How a rank of a test ends."""

from __future__ import annotations

import atexit

import torch.distributed as dist


def leave_at_exit() -> None:
    """End the process group before the interpreter goes: gloo's threads would outlive what they need, and abort."""
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
