"""The trained policy as a folder that plain transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_onpolicy.callbacks.model_card import model_card
from lightning_onpolicy.callbacks.protocol import SavesPolicy, WarnOnce
from lightning_onpolicy.modules.folders import check_replaceable, check_writable, whole_folder
from lightning_onpolicy.modules.saving import gathered_state_dict

When = Literal["end", "every_checkpoint"]


class ExportHF(Callback):
    """Writes weights, tokenizer (chat template included), generation config and a model card.

    A folder appears whole or not at all. An export replaces an earlier export of the same name and nothing
    else: a folder that holds anything but an export is refused before training starts. Nothing is written by
    ``fast_dev_run``.

    Args:
        folder: Destination.
        when: ``end`` writes ``folder`` when training ends; ``every_checkpoint`` writes ``folder/step-<n>``
            with each checkpoint, and when training ends.
        merge: With adapters: True saves a whole model with the adapters merged into a copy of its weights;
            False saves the adapters alone.

    Raises:
        ValueError: If ``when`` is unknown, or adapters would be merged into quantised weights.
        FileExistsError: If the destination holds something that is not an export.
    """

    def __init__(self, folder: str, when: When = "end", merge: bool = True) -> None:
        if when not in get_args(When):
            raise ValueError(f"ExportHF's when must be one of {get_args(When)}, got {when!r}.")
        self.folder, self.when, self.merge = Path(folder), when, merge
        self._last_step: int | None = None
        self._warn = WarnOnce("ExportHF")

    @property
    def state_key(self) -> str:
        """Different for exports to different places."""
        return f"ExportHF(folder={str(self.folder)!r})"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse now what would fail after hours of training."""
        self._last_step = None
        policy = self._policy(pl_module)
        if policy is None:
            return
        quantised = getattr(getattr(policy, "spec", None), "quantize", None)
        if self.merge and quantised and getattr(policy, "has_adapters", False):
            raise ValueError(
                f"ExportHF cannot merge adapters into weights quantised to {quantised}: set merge: false, or "
                "load the student without quantize."
            )
        if self.when == "end":
            check_replaceable(self.folder)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            place = self.folder if self.when == "end" else self.folder / "step"
            check_writable(place, "ExportHF's folder")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Export beside a checkpoint."""
        if self.when == "every_checkpoint":
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export what training arrived at."""
        self._export(trainer, pl_module)

    def _policy(self, module: pl.LightningModule) -> SavesPolicy | None:
        # Not isinstance: on Python 3.12 a protocol's check does not see what a module has as its children.
        policy = getattr(module, "policy", None)
        if all(hasattr(policy, name) for name in ("model", "tokenizer", "save_pretrained")):
            return cast("SavesPolicy", policy)
        self._warn(
            f"{type(module).__name__} has no .policy with .model, .tokenizer and .save_pretrained: nothing "
            "is exported."
        )
        return None

    def _export(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        policy = self._policy(module)
        dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if policy is None or dry or self._last_step == trainer.global_step:
            return
        self._last_step = trainer.global_step
        # Sharded weights are gathered by all ranks together; rank 0 then writes alone.
        sharded = any(isinstance(p, DTensor) for p in policy.model.parameters())
        state = gathered_state_dict(policy.model) if sharded else None
        if not trainer.is_global_zero:
            return
        target = self.folder
        if self.when == "every_checkpoint":
            target = self.folder / f"step-{trainer.global_step:08d}"
        self._write(trainer, module, policy, target, state)
        rank_zero_info(f"ExportHF: step {trainer.global_step} is in {target}")

    def _write(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        policy: SavesPolicy,
        target: Path,
        state: Mapping[str, Tensor] | None,
    ) -> None:
        with whole_folder(target, trainer.global_step) as folder:
            policy.save_pretrained(folder, merge=self.merge, state_dict=state)
            adapters_only = bool(getattr(policy, "has_adapters", False)) and not self.merge
            card = model_card(trainer, module, adapters_only=adapters_only)
            (folder / "README.md").write_text(card, encoding="utf-8")
