"""What callbacks do to torch optimizers: forget, rewind, and scale one step. No Trainer here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adagrad, Optimizer

_SCHEDULED = ("lr", "momentum", "betas")  # what torch's schedules write into parameter groups
_UNSCALED = "unscaled_lr"


def raw(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Lightning's wrapper, or as it is."""
    return optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer


def refuse_unforgetting(optimizer: Optimizer) -> None:
    """Refuse optimizers that cannot go on without state.

    Raises:
        ValueError: For Adagrad, which fills its state when it is made and never again.
    """
    if isinstance(optimizer, Adagrad):
        raise ValueError(
            "Adagrad cannot go on without the state it was made with: use another optimizer, or leave it out of "
            "OptimizerReset.optimizers."
        )


def forget(optimizer: Optimizer) -> None:
    """Empty the optimizer's state, so that its next step is its first; weights and parameter groups stay."""
    states = optimizer.state.items()
    paged = {p: state for p, state in states if any(getattr(v, "is_paged", False) for v in state.values())}
    optimizer.state.clear()
    for p, state in paged.items():  # bitsandbytes never frees paged memory: new state would leak the old
        optimizer.state[p] = state
        state["step"] = 0
        for name, value in state.items():
            if isinstance(value, Tensor) and not name.startswith("qmap"):  # qmap: the constant code book
                value.zero_()


def forget_sharded(optimizer: Optimizer) -> bool:
    """Forget so that a checkpoint may be written before the next step, if parameters are sharded.

    torch's distributed checkpoint cannot load an empty state. Where there are no gradients it therefore fills the state
    first, by a step of its own with zero gradients and learning rate; where there are some, it saves what it will fail
    to load (torch 2.13).

    Returns:
        Whether parameters are sharded: then :func:`forget` once more, right before the next step.
    """
    forget(optimizer)
    sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    if sharded:
        optimizer.zero_grad(set_to_none=True)
    return sharded


def beginning(optimizers: Sequence[Optimizer], schedules: Sequence[Any]) -> dict[str, Any]:
    """What :func:`rewind` goes back to: schedules' states, and what schedules write into parameter groups."""
    return copy.deepcopy(
        {
            "groups": [[{k: g[k] for k in _SCHEDULED if k in g} for g in o.param_groups] for o in optimizers],
            "schedules": [schedule.state_dict() for schedule in schedules],
        }
    )


def rewind(
    optimizers: Sequence[Optimizer], schedules: Sequence[Any], chosen: Sequence[int], start: dict[str, Any]
) -> None:
    """Put the schedules of the chosen optimizers back to where they were.

    Args:
        optimizers: All optimizers, as they were given to :func:`beginning`.
        schedules: All schedules, likewise.
        chosen: Indices of optimizers.
        start: From :func:`beginning`.
    """
    start = copy.deepcopy(start)
    mine = [optimizers[i] for i in chosen]
    for schedule, state in zip(schedules, start["schedules"], strict=True):
        if any(raw(schedule.optimizer) is o for o in mine):
            schedule.load_state_dict(state)
    for i in chosen:
        for group, values in zip(optimizers[i].param_groups, start["groups"][i], strict=True):
            group.update(values)


def scale_lr(optimizer: Optimizer, factor: float) -> None:
    """Multiply the learning rates for the coming step, until :func:`restore_lr`; factors of several callers multiply.

    Schedules never see it. Many of them compute the next rate from the present one, and would carry a factor on.
    """
    for group in optimizer.param_groups:
        group.setdefault(_UNSCALED, group["lr"])
        group["lr"] = group["lr"] * factor


def restore_lr(optimizer: Optimizer, *_: Any) -> None:
    """The rates before :func:`scale_lr`: to be registered as a step post-hook."""
    for group in optimizer.param_groups:
        if _UNSCALED in group:
            group["lr"] = group.pop(_UNSCALED)
