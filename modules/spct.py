"""A generative judge: trained on its own judgements by a rule, and asked to score.

Paper: SPCT (2504.02495). A policy reads a query with all its responses and writes principles, a critique and one score
each. Its reward is +1 where the scores single out the best response and −1 otherwise (eq. 10, ``JudgementReward``);
the rest is ProRLGRPO's machinery. Prompts come from ``JudgeSource`` through ``OnPolicyDataModule``.

With ``JudgingDataModule``, ``predict`` scores files and ``test`` evaluates on benchmarks: k samples of each item in
shuffled orders, summed, optionally those that a meta model prefers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_onpolicy.datamodules.batch import RolloutBatch, Sampling
from lightning_onpolicy.datamodules.judging.backends import JUDGING, JudgeBackend
from lightning_onpolicy.datamodules.judging.cases import EvalCase
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.judge import Judge
from lightning_onpolicy.datamodules.judging.meta import MetaReading
from lightning_onpolicy.datamodules.judging.module import ItemBatch, JudgingDataModule
from lightning_onpolicy.datamodules.judging.orders import OrderKind
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate, single_beside
from lightning_onpolicy.datamodules.judging.records import JudgedItem, JudgeSample, judged, plain_sample
from lightning_onpolicy.datamodules.judging.votes import meta_vote, vote
from lightning_onpolicy.modules.engine_backend import EngineBackend
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.judging.measures import foreseen, orders_for
from lightning_onpolicy.modules.meta_scorer import MetaRewardScorer
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.presets import PresetName
from lightning_onpolicy.modules.specs import ModelSpec


@dataclass(frozen=True)
class JudgingSpec:
    """How the judge is asked by ``predict`` and ``test``.

    Args:
        template: How an item becomes a prompt.
        single: The same for items of one response, which are right or not (ReaLMistake's); its scores are 0 and 1.
            Null: as in training (``JudgeSource``), ``template`` if those are its scores, else the packaged one.
        k: Samples per item.
        k_meta: Of these, the ones that the meta model prefers, and that vote; null: half of k, the paper's choice,
            where there is a meta model. ``test`` makes tables of all.
        order: ``shuffled``, ``rotated`` or ``fixed``. Where a benchmark's score needs both orders of each pair
            (JudgeBench's), ``test`` takes rotations for shuffles.
        sampling: How the policy's tokens are drawn; a backend has its own.
        chat_options: More arguments for the policy's chat template.
        seed: Of orders and sampling.
        think_end: What ends the judge's thinking, which does not count; null, nothing does.

    Raises:
        ValueError: If a number is out of range.
    """

    template: JudgeTemplate = field(default_factory=JudgeTemplate)
    single: JudgeTemplate | None = None
    k: int = 8
    k_meta: int | None = None
    order: OrderKind = "shuffled"
    sampling: Sampling = JUDGING
    chat_options: Mapping[str, Any] | None = None
    seed: int = 0
    think_end: str | None = "</think>"

    def __post_init__(self) -> None:
        if self.k < 1 or (self.k_meta is not None and not 1 <= self.k_meta <= self.k):
            raise ValueError(f"judging needs k >= 1 and k_meta in [1, k], got {self.k} and {self.k_meta}.")

    @property
    def for_one(self) -> JudgeTemplate:
        """The template for items of one response."""
        return single_beside(self.template, self.single)

    @property
    def preferred(self) -> int:
        """How many samples vote where a meta model chooses them."""
        return max(1, self.k // 2) if self.k_meta is None else self.k_meta


class SPCTReward(ProRLGRPO):
    """Train a generative judge, or ask one.

    Args:
        student: The judge: a path, a :class:`ModelSpec`, or a live :class:`Policy`.
        recipe: Name of the recipe that fills in what is not given (``modules/presets.py``).
        judging: How it is asked by ``predict`` and ``test``.
        meta: What ``MetaRewardModel`` exported: the ``judging.k_meta`` samples that it prefers vote. Null: all vote.
        reading: How the meta model reads judgements; as in its training.
        backend: Who is asked in the judge's place by ``predict`` and ``test``, e.g. a server.
        **settings: Further settings of :class:`ProRLGRPO`.

    Raises:
        ValueError: If a setting is out of range or has no effect.
    """

    def __init__(
        self,
        student: str | ModelSpec | Policy,
        recipe: PresetName = "spct",
        judging: JudgingSpec | None = None,
        meta: str | ModelSpec | None = None,
        reading: MetaReading | None = None,
        backend: JudgeBackend | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(student, recipe, **settings)
        self.judging = judging or JudgingSpec()
        if self.judging.k_meta is not None and meta is None:
            raise ValueError("judging.k_meta says how many samples the meta model keeps: name one in meta.")
        if reading is not None and meta is None:
            raise ValueError("reading says how the meta model reads, and there is none: name one in meta.")
        own = (self.judging.sampling, self.judging.chat_options)
        if backend is not None and own != (JUDGING, None):
            raise ValueError(
                "judging.sampling and judging.chat_options are the policy's: give them to the backend."
            )
        self.meta, self.reading, self.backend = meta, reading, backend
        self._judge: Judge | None = None
        self.save_hyperparameters({**self.hparams, "judging": dataclasses.asdict(self.judging)})

    @property
    def judge(self) -> Judge:
        """The policy of the moment, or the backend, as a judge."""
        if self._judge is None:
            spec = self.judging
            if self.backend is None and self.device_mesh is not None:
                raise ValueError(
                    "a sharded judge cannot score files: use one device or DDP, or name a server in backend."
                )
            scorer = (
                None
                if self.meta is None
                else MetaRewardScorer(self.meta, self.reading, device=str(self.device))
            )
            chat = dict(spec.chat_options or {})
            self._judge = Judge(
                self.backend or EngineBackend(self.policy, spec.sampling, chat),
                spec.template,
                spec.k,
                spec.order,
                spec.seed,
                spec.think_end,
                scorer,
                spec.for_one,
            )
        return self._judge

    def predict_step(
        self, batch: RolloutBatch | ItemBatch[JudgeItem], batch_idx: int
    ) -> list[dict[str, Any]]:
        """One row per item: its keys, ``scores`` (means over the samples that vote, or null), ``best``, ``samples``."""
        if isinstance(batch, RolloutBatch):
            return super().predict_step(batch, batch_idx)
        return [
            self._row(item, samples)
            for item, samples in zip(batch, self.judge.judge(batch.items), strict=True)
        ]

    def _row(self, item: JudgeItem, samples: Sequence[JudgeSample]) -> dict[str, Any]:
        scores = [s.scores for s in samples]
        if self.meta is None:
            verdict = vote(scores)
        else:
            verdict = meta_vote(scores, [s.meta for s in samples], self.judging.preferred)
        means = verdict.means
        best = None
        if means is not None and means.count(max(means)) == 1 and len(means) > 1:
            best = means.index(max(means))
        return {
            **item.row,
            "uid": item.uid,
            "source": item.source,
            "scores": means and list(means),
            "best": best,
            "voted": list(verdict.used),
            "samples": [plain_sample(sample) for sample in samples],
        }

    def on_test_start(self) -> None:
        """Say which benchmarks will have no score, before anything is sampled."""
        super().on_test_start()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for name in data.test if isinstance(data, JudgingDataModule) else ():
            why = foreseen(name, self.judging.k, self.judging.order)
            if why is not None:
                rank_zero_warn(f"{name} will have no score: {why}.")

    def test_step(  # type: ignore[override]
        self, batch: RolloutBatch | ItemBatch[EvalCase], batch_idx: int
    ) -> dict[str, Any] | None:
        """Benchmarks' items: ``{"judged": …}`` for ``JudgeReport``."""
        if isinstance(batch, RolloutBatch):
            super().test_step(batch, batch_idx)
            return None
        kinds = [orders_for(case.benchmark, self.judging.order) for case in batch]
        samples = self.judge.judge([case.item for case in batch], kinds=kinds)
        found: list[JudgedItem] = [judged(case, said) for case, said in zip(batch, samples, strict=True)]
        return {"judged": found}

    def on_test_epoch_end(self) -> None:
        """Log ``test/…`` of rollouts, if there were any."""
        if self._tables is not None and self._tables.rollouts.update_called:
            super().on_test_epoch_end()
