"""The generator of generative adversarial distillation: a policy that is paid what a discriminator thinks of its text.

Paper: GAD (2511.10643). The machinery is ProRLGRPO's: group-relative advantages, clipped surrogate, KL to a resettable
reference. Only where rewards come from differs: R = sg(D(x, y)), the score of the discriminator *before* it learns from
the same answers. With D at its Bradley–Terry optimum the group-centred update is a policy gradient on −KL(p‖q).

Legend: ``B`` rows of a rollout batch, sampled ones and given ones of the same groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.datamodules.judged import judged_batch, read_anew, reads_alike
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.discrimination import (
    length_correlation,
    length_gap,
    matched_accuracy,
    pair_accuracy,
    score_gap,
)
from lightning_onpolicy.modules.gad_reward import AdversarialReward, adversarial_reward
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.losses.advantages import group_summary
from lightning_onpolicy.modules.losses.adversarial import Pairs, pair_rows
from lightning_onpolicy.modules.losses.score_rewards import teacher_mean
from lightning_onpolicy.modules.outcome import Tally
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.presets import PresetName
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.specs import ModelSpec


@dataclass(frozen=True)
class Verdict:
    """What the discriminator said of a rollout batch, before any update on it.

    Args:
        rows: All rows as it read them, in the batch's order.
        score_B: Their scores, float32 on the CPU.
        pairs: Sampled rows (numbered among themselves) against given ones (likewise).
    """

    rows: RolloutBatch
    score_B: Tensor
    pairs: Pairs


class GADGenerator(ProRLGRPO):
    """Raise a discriminator's score of the policy's own rollouts.

    By itself it learns from a discriminator that does not: the ablation in which a policy finds what fools it. See
    :class:`~lightning_onpolicy.modules.gad.GAD` for both players.

    Args:
        student: The policy: a path, a :class:`ModelSpec`, or a live :class:`Policy`.
        discriminator: A trained one: what ``save_pretrained`` of a :class:`ScalarModel` wrote, or a live one. It stays
            as it is.
        reward: How scores become rewards.
        recipe: Name of the recipe that fills in what is not given (``modules/presets.py``).
        **settings: Further settings of :class:`ProRLGRPO`.

    Raises:
        ValueError: If a setting is out of range or has no effect.
    """

    discriminator: ScalarModel

    def __init__(
        self,
        student: str | ModelSpec | Policy,
        discriminator: str | ModelSpec | ScalarModel | None = None,
        reward: AdversarialReward | None = None,
        recipe: PresetName = "gad_paper",
        **settings: Any,
    ) -> None:
        super().__init__(student, recipe, **settings)
        self.reward = reward if isinstance(reward, AdversarialReward) else AdversarialReward(**(reward or {}))
        self.judge_spec = None
        if isinstance(discriminator, ScalarModel):
            self.discriminator = discriminator
        elif discriminator is not None:
            self.judge_spec = ModelSpec.of(discriminator)
        self.save_hyperparameters(
            {
                **self.hparams,
                "discriminator": self.judge_spec and dataclasses.asdict(self.judge_spec),
                "reward": dataclasses.asdict(self.reward),
            }
        )

    # -- models -----------------------------------------------------------------------------------

    def build(self) -> None:
        """Also the discriminator."""
        super().build()
        self.build_discriminator()

    def build_discriminator(self) -> None:
        """A given one, frozen.

        Raises:
            ValueError: If there is none.
        """
        if self.judge_spec is not None:
            self.discriminator = ScalarModel.from_pretrained(self.judge_spec)
        if not hasattr(self, "discriminator"):
            raise ValueError(
                "discriminator is missing: name a trained one (onpolicy fit -c quickstart/reward_model makes such), or "
                "train GAD, which makes its own."
            )
        self.discriminator.requires_grad_(False)
        self.discriminator.eval()

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """The discriminator is read again from where it came."""
        return {**super().frozen_modules(), "discriminator": self.discriminator}

    def sharded_models(self) -> Iterator[nn.Module]:
        """Also the discriminator."""
        yield from super().sharded_models()
        yield self.discriminator

    # -- before the updates -----------------------------------------------------------------------

    def judge(self, batch: RolloutBatch) -> Verdict:
        """Read and score every row, sampled and given.

        Raises:
            ValueError: If no row is the policy's own.
        """
        if not bool(batch.on_policy.any()):
            raise ValueError(f"step {self.policy_version}: the batch has no row that the policy sampled.")
        tokenizer = self.discriminator.tokenizer
        prompts = None
        if not reads_alike(tokenizer, self.tokenizer):
            prompts = read_anew(batch.prompts, tokenizer, chat=bool(tokenizer.chat_template))
        rows = judged_batch(batch, tokenizer, self.pad_of(tokenizer), int(tokenizer.eos_token_id), prompts)
        with eval_mode(self.discriminator):
            score_B = self.per_row(rows, lambda m: self.discriminator.scores(m.input_ids, m.attention_mask))
        own, group = batch.on_policy.cpu(), batch.group.cpu()
        return Verdict(rows, score_B.cpu(), pair_rows(group[own], group[~own]))

    def refuse_alone(self, verdict: Verdict) -> None:
        """Raise, on all ranks, if no sampled response has a teacher's beside it."""
        pairs = torch.tensor([float(len(verdict.pairs))], device=self.device)
        if float(self._reduce(pairs, "sum")[0]) == 0:
            raise ValueError(
                "no sampled response has a teacher's beside it: set data.beside to true, and data.response_key to the "
                "key under which the rows hold the teacher's text."
            )

    @staticmethod
    def pad_of(tokenizer: Any) -> int:
        """What its rows are padded with; masks tell EOS and padding apart."""
        pad = tokenizer.pad_token_id
        return int(tokenizer.eos_token_id if pad is None else pad)

    def own_rows(self, batch: RolloutBatch, verdict: Verdict) -> tuple[RolloutBatch, dict[str, Tensor]]:
        """The sampled rows with their rewards; the verifiers' total becomes the part ``task``; and metrics."""
        own = batch.on_policy.cpu()
        rows = batch.select(own.nonzero()[:, 0])
        task_B, score_B = rows.reward_parts.get("task", rows.rewards), verdict.score_B[own]
        reward_B, means = adversarial_reward(
            self.reward,
            score_B,
            teacher_mean(verdict.score_B[~own], verdict.pairs, len(rows)),
            rows.rewards.cpu(),
            rows.response_lengths.cpu(),
            rows.group.cpu(),
            self._reduce,
        )
        parts = {**rows.reward_parts, "task": task_B, "discriminator": score_B.to(rows.device)}
        return dataclasses.replace(rows, rewards=reward_B.to(rows.device), reward_parts=parts), means

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Score, pay, and grade as ProRLGRPO does; given rows have done their part."""
        verdict = self.judge(batch)
        if self.reward.bound is not None:
            self.refuse_alone(verdict)
        rows, means = self.own_rows(batch, verdict)
        self._verdict = {**self.verdict_metrics(batch, verdict), **means}
        self._judged = verdict.rows
        return super().prepare(rows)

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """As ProRLGRPO's; ``judged`` has all rows as the discriminator read them."""
        return {**super().training_step(batch, batch_idx), "judged": self._judged}

    def rollout_metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """Also what the discriminator, fresh, made of them."""
        tally = Tally(self.device)
        tally.add({name: value.to(self.device) for name, value in self._verdict.items()})
        values = tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        return {**super().rollout_metrics(batch), **values}

    def verdict_metrics(self, batch: RolloutBatch, verdict: Verdict) -> dict[str, Tensor]:
        """``fresh/…``: accuracy, gap of scores and lengths, … of the verdict; values to take the mean of.

        ``score_std`` is the spread within a group, ``flat_groups`` the share of groups that have none,
        ``teacher_length`` that of the given rows in the discriminator's tokens.
        """
        own, group = batch.on_policy.cpu(), batch.group.cpu()[batch.on_policy.cpu()]
        length_B, pairs = verdict.rows.response_lengths.cpu(), verdict.pairs
        scores, lengths = ((value_B[own], value_B[~own]) for value_B in (verdict.score_B, length_B))
        values = {  # the same names whether or not this rank has a pair: they are summed over ranks
            "length_correlation": length_correlation(scores[0], lengths[0], group),
            "accuracy": pair_accuracy(*scores, pairs, group),
            "matched_accuracy": matched_accuracy(*scores, *lengths, pairs, group),
            "score_gap": score_gap(*scores, pairs, group),
            "length_gap": length_gap(*lengths, pairs, group),
        }
        spread = group_summary(scores[0], group)
        return {
            "fresh/score_std": spread["group_std"],
            "fresh/flat_groups": spread["constant_groups"],
            "fresh/teacher_length": lengths[1].double(),
            **{
                f"fresh/{name}": torch.full((value.n,), value.mean, dtype=torch.float64)
                for name, value in values.items()
            },
        }

    def progress_bar_metrics(self) -> Mapping[str, str]:
        """The score, how often it is right, and the entropy."""
        return {"reward": "score", "fresh/accuracy": "D", "entropy": "H"}
