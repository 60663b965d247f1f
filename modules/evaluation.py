"""Evaluation on rollouts: the same for every method, because every method trains something that samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.tools.tokens import response_of
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.aggregate import scatter
from lightning_onpolicy.modules.keys import prompt_key
from lightning_onpolicy.modules.metrics import RolloutMetrics, WeightedMean
from lightning_onpolicy.modules.reported import Reported

M = TypeVar("M", RolloutMetrics, WeightedMean)


@dataclass
class _Tables:
    """One evaluation's metrics; a plain object, so that they are no sub-modules of the method."""

    rollouts: RolloutMetrics
    tokens: dict[str, WeightedMean] = field(default_factory=dict)


class RolloutEvaluation(pl.LightningModule):
    """Mixin: ``validate`` and ``test`` report avg@k, pass@k, lengths, truncation; ``predict`` returns completions."""

    _tables: _Tables | None = None
    _reported: defaultdict[str, Reported]

    def evaluate(self, micro: RolloutBatch) -> dict[str, Tensor]:
        """Further per-token values ``[N]`` to report the mean of, e.g. divergences to a teacher."""
        return {}

    def evaluation_pieces(self, batch: RolloutBatch) -> list[RolloutBatch]:
        """The batch, cut so that each piece fits into memory; equally many pieces on all ranks."""
        return [batch]

    def _start(self) -> None:
        self._tables = _Tables(self._gathered(RolloutMetrics))

    def _gathered(self, metric: Callable[..., M], **settings: Any) -> M:
        """A metric on this device that counts each data-parallel rank once (tensor-parallel peers hold the same)."""
        group = parallel.data_parallel_group(self.device_mesh)
        return metric(process_group=group, **settings).to(self.device)

    def _step(self, batch: RolloutBatch) -> None:
        if self._tables is None:  # a step called by hand, without the hook that starts an epoch
            self._start()
        assert self._tables is not None
        self._tables.rollouts.update(batch)
        with torch.no_grad():
            for micro in self.evaluation_pieces(batch):
                mask = micro.response_mask
                for name, value_N in self.evaluate(micro).items():
                    if name not in self._tables.tokens:
                        self._tables.tokens[name] = self._gathered(WeightedMean, name=name)
                    self._tables.tokens[name].update(
                        scatter(value_N, mask).sum(1),
                        mask[:, 1:].sum(1),
                        torch.tensor([prompt_key(p) for p in micro.prompts], device=self.device),
                        micro.extra.get("counted"),
                    )

    def _end(self, stage: str) -> None:
        assert self._tables is not None
        values = self._tables.rollouts.compute()
        for metric in self._tables.tokens.values():
            values |= metric.compute()
        self._tables = None
        named = self._reported[stage].filled({f"{stage}/{k}": v for k, v in values.items()})
        # The values are global already; sync_dist only keeps Lightning from advising it, and changes nothing.
        self.log_dict(named, sync_dist=True)

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
        """One plain row per completion: prompt, response, ids, reward, finish.

        Where a tool spoke, ``response_ids`` hold its tokens too and ``response_mask`` says which are the policy's.
        """
        rows = []
        for i, (prompt, text) in enumerate(zip(batch.prompts, batch.texts, strict=True)):
            if "counted" in batch.extra and not bool(batch.extra["counted"][i]):
                continue  # a repeat that pads this rank to the others' length
            reward = float(batch.rewards[i])
            ids, written = response_of(batch, i)
            rows.append(
                {
                    "uid": prompt.uid,
                    "source": prompt.source,
                    "prompt": prompt.text,
                    "response": text,
                    "prompt_ids": list(prompt.ids),
                    "response_ids": ids,
                    **({} if all(written) else {"response_mask": written}),
                    "reward": None if reward != reward else reward,
                    "finished": bool(batch.finished[i]),
                    # What those who train on it read: a text that was cut is not taught to end.
                    "finish_reason": "stop" if bool(batch.finished[i]) else "length",
                }
            )
        return rows
