"""Checkpoints that hold what trains, refuse what does not fit, and resume bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

from lightning_onpolicy.datamodules.ranks import gathered_by_rank
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.scalar import ScalarModel

_RNG_KEY = "onpolicy_rng"


class LeanCheckpoint(pl.LightningModule):
    """Mixin: frozen weights stay out of checkpoints; random-number states are in them, one per rank."""

    # Not Lightning's "hyper_parameters": LightningCLI lets what it finds there beat the command line.
    CHECKPOINT_HYPER_PARAMS_KEY = "onpolicy_hyper_parameters"
    _rng_to_restore: dict[str, Any] | None = None
    _loaders_to_restore: list[dict[str, Any]] | None = None

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Modules, by attribute name, whose weights are reloaded from their source and never saved."""
        return {}

    def _unsaved(self) -> set[str]:
        names = {
            f"{attribute}.{key}" for attribute, m in self.frozen_modules().items() for key in m.state_dict()
        }
        for attribute, child in self.named_children():
            if isinstance(child, Policy | ScalarModel) and child.has_adapters:
                names |= {f"{attribute}.{name}" for name in child.frozen_names()}
        return names

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All tensors but the frozen ones."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in self._unsaved():
            state.pop(prefix + name, None)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load; every tensor that trains must be there and fit.

        Raises:
            RuntimeError: If a trained tensor is missing or of another shape, or the checkpoint has one that the
                module lacks.
        """
        own = self.state_dict()
        for name in own.keys() & state_dict.keys():
            if own[name].shape != state_dict[name].shape:
                raise RuntimeError(
                    f"the checkpoint does not fit {type(self).__name__}: {name} has shape "
                    f"{tuple(state_dict[name].shape)} there and {tuple(own[name].shape)} here. "
                    "Was it made with another student or other adapters?"
                )
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = sorted(set(result.missing_keys) - self._unsaved())
        if missing or result.unexpected_keys:
            raise RuntimeError(
                f"the checkpoint does not fit {type(self).__name__}: missing {missing[:3]}… ({len(missing)}), "
                f"unexpected {list(result.unexpected_keys)[:3]}… ({len(result.unexpected_keys)}). "
                "Was it made with another student, other adapters, another method, or a kl.coef of 0 where it is more "
                "now, or the other way round?"
            )
        result.missing_keys.clear()  # frozen weights are missing on purpose; Lightning would warn of each
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store every rank's random-number states."""
        checkpoint[_RNG_KEY] = gathered_by_rank(_rng_state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember what is set when training starts: random-number states, after all set-up drew from them, and the
        loader's state, which lightning 2.6 does not restore from a checkpoint written at an epoch's end."""
        try:
            resuming = self.trainer.state.fn == "fit"
        except RuntimeError:  # no Trainer: only the weights are wanted
            resuming = False
        if resuming:
            self._rng_to_restore = checkpoint.get(_RNG_KEY)
            fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
            self._loaders_to_restore = fit_loop.get("state_dict", {}).get("combined_loader")

    def on_train_start(self) -> None:
        """Continue random numbers and prompts where the checkpoint left them."""
        loaders, self._loaders_to_restore = self._loaders_to_restore, None
        loader: Any = self.trainer.train_dataloader
        if loaders and len(loaders) == 1 and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(loaders[0])
        states, self._rng_to_restore = self._rng_to_restore, None
        if states is None:
            return
        if len(states) != self.trainer.world_size:
            raise RuntimeError(
                f"the checkpoint was written by {len(states)} ranks, this run has {self.trainer.world_size}: "
                "an exact resume needs the same number. To start anew from its weights, load them as the student."
            )
        _set_rng_state(states[str(self.global_rank)])


def _rng_state() -> dict[str, Any]:
    """Random-number states as tensors and plain values, which weights-only loading accepts."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
