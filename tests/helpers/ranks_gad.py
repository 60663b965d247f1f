"""GAD on N ranks, as a script: ``torchrun --nproc-per-node N ranks_gad.py STRATEGY OUT``.

Every rank trains on its share of the same groups, so the weights of both players afterwards must equal those of one
process that saw them all. Two batches of each phase: in the first, what rank 1 sampled is empty; in the second, its
groups have no teacher's answer, so that it has no pair and, in the joint warm-up, no row to imitate. Then a run with
all that a checkpoint holds, whole and resumed.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import ranks_fit
import torch
import torch.distributed as dist
from duels import Duels, Spy, duel_batch, gad
from leaving import leave
from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules import GAD
from lightning_onpolicy.modules.gad_reward import AdversarialReward
from lightning_onpolicy.modules.gad_stages import Replay, Warmup
from lightning_onpolicy.modules.losses.settings import AdvantageSpec
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.saving import gathered_state_dict

GROUPS, CUT = 5, 3  # groups 0, 1, 2 on rank 0; 3 and 4 on rank 1
WARMUP = Warmup(batches=4, discriminator_batches=2)
STEPS, SAVED_AFTER = 6, 2
LOOP = LoopSpec(micro_batch_tokens=40, max_grad_norm=None, deadline_s=60.0)


class Share(Duels):
    """This rank's groups of each batch."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(STEPS)
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[RolloutBatch]:
        while self.done < self.count:
            self.done += 1
            batch = duel_batch(self.done, groups=GROUPS, answers=2)
            second = batch.group >= CUT
            if self.done % 2:
                batch = emptied(batch, batch.on_policy & second)
            else:
                batch = batch.select((batch.on_policy | ~second).nonzero()[:, 0])
            second = batch.group >= CUT
            yield batch if self.world == 1 else batch.select((second == bool(self.rank)).nonzero()[:, 0])


def emptied(batch: RolloutBatch, which_B: Tensor) -> RolloutBatch:
    """Without a single response token in some rows."""
    gone_BT = batch.response_mask & which_B[:, None]
    return dataclasses.replace(
        batch,
        attention_mask=batch.attention_mask & ~gone_BT,
        response_mask=batch.response_mask & ~gone_BT,
        sampler_logprobs=batch.sampler_logprobs.masked_fill(gone_BT, 0.0),
        texts=tuple("" if gone else text for gone, text in zip(which_B.tolist(), batch.texts, strict=True)),
    )


def compared(r1: float = 0.0) -> GAD:
    """Plain gradient descent, whose steps are the gradients themselves, on every term there is."""
    return gad(
        warmup=WARMUP,
        pairs={"smoothing": 0.1, "score_penalty": 0.05},
        r1=r1,
        reward=AdversarialReward(debias=True),
        advantage=AdvantageSpec("mean_centred"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
        discriminator_optimizer=lambda p: torch.optim.SGD(p, lr=5e-4),
        loop=LOOP,
        discriminator_loop=LOOP,
    )


def resumable() -> GAD:
    """Optimizers and schedules with a state, several steps per batch, a replay buffer on each rank."""
    loop = LoopSpec(micro_batch_tokens=40, minibatches=2, deadline_s=60.0)

    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    return gad(
        warmup=WARMUP,
        replay=Replay(capacity=4, share=0.5),
        scheduler=schedule,
        discriminator_scheduler=schedule,
        loop=loop,
        discriminator_loop=loop,
    )


class Apart(pl.Callback):
    """After every batch: how far apart ranks' weights are, by player. Nothing where ranks hold shards."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.world_size > 1 and module.device_mesh is None:
            players = {"policy": module.policy, "discriminator": module.discriminator}
            self.found.append({name: apart(player) for name, player in players.items()})


def apart(player: nn.Module) -> float:
    """Largest difference of any weight between this rank and any other."""
    own = torch.cat([p.detach().flatten() for p in player.parameters()])
    everybodys = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, own)
    return max(float((own - other).abs().max()) for other in everybodys)


def fit(module: GAD, strategy: str, spy: Spy, **options: Any) -> dict[str, Any]:
    """One run, and what it left."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    seen = Apart()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=world,
        strategy=ranks_fit.strategy(strategy),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[seen, spy],
    )
    trainer.fit(module, train_dataloaders=Share(rank, world), **options)
    assert module.reference is not None
    players = {
        "policy": module.policy,
        "discriminator": module.discriminator,
        "reference": module.reference,
    }
    return {
        "weights": {name: gathered_state_dict(player) for name, player in players.items()},
        "optimizers": [moments(optimizer) for optimizer in trainer.optimizers],
        "rates": [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers],
        "metrics": spy.metrics,
        "apart": seen.found,
        "clock": module.clock.state_dict(),
        "global_step": trainer.global_step,
    }


def moments(optimizer: Any) -> dict[str, Tensor]:
    """An optimizer's state, flat, as plain tensors; all ranks call it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {f"{i}.{name}": v for i, p in enumerate(parameters) for name, v in optimizer.state[p].items()}
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for k, v in state.items()}


def main(strategy: str, folder: Path) -> dict[str, Any]:
    """The compared run; where there are ranks, also the resumable one, whole and from its checkpoint."""
    r1 = 0.01 if strategy == "ddp" else 0.0  # FSDP2 has no second derivative
    found = {"compared": fit(compared(r1), strategy, Spy())}
    if "WORLD_SIZE" in os.environ:
        saved = folder / "saved.ckpt"
        found["whole"] = fit(resumable(), strategy, Spy(saved, SAVED_AFTER))
        found["resumed"] = fit(resumable(), strategy, Spy(), ckpt_path=saved, weights_only=True)
    return found


if __name__ == "__main__":
    result = main(sys.argv[1], Path(sys.argv[2]).parent)
    if int(os.environ["RANK"]) == 0:
        torch.save(result, sys.argv[2])
    leave()
