"""Generative adversarial distillation: a student and a discriminator that keeps learning to tell it from the teacher.

Paper: GAD (2511.10643 v3). Only the teacher's text is there. The game is max_p min_D E[−log σ(D(x, y_q) − D(x, y_p))].

| symbol | here |
|---|---|
| p, q | policy, teacher; y_p sampled rows, y_q the responses that the data holds (``data.beside: true``) |
| D | ``discriminator``: a copy of the student's body with a scalar head on the last token |
| R | ``rewards``: D's score of a sampled row, before D learns from it |

A rollout batch goes: score all rows → advantages → D's update → policy's update. The first batches are a warm-up: D
alone, then the policy by cross-entropy on y_q with D on *current* samples, which costs rollouts too, as in the paper.

Departures: a capped response is cut at the same length on both sides, and has no EOS there; texts are encoded anew for
D (``datamodules/judged.py``). The loss counts every sampled row once, however many teacher answers there are. The KL's
reference is the student after the warm-up, as in the official code; the paper does not say.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.judged import judged_items, rows_of_items
from lightning_onpolicy.datamodules.ranks import gathered_by_rank
from lightning_onpolicy.datamodules.replay import ReplayBuffer
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.gad_generator import GADGenerator, Verdict
from lightning_onpolicy.modules.gad_reward import AdversarialReward
from lightning_onpolicy.modules.gad_stages import Clock, Gate, Replay, Warmup, players
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.losses.adversarial import DiscriminatorSpec
from lightning_onpolicy.modules.onpolicy import LoopSpec, adamw
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.pair_loss import pair_loss
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.presets import PresetName, preset
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.specs import LoraSpec, ModelSpec
from lightning_onpolicy.modules.supervised import imitation_loss

_CLOCK_KEY, _REPLAY_KEY = "onpolicy_gad_clock", "onpolicy_gad_replay"
PHASES = ("discriminator", "warmup", "main")


class GAD(GADGenerator):
    """Both players.

    Args:
        student: The policy: a path, a :class:`ModelSpec`, or a live :class:`Policy`.
        recipe: Name of the recipe that fills in what is not given (``modules/presets.py``).
        discriminator: Another model to start the discriminator from, with its own tokenizer; default: a copy of the
            student.
        pairs: What the discriminator minimises.
        r1: Coefficient of its gradient penalty; costs a second derivative and does without fused attention and FSDP2.
        reward: How scores become rewards.
        warmup: The first batches.
        gate: When a player waits.
        replay: Old samples in the discriminator's batches; null, none.
        generator_every: The generator learns from every n-th rollout batch; the discriminator from each.
        anchor: What the KL's reference is: the student ``post_warmup``, or as it was at the ``start``.
        discriminator_lora: Train adapters (and the head) of the discriminator over a frozen body: one of its own or,
            where the student has adapters too, the student's, which both then share.
        head_std: Standard deviation of the new head's weight.
        discriminator_optimizer: From parameters to an optimizer; default: as the recipe has it for the student.
        discriminator_scheduler: From that to a schedule.
        discriminator_loop: How a rollout batch becomes its optimizer steps; default: one.
        **settings: Further settings of :class:`ProRLGRPO`.

    Raises:
        ValueError: If a setting is out of range or has no effect.
    """

    def __init__(
        self,
        student: str | ModelSpec | Policy,
        recipe: PresetName = "gad_paper",
        discriminator: str | ModelSpec | None = None,
        pairs: DiscriminatorSpec | None = None,
        r1: float = 0.0,
        reward: AdversarialReward | None = None,
        warmup: Warmup | None = None,
        gate: Gate | None = None,
        replay: Replay | None = None,
        generator_every: int = 1,
        anchor: Literal["post_warmup", "start"] = "post_warmup",
        discriminator_lora: LoraSpec | None = None,
        head_std: float = 0.02,
        discriminator_optimizer: OptimizerCallable | None = None,
        discriminator_scheduler: LRSchedulerCallable | None = None,
        discriminator_loop: LoopSpec | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(student, discriminator, reward, recipe, **settings)
        if self.critic_spec is not None:
            raise ValueError("GAD compares the rows of a group: advantage.kind gae is for ProRLGRPO.")
        base = preset(recipe)
        self.pairs = pairs if isinstance(pairs, DiscriminatorSpec) else DiscriminatorSpec(**(pairs or {}))
        self.warmup = warmup if isinstance(warmup, Warmup) else Warmup(**(warmup or {}))
        self.gate = gate if isinstance(gate, Gate) else Gate(**(gate or {}))
        if generator_every < 1:
            raise ValueError(f"generator_every must be >= 1, got {generator_every}.")
        if r1 < 0 or head_std < 0:
            raise ValueError(f"r1 and head_std must be >= 0, got {r1} and {head_std}.")
        self.r1, self.head_std, self.anchor = r1, head_std, anchor
        self.generator_every = generator_every
        self.discriminator_lora = (
            LoraSpec(**discriminator_lora) if isinstance(discriminator_lora, Mapping) else discriminator_lora
        )
        self.discriminator_optimizer = discriminator_optimizer or functools.partial(adamw, lr=base.lr)
        self.discriminator_scheduler = discriminator_scheduler
        self.discriminator_loop = LoopSpec.of(discriminator_loop)
        self.clock = Clock()
        self.replay_spec = Replay(**replay) if isinstance(replay, Mapping) else replay
        self.replay: ReplayBuffer | None = None
        if self.replay_spec is not None:
            self.replay = ReplayBuffer(self.replay_spec.capacity, self.replay_spec.share)
        self.save_hyperparameters(
            {
                **self.hparams,
                "pairs": dataclasses.asdict(self.pairs),
                "r1": r1,
                "warmup": dataclasses.asdict(self.warmup),
                "gate": dataclasses.asdict(self.gate),
                "replay": self.replay_spec and dataclasses.asdict(self.replay_spec),
                "generator_every": generator_every,
                "anchor": anchor,
                "discriminator_lora": self.discriminator_lora and dataclasses.asdict(self.discriminator_lora),
                "head_std": head_std,
                "discriminator_loop": dataclasses.asdict(self.discriminator_loop),
            }
        )

    # -- models -----------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """Optimizer steps of the policy alone."""
        return self.clock.policy_steps

    def build_discriminator(self) -> None:
        """The student's copy, or what ``discriminator`` names, with a head; it trains."""
        lora, std = self.discriminator_lora, self.head_std
        if self.judge_spec is not None:
            spec = dataclasses.replace(self.judge_spec, lora=lora) if lora else self.judge_spec
            self.discriminator = ScalarModel.from_pretrained(spec, std=std)
        elif lora is not None and self.policy.has_adapters:
            if self.device_mesh is not None:
                raise ValueError(
                    "under FSDP2 the discriminator cannot share the student's base: name a model for it in "
                    "discriminator, or leave student.lora out."
                )
            self.discriminator = ScalarModel.beside(self.policy, lora=lora, std=std)
        else:
            self.discriminator = ScalarModel.copy_of(self.policy, lora=lora, std=std)

    def setup(self, stage: str) -> None:
        """Also refuse a gradient penalty that the strategy cannot compute."""
        super().setup(stage)
        if stage == "fit" and self.r1:
            parallel.refuse_second_derivative(self.trainer)

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """The discriminator trains, so it is in checkpoints."""
        return {name: m for name, m in super().frozen_modules().items() if name != "discriminator"}

    def configure_optimizers(self) -> Any:
        """One for each player, the policy's first."""
        both = (
            self.with_schedule(self.policy, self.optimizer_callable, self.scheduler_callable),
            self.with_schedule(
                self.discriminator, self.discriminator_optimizer, self.discriminator_scheduler
            ),
        )
        return [one if isinstance(one, dict) else {"optimizer": one} for one in both]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the clock, and every rank's replay buffer."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CLOCK_KEY] = self.clock.state_dict()
        if self.replay is not None:
            checkpoint[_REPLAY_KEY] = gathered_by_rank(self.replay.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the clock, and this rank's replay buffer."""
        super().on_load_checkpoint(checkpoint)
        if self.replay is not None and str(self.global_rank) in checkpoint.get(_REPLAY_KEY, {}):
            self.replay.load_state_dict(checkpoint[_REPLAY_KEY][str(self.global_rank)])
        if _CLOCK_KEY in checkpoint:  # another method's checkpoint, whose policy goes on here, has none
            self.clock.load_state_dict(checkpoint[_CLOCK_KEY])

    # -- the loop ---------------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """One rollout batch: score, then the discriminator's update, then the policy's.

        Returns:
            As :meth:`OnPolicyModule.training_step`; ``batch`` has the sampled rows, ``judged`` all rows as the
            discriminator read them.
        """
        if not isinstance(batch, RolloutBatch):
            raise TypeError(
                f"GAD trains on RolloutBatch, got {type(batch).__name__}: use OnPolicyDataModule."
            )
        phase = self.warmup.phase(self.clock.batches)
        if phase == "main":
            self._anchor()
        with self.phases("prepare"), torch.no_grad():
            verdict = self.judge(batch)
            self.refuse_alone(verdict)
            rows, means = self.own_rows(batch, verdict)
            self._verdict = {**self.verdict_metrics(batch, verdict), **means}
            if phase == "main":
                rows = ProRLGRPO.prepare(self, rows)
        metrics = self.rollout_metrics(rows)
        self.clock.note(metrics.get("fresh/accuracy", float("nan")), self.gate.window)
        judge_learns, policy_learns = players(self.clock, self.warmup, self.gate, self.generator_every)
        optimizers: Any = self.optimizers()
        policy_optimizer, judge_optimizer = optimizers
        tally, judge_tally = Tally(self.device), Tally(self.device)
        if judge_learns:
            with self.phases("discriminator"):
                self.clock.discriminator_steps += self.optimise(
                    self.lesson(verdict),
                    self.pair_loss,
                    judge_optimizer,
                    judge_tally,
                    self.discriminator_loop,
                    ticks=not policy_learns,  # every batch moves global_step, and none twice
                    whole_groups=True,
                )
        if policy_learns:
            with self.phases("update"):
                self.clock.policy_steps += self.optimise(
                    taught(batch) if phase == "warmup" else rows,
                    self.loss if phase == "main" else self.imitation_loss,
                    policy_optimizer,
                    tally,
                    self.loop,
                )
        self.clock.batches += 1
        metrics |= self._computed(tally)
        metrics |= {f"discriminator/{name}": value for name, value in self._computed(judge_tally).items()}
        metrics |= {
            "phase": float(PHASES.index(phase)),
            "policy_steps": float(self.clock.policy_steps),
            "discriminator_steps": float(self.clock.discriminator_steps),
        }
        if phase == "main":
            self.note_entropy(metrics)
        reported = self.report("train", metrics, rows)
        return {"seconds": self.phases.take(), "metrics": reported, "batch": rows, "judged": verdict.rows}

    def lesson(self, verdict: Verdict) -> RolloutBatch:
        """What the discriminator learns from: the fresh rows, some groups replaced by old ones."""
        if self.replay is None:
            return verdict.rows
        fresh = judged_items(verdict.rows)
        mixed = self.replay.mix(fresh, self.clock.batches)
        self.replay.add(fresh)
        return rows_of_items(mixed, self.pad_of(self.discriminator.tokenizer)).to(verdict.rows.device)

    def pair_loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """The discriminator's."""
        return pair_loss(self.discriminator, micro, counts, self.pairs, self.r1)

    def imitation_loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """The policy's, in the warm-up."""
        return imitation_loss(self.policy, micro, counts, "token_mean", self.loop)

    def _computed(self, tally: Tally) -> dict[str, float]:
        return tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))

    def _anchor(self) -> None:
        """Once, before the first batch of the main stage."""
        if not self.clock.anchored:
            self.clock.anchored = True
            if self.anchor == "post_warmup" and self.reference is not None and self.warmup.batches:
                self.reset_reference()


def taught(batch: RolloutBatch) -> RolloutBatch:
    """Only the teacher's tokens are to be learnt. All rows stay, so that a rank without any such token keeps step."""
    return dataclasses.replace(batch, response_mask=batch.response_mask & ~batch.on_policy[:, None])
