"""Evaluation on rollouts: the same for every method, because every method trains something that samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.outcome import Tally

if TYPE_CHECKING:
    from lightning_onpolicy.modules.metrics import RolloutMetrics


class RolloutEvaluation(pl.LightningModule):
    """Mixin: ``validate`` and ``test`` report avg@k, pass@k, lengths, truncation; ``predict`` returns completions."""

    _stage_metrics: RolloutMetrics | None = None
    _stage_tally: Tally | None = None

    def evaluate(self, micro: RolloutBatch) -> dict[str, Tensor]:
        """Further per-token values ``[N]`` to report the mean of, e.g. divergences to a teacher."""
        return {}

    def _micro_batches(self, batch: RolloutBatch, budget: int) -> list[RolloutBatch]:
        raise TypeError("RolloutEvaluation is a mixin of OnPolicyModule.")

    def _start(self) -> None:
        from lightning_onpolicy.modules.metrics import RolloutMetrics

        self._stage_metrics = RolloutMetrics().to(self.device)
        self._stage_tally = Tally(self.device)

    def _step(self, batch: RolloutBatch) -> None:
        if self._stage_metrics is None or self._stage_tally is None:
            self._start()
        assert self._stage_metrics is not None and self._stage_tally is not None
        self._stage_metrics.update(batch)
        with torch.no_grad():
            for micro in self._micro_batches(batch, self.loop.micro_batch_tokens):  # type: ignore[attr-defined]
                self._stage_tally.add(self.evaluate(micro))

    def _end(self, stage: str) -> None:
        assert self._stage_metrics is not None and self._stage_tally is not None
        values = self._stage_metrics.compute()
        values |= self._stage_tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        self._stage_metrics = self._stage_tally = None
        self.log_dict({f"{stage}/{k}": v for k, v in values.items()}, rank_zero_only=False)

    def on_validation_epoch_start(self) -> None:
        """Fresh metrics."""
        self._start()

    def validation_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """Count one batch of evaluation rollouts."""
        self._step(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/…``."""
        self._end("val")

    def on_test_epoch_start(self) -> None:
        """Fresh metrics."""
        self._start()

    def test_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """Count one batch of evaluation rollouts."""
        self._step(batch)

    def on_test_epoch_end(self) -> None:
        """Log ``test/…``."""
        self._end("test")

    def predict_step(self, batch: RolloutBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One plain row per completion: prompt, response, ids, reward, finish."""
        rows = []
        for i, (prompt, text) in enumerate(zip(batch.prompts, batch.texts, strict=True)):
            reward = float(batch.rewards[i])
            rows.append(
                {
                    "uid": prompt.uid,
                    "source": prompt.source,
                    "prompt": prompt.text,
                    "response": text,
                    "prompt_ids": list(prompt.ids),
                    "response_ids": batch.input_ids[i][batch.response_mask[i]].tolist(),
                    "reward": None if reward != reward else reward,
                    "finished": bool(batch.finished[i]),
                }
            )
        return rows
