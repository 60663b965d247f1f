"""What the methods need to know about ranks, through Lightning's public interface."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn


@runtime_checkable
class ShardsApart(Protocol):
    """A model of several dtypes, which FSDP2 cannot have in one group of parameters."""

    def sharded_apart(self) -> list[nn.Module]:
        """Sub-modules, each to be a group of its own."""


def data_parallel_size(trainer: Any) -> int:
    """Number of ranks that see different data: what DDP and FSDP2 divide gradients by."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return int(trainer.strategy.distributed_sampler_kwargs["num_replicas"])
    return int(trainer.world_size)


def reduce_ranks(trainer: Any, value: Tensor, op: str) -> Tensor:
    """Sum (each data-parallel share once) or maximum over ranks.

    Args:
        trainer: The Trainer.
        value: Any tensor, of equal shape on all ranks.
        op: ``"sum"`` or ``"max"``.
    """
    if trainer.world_size == 1:
        return value
    out: Tensor = trainer.strategy.reduce(value.clone(), reduce_op=op)
    copies = trainer.world_size // data_parallel_size(trainer)  # tensor-parallel peers hold the same data
    return out / copies if op == "sum" and copies > 1 else out


def data_parallel_group(mesh: Any) -> Any:
    """The process group over which a module's metrics are gathered: of ranks that hold different data.

    Args:
        mesh: The module's ``device_mesh``; None, without one, means all ranks.
    """
    return None if mesh is None else mesh["data_parallel"].get_group()


def blocked_sync(trainer: Any) -> contextlib.AbstractContextManager[Any]:
    """Gradients stay local inside (DDP); FSDP2 reduces every backward pass, which costs time but not truth."""
    if isinstance(trainer.strategy, ParallelStrategy):
        return trainer.strategy.block_backward_sync()
    return contextlib.nullcontext()


def must_reduce_by_hand(trainer: Any) -> bool:
    """Whether gradients are averaged outside DDP: its reducer allows one backward pass per forward pass of the whole
    module, and a module with two optimizers makes one for each."""
    return isinstance(trainer.strategy, DDPStrategy) and len(trainer.optimizers) > 1


def average_gradients(parameters: list[nn.Parameter], ranks: int) -> None:
    """All-reduce the gradients of one optimizer; a rank without a gradient counts as zero."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        torch.distributed.all_reduce(p.grad)
        p.grad /= ranks


def refuse_unfit(trainer: Any) -> None:
    """Raise where manual optimisation would be silently wrong; warn where ranks would repeat each other's work."""
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ValueError("FSDP1 cannot run manual optimisation: use ModelParallelStrategy (FSDP2) instead.")
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError("DeepSpeed is not supported: use DDP or ModelParallelStrategy (FSDP2) instead.")
    if trainer.precision == "16-mixed":
        raise ValueError(
            "precision=16-mixed scales losses, which clipping here does not undo: use bf16-mixed."
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        ranks, data = int(trainer.world_size), data_parallel_size(trainer)
        if data < ranks:  # Lightning's default within a node
            rank_zero_warn(
                f"ModelParallelStrategy made {ranks // data} of {ranks} ranks tensor-parallel peers, and the policy is "
                "not split that way: they all do the same work. Pass "
                f"ModelParallelStrategy(data_parallel_size={ranks}, tensor_parallel_size=1) to share it."
            )


def refuse_second_derivative(trainer: Any) -> None:
    """Raise where a gradient penalty would crash: FSDP2 frees gathered weights after the first of two derivatives."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError("r1 differentiates twice, which FSDP2 cannot do: use DDP instead, or set r1 to 0.")


def shard(policy: nn.Module, mesh: Any, blocks: list[nn.Module]) -> None:
    """FSDP2: shard ``blocks`` one by one, then ``policy`` itself, and let ``decode`` run its hooks."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(policy, FSDPModule):  # a live policy that an earlier module has sharded
        return
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    for method in ("decode", "hidden"):
        if hasattr(policy, method):
            register_fsdp_forward_method(policy, method)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model (the members of its largest ``ModuleList``), and what it wants sharded apart."""
    apart = model.sharded_apart() if isinstance(model, ShardsApart) else []
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        return apart
    largest: nn.ModuleList = max(
        lists, key=lambda blocks: sum(p.numel() for p in nn.Module.parameters(blocks))
    )
    return [*largest, *apart]


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clip by the global norm and return it, before clipping (also for sharded gradients).

    Args:
        parameters: Those of one optimizer.
        max_norm: None measures without clipping.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    full = getattr(norm, "full_tensor", None)
    return full() if full is not None else norm
