"""Weights copied from one module into another, in place: full, replicated or sharded."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def submodule(module: nn.Module, path: str, key: str) -> nn.Module:
    """The module at a dotted path of attributes.

    Args:
        module: Where the path begins.
        path: E.g. ``policy`` or ``actor.net``.
        key: The argument that holds the path, for errors.

    Raises:
        ValueError: If there is nothing at that path.
        TypeError: If it is not a module.
    """
    try:
        found = operator.attrgetter(path)(module)
    except AttributeError as error:
        raise ValueError(
            f"{key}={path!r}: {error}. Name an nn.Module of {type(module).__name__}, e.g. one of "
            f"{[name for name, _ in module.named_children()]}."
        ) from None
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"{key}={path!r} is {type(found).__name__} in {type(module).__name__}, not an nn.Module. A reference that "
            "is only the policy with its adapters off cannot be reset: keep a frozen copy of the policy."
        )
    return found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under each of their names; shards where it is sharded by FSDP2."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # what a forward pass has gathered is a copy: written to, it is lost; kept, it is stale
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named}  # torch.compile's wrapper


def check_copyable(source: nn.Module, target: nn.Module, names: tuple[str, str]) -> None:
    """Refuse a copy that would not make the target equal to the source.

    Args:
        source: Where weights come from.
        target: Where they go.
        names: What to call the two in errors.

    Raises:
        ValueError: If names, shapes, types or shards differ, the target shares memory with the source, or it trains.
    """
    a, b = tensors_of(source), tensors_of(target)
    one, other = names
    if a.keys() != b.keys():
        raise ValueError(
            f"{one} and {other} do not have the same tensors: only in {one} {_some(a.keys() - b.keys())}, only in "
            f"{other} {_some(b.keys() - a.keys())}. Make {other} a copy of {one}: copy.deepcopy({one})."
        )
    for name in a:
        x, y = _layout(a[name]), _layout(b[name])
        if x != y:
            raise ValueError(f"{name} is {x} in {one} and {y} in {other}: a copy would not be equal.")
    # Frozen weights may be shared: a base under adapters is then in memory once.
    moving = [t for t in a.values() if t.requires_grad or not isinstance(t, nn.Parameter)]
    memory = {local(t).untyped_storage().data_ptr() for t in moving if local(t).numel()}
    shared = {n for n, t in b.items() if local(t).numel() and local(t).untyped_storage().data_ptr() in memory}
    if shared:
        raise ValueError(
            f"{other} shares memory with {one} ({_some(shared)}): it would follow every step. Make it a copy of its "
            f"own: copy.deepcopy({one})."
        )
    trained = {name for name, p in target.named_parameters() if p.requires_grad}
    if trained:
        raise ValueError(
            f"{other} would train ({_some(trained)} require gradients): call {other}.requires_grad_(False)."
        )


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters and buffers; shards go to shards, without communication."""
    to = tensors_of(target)
    for name, tensor in tensors_of(source).items():
        local(to[name]).copy_(local(tensor))


@torch.no_grad()
def take_weights(module: nn.Module) -> dict[str, Tensor]:
    """Full copies in host memory of what can change: trained parameters and buffers that are saved.

    All ranks must call it, and each gets everything.
    """
    saved = {name.replace("_orig_mod.", "") for name in module.state_dict()}
    changing = {
        name: tensor
        for name, tensor in tensors_of(module).items()
        if tensor.requires_grad or (name in saved and not isinstance(tensor, nn.Parameter))
    }
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in changing.items()}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in full.items()}


@torch.no_grad()
def put_weights(weights: Mapping[str, Tensor], module: nn.Module) -> None:
    """Write what :func:`take_weights` took; each rank takes its shard from its own copy.

    Raises:
        ValueError: If they were taken from a module with other tensors.
    """
    to = tensors_of(module)
    for name, value in weights.items():
        if name not in to or to[name].shape != value.shape:
            there = tuple(to[name].shape) if name in to else "missing"
            raise ValueError(
                f"saved weights do not fit: {name} is {tuple(value.shape)} in them and {there} in the module."
            )
        tensor = to[name]
        value = value.to(tensor.device)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        local(tensor).copy_(local(value))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, detached, in the same memory."""
    tensor = tensor.detach()
    part: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part  # type: ignore[no-any-return]


def _layout(tensor: Tensor) -> str:
    text = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    return f"{text} as {tensor.placements}" if isinstance(tensor, DTensor) else text


def _some(names: Any) -> str:
    ordered = sorted(names)
    return f"{ordered[:3]}{f' and {len(ordered) - 3} more' if len(ordered) > 3 else ''}"
