"""A policy held near a frozen copy of itself, in a plain LightningModule: what resets are tried on.

Also a script: ``torchrun --nproc-per-node N anchored.py STRATEGY OUT`` trains it on N ranks with all resets.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from leaving import leave
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_onpolicy.callbacks.resets import OptimizerReset, ReferenceReset
from lightning_onpolicy.callbacks.triggers import Ceiling, Stall

KL_COEF = 0.3


class Stream:
    """A sized, resumable loader of random batches, different on each rank."""

    def __init__(self, count: int, rank: int = 0) -> None:
        self.count, self.rank, self.done = count, rank, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        start = self.done if self.done < self.count else 0
        for number in range(start, self.count):
            self.done = number + 1
            yield torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * self.rank + number))

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Anchored(pl.LightningModule):
    """Four classes, a cross-entropy to where the largest inputs are, and the exact KL to the reference.

    Args:
        optimizer: From parameters to an optimizer.
        schedule: From the optimizer to a schedule, stepped with the optimizer.
        scores: Validation score at each optimizer step: a list, or from the step and the rank.
        spikes: Batches, by the optimizer steps before them, at which ``spike`` is logged as 1.
        manual: Two optimizer steps per batch by hand, instead of Lightning's one.
    """

    def __init__(
        self,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        schedule: Callable[[Any], Any] | None = None,
        scores: Sequence[float] | Callable[[int, int], float] = (),
        spikes: Sequence[int] = (),
        manual: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.policy = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4))
        self.policy.register_buffer("temperature", torch.tensor(1.0))
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.make_optimizer = optimizer or (lambda p: torch.optim.AdamW(p, lr=0.05))
        self.make_schedule, self.scores, self.spikes = schedule, scores, spikes
        self.automatic_optimization = not manual
        self.kls: list[float] = []
        self.told = 0

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None:
            for part in (self.policy, self.reference):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def losses(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        logp = (self.policy(batch) / self.policy.temperature).log_softmax(-1)
        ref = (self.reference(batch) / self.reference.temperature).log_softmax(-1)
        return F.nll_loss(logp, batch[:, :4].argmax(1)), (logp.exp() * (logp - ref)).sum(-1).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss, kl = self.losses(batch)
        self.kls.append(float(kl.detach()))
        self.log("kl", kl.detach())  # this rank's own, on purpose
        self.log("spike", float(self.global_step in self.spikes))
        if self.automatic_optimization:
            return loss + KL_COEF * kl
        optimizer: Any = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            loss, kl = self.losses(batch)
            self.manual_backward(loss + KL_COEF * kl)
            optimizer.step()
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.losses(batch)  # under FSDP2 weights stay gathered after this
        step = int(self.global_step)
        score = self.scores(step, self.global_rank) if callable(self.scores) else self.scores[step]
        self.log("score", torch.tensor(float(score)))

    def on_reference_reset(self) -> None:
        self.told += 1

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_schedule(optimizer), "interval": "step"},
        }


class Spy(pl.Callback):
    """Calls a function after each batch, with the Trainer and the module; it comes after the resets."""

    def __init__(self, look: Callable[[Any, Any, int], None]) -> None:
        self.look = look

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.look(trainer, pl_module, batch_idx)


class Saving(pl.Callback):
    """Writes a checkpoint once, at a step, after a batch or a validation."""

    def __init__(self, path: Path, step: int, at: str = "step") -> None:
        self.path, self.step, self.at = path, step, at

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.at == "step" and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if self.at == "validation" and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def trainer(callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
    """A quiet CPU Trainer; with ``val_check_interval`` it validates on one batch."""
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        **options,
    }
    return pl.Trainer(callbacks=list(callbacks), **settings)


def everything(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state, flat, as plain tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [(i, optimizer.state[p]) for i, p in enumerate(params) if p in optimizer.state]
    return {f"{i}.{name}": torch.as_tensor(value) for i, state in states for name, value in state.items()}


# -- on several ranks ---------------------------------------------------------------------------------


def strategy(name: str, world: int) -> Any:
    """DDP or FSDP2 over gloo."""
    if world == 1:
        return "auto"
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=world, tensor_parallel_size=1, process_group_backend="gloo"
    )


def full(module: nn.Module) -> dict[str, Tensor]:
    """Whole weights; all ranks call it."""
    out = {}
    for name, tensor in module.state_dict().items():
        out[name] = (
            (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone().cpu()
        )
    return out


def main(name: str, out: Path) -> None:
    """Runs with resets to the current and to the best policy, whole and resumed, and what each rank saw."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))

    def fit(target: str, saving: Sequence[pl.Callback] = (), **options: Any) -> dict[str, Any]:
        # Scores and spikes differ between ranks: what each would decide alone differs too.
        scores = [0, 0, 5, 0, 3, 0, 2, 0, 1, 0, 0] if rank == 0 else list(range(11))
        module = Anchored(scores=scores, spikes=(4,) if rank == 0 else (1, 2, 6))
        best = {"target": "best", "monitor": "score", "restore_policy": True} if target == "best" else {}
        reset = ReferenceReset([Stall("score", patience=1), Ceiling("spike", 0.5)], **best)
        optimizer = OptimizerReset(warmup_steps=2)
        seen: list[dict[str, Any]] = []

        def look(trainer: Any, pl_module: Any, batch_idx: int) -> None:
            seen.append(
                {"count": reset.count, "told": pl_module.told, "state": len(trainer.optimizers[0].state)}
            )

        run = trainer(
            [reset, optimizer, Spy(look), *saving],
            devices=world,
            strategy=strategy(name, world),
            use_distributed_sampler=False,
            val_check_interval=2,
            limit_val_batches=1,
        )
        run.fit(module, Stream(10, rank), Stream(1), **options)
        policy, reference = full(module.policy), full(module.reference)
        weights = [module.policy[0].weight, module.reference[0].weight]  # gathered no longer
        state = everything(run.optimizers[0])
        return {
            "seen": seen,
            "kls": module.kls,
            "policy": policy,
            "reference": reference,
            "count": (reset.count, optimizer.count, reset.last_step),
            "states": reset._states,
            "best": reset._best,
            "sharded": all(isinstance(w, DTensor) and w.to_local().numel() < w.numel() for w in weights),
            "optimizer": {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()},
        }

    result = {}
    for target in ("current", "best"):
        paths = {step: out.parent / f"{name}-{target}-{step}.ckpt" for step in (3, 4, 5, 6)}
        saving = [Saving(path, step, "step" if step % 2 else "validation") for step, path in paths.items()]
        result[target] = fit(target, saving)
        for step, path in paths.items():
            result[f"{target}-{step}"] = fit(target, ckpt_path=path, weights_only=True)
    torch.save(result, f"{out}.{rank}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
