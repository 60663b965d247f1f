"""torchmetrics over rollouts: thin classes that collect rows; the maths is in :mod:`.statistics`.

Legend: ``B`` rows of one update (one response each).

Every metric stores its rows as lists that are concatenated over ranks, because an interval clustered by
prompt needs the rows. Ranks are padded to equal numbers of batches with repeated prompts; rows flagged
``counted=False`` are such repeats and are dropped on arrival, so what ranks hold together is what one process
would hold. Every rank must update at least once (with ``counted`` all False if it has nothing to say).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.keys import prompt_key, sample_index, stable_hash
from lightning_onpolicy.modules.statistics import Interval, average_at_k, pass_at_k, weighted_mean

CORRECT = 1.0 - 1e-6


def own_rows(batch: RolloutBatch) -> Tensor:
    """``[B]`` bool: rows that the policy sampled, without those that only make ranks equal (``counted`` False)."""
    own: Tensor = batch.on_policy & batch.extra.get("counted", torch.ones_like(batch.on_policy)).bool()
    return own


class RowMetric(Metric):
    """Collects named columns of rows: what metrics whose maths needs single rows are made of."""

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    def __init__(self, columns: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = tuple(columns)
        for name in self.columns:
            self.add_state(f"rows_{name}", [], dist_reduce_fx="cat")

    def _append(self, counted: Tensor | None, **columns: Tensor) -> None:
        sizes = {name: tuple(value.shape) for name, value in columns.items()}
        if len(set(sizes.values())) != 1 or any(len(size) != 1 for size in sizes.values()):
            raise ValueError(
                f"{type(self).__name__}.update needs one value per row in every argument, got {sizes}."
            )
        for name, value in columns.items():
            kept = value if counted is None else value[counted.to(value.device, torch.bool)]
            getattr(self, f"rows_{name}").append(kept.detach().to(self.device))

    def _column(self, name: str) -> Tensor:
        rows = getattr(self, f"rows_{name}")
        return torch.zeros(0) if isinstance(rows, list) and not rows else dim_zero_cat(rows).cpu()


class AvgAtK(RowMetric):
    """avg@k: the mean score, with intervals over prompts and over seeds.

    ``compute`` returns ``accuracy``, ``accuracy_low``, ``accuracy_high`` (over prompts),
    ``accuracy_seed_std``, ``accuracy_seed_low``, ``accuracy_seed_high`` (over the k seeds) and ``unscored``;
    what is not defined, such as an interval from one prompt, is left out.

    Args:
        confidence: Coverage of the intervals.
        **kwargs: torchmetrics' own, such as ``process_group``.
    """

    def __init__(self, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(("score", "key", "sample"), **kwargs)
        self.confidence = confidence

    def update(self, scores: Tensor, key: Tensor, sample: Tensor, counted: Tensor | None = None) -> None:
        """Add rows.

        Args:
            scores: ``[B]`` float; NaN = not scored.
            key: ``[B]`` int64, the prompt's number (:func:`prompt_key`).
            sample: ``[B]`` int64, number of the sample among its prompt's (:func:`sample_index`).
            counted: ``[B]`` bool; False drops the row.
        """
        self._append(counted, score=scores, key=key, sample=sample)

    def compute(self) -> dict[str, float]:
        """The values over all ranks."""
        return _accuracy(self._column("score"), self._column("key"), self._column("sample"), self.confidence)


class PassAtK(RowMetric):
    """Unbiased pass@k: ``pass@<k>``, ``pass@<k>_low``, ``pass@<k>_high``.

    Args:
        ks: Numbers of samples; default: powers of two up to the number of samples per prompt.
        correct_threshold: A row is correct if its score is at least this.
        confidence: Coverage of the intervals.
        **kwargs: torchmetrics' own.
    """

    def __init__(
        self,
        ks: Sequence[int] | None = None,
        correct_threshold: float = CORRECT,
        confidence: float = 0.95,
        **kwargs: Any,
    ) -> None:
        super().__init__(("score", "key"), **kwargs)
        if ks is not None and any(k < 1 for k in ks):
            raise ValueError(f"ks must be >= 1, got {list(ks)}.")
        self.ks, self.correct_threshold, self.confidence = ks, correct_threshold, confidence

    def update(self, scores: Tensor, key: Tensor, counted: Tensor | None = None) -> None:
        """Add rows (arguments as in :meth:`AvgAtK.update`)."""
        self._append(counted, score=scores, key=key)

    def compute(self) -> dict[str, float]:
        """The values over all ranks."""
        return _passes(
            self._column("score"), self._column("key"), self.ks, self.correct_threshold, self.confidence
        )


class ResponseLength(RowMetric):
    """Mean response length in tokens: ``length``, and ``length_correct``, ``_incorrect``, ``_unscored``.

    Args:
        correct_threshold: A row is correct if its score is at least this.
        **kwargs: torchmetrics' own.
    """

    def __init__(self, correct_threshold: float = CORRECT, **kwargs: Any) -> None:
        super().__init__(("length", "score"), **kwargs)
        self.correct_threshold = correct_threshold

    def update(self, lengths: Tensor, scores: Tensor, counted: Tensor | None = None) -> None:
        """Add rows: ``[B]`` lengths in tokens and ``[B]`` scores (NaN = not scored)."""
        self._append(counted, length=lengths, score=scores)

    def compute(self) -> dict[str, float]:
        """The values over all ranks; a class without rows is left out."""
        return _lengths(self._column("length"), self._column("score"), self.correct_threshold)


class TruncationRate(RowMetric):
    """Share of responses cut by length: ``truncated``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("finished",), **kwargs)

    def update(self, finished: Tensor, counted: Tensor | None = None) -> None:
        """Add rows: ``[B]`` bool, True if the response ended by itself."""
        self._append(counted, finished=finished.float())

    def compute(self) -> dict[str, float]:
        """The value over all ranks."""
        return _known({"truncated": _mean(1.0 - self._column("finished"))})


class WeightedMean(RowMetric):
    """A per-token mean, such as a divergence to the teacher: ``<name>``, ``<name>_low``, ``<name>_high``.

    Args:
        name: Of the value.
        confidence: Coverage of the interval, which is over prompts.
        **kwargs: torchmetrics' own.
    """

    def __init__(self, name: str = "mean", confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(("total", "weight", "key"), **kwargs)
        self.name, self.confidence = name, confidence

    def update(self, totals: Tensor, weights: Tensor, key: Tensor, counted: Tensor | None = None) -> None:
        """Add rows.

        Args:
            totals: ``[B]`` float, the row's values summed over its tokens; NaN drops the row.
            weights: ``[B]``, the row's number of tokens.
            key: ``[B]`` int64, the prompt's number.
            counted: ``[B]`` bool; False drops the row.
        """
        self._append(counted, total=totals, weight=weights, key=key)

    def compute(self) -> dict[str, float]:
        """The values over all ranks."""
        x = weighted_mean(self._column("total"), self._column("weight"), self._column("key"), self.confidence)
        return _known(_named(self.name, x))


class RolloutMetrics(RowMetric):
    """All of an evaluation's numbers, straight from its batches.

    ``compute`` returns what :class:`AvgAtK`, :class:`PassAtK`, :class:`ResponseLength` and
    :class:`TruncationRate` do, and ``accuracy/<source>`` per named source. If rows name their ``domain``, also
    ``accuracy_domain/<domain>``, and ``accuracy_macro``, which counts every domain once. Accuracy is the mean
    reward itself; pass@k and the lengths' split call a row correct if its reward is at least
    ``correct_threshold``. Off-policy rows are not counted.

    Sources are names, which cannot be gathered as tensors; every row carries its source's stable hash
    instead, and each rank adds to the gathered states a table of the names it has seen, as UTF-8 bytes. After
    gathering, all ranks hold all names, so that all log the same keys (a rank that lacked one would hang in
    the logger's reduction).

    Args:
        ks: For pass@k; default: powers of two up to the number of samples per prompt.
        correct_threshold: A row is correct if its reward is at least this.
        confidence: Coverage of the intervals.
        **kwargs: torchmetrics' own, such as ``process_group``.
    """

    def __init__(
        self,
        ks: Sequence[int] | None = None,
        correct_threshold: float = CORRECT,
        confidence: float = 0.95,
        **kwargs: Any,
    ) -> None:
        super().__init__(("score", "key", "sample", "length", "finished", "source", "domain"), **kwargs)
        self.ks, self.correct_threshold, self.confidence = ks, correct_threshold, confidence
        self.add_state("names", [], dist_reduce_fx="cat")

    def update(self, batch: RolloutBatch) -> None:
        """Add a batch; rows with ``extra["counted"]`` False are left out.

        Raises:
            ValueError: If the batch carries no prompts, without which rows cannot be grouped.
        """
        if len(batch.prompts) != len(batch):
            raise ValueError(
                f"evaluation needs a prompt per row: {len(batch)} rows, {len(batch.prompts)} prompts."
            )
        self._append(
            own_rows(batch),
            score=batch.rewards,
            key=torch.tensor([prompt_key(p) for p in batch.prompts]),
            sample=sample_index(batch.group),
            length=batch.response_lengths,
            finished=batch.finished.float(),
            source=torch.tensor([stable_hash(p.source) for p in batch.prompts]),
            domain=torch.tensor([stable_hash(p.domain) for p in batch.prompts]),
        )
        text = "".join(
            kind + name + "\0"
            for kind in ("source", "domain")
            for name in sorted({getattr(p, kind) for p in batch.prompts})
        )
        table = torch.tensor(
            list(text.encode("utf-8", "surrogatepass")), dtype=torch.uint8, device=self.device
        )
        getattr(self, "names").append(table)  # noqa: B009 (mypy cannot know that a state is a list)

    def compute(self) -> dict[str, float]:
        """The values over all ranks."""
        score, key, sample = self._column("score"), self._column("key"), self._column("sample")
        out = _accuracy(score, key, sample, self.confidence)
        out |= _passes(score, key, self.ks, self.correct_threshold, self.confidence)
        out |= _lengths(self._column("length"), score, self.correct_threshold)
        out |= _known({"truncated": _mean(1.0 - self._column("finished"))})
        by_source = self._by_name("source")
        out |= _known({f"accuracy/{name}": mean for name, mean in by_source.items()})
        by_domain = self._by_name("domain")
        if by_domain.keys() != by_source.keys():
            macro = sum(by_domain.values()) / max(
                len(by_domain), 1
            )  # NaN, and left out, if a domain has no score
            out |= _known({f"accuracy_domain/{name}": mean for name, mean in by_domain.items()})
            out |= _known({"accuracy_macro": macro})
        return out

    def _by_name(self, kind: str) -> dict[str, float]:
        """The mean score of each named source or domain."""
        score, key, sample = self._column("score"), self._column("key"), self._column("sample")
        numbers = self._column(kind)
        out = {}
        for name in self._names(kind):
            rows = numbers == stable_hash(name)
            out[name] = average_at_k(score[rows], key[rows], sample[rows], self.confidence).by_prompt.mean
        return out

    def _names(self, kind: str) -> list[str]:
        names: Any = self.names
        if isinstance(names, list) and not names:
            return []
        text = bytes(dim_zero_cat(names).cpu().tolist()).decode("utf-8", "surrogatepass")
        found = {name.removeprefix(kind) for name in text.split("\0") if name.startswith(kind)}
        return sorted(found - {""})


def _accuracy(score: Tensor, key: Tensor, sample: Tensor, confidence: float) -> dict[str, float]:
    x = average_at_k(score, key, sample, confidence)
    return _known(
        {
            **_named("accuracy", x.by_prompt),
            "accuracy_seed_std": x.seed_std,
            "accuracy_seed_low": x.by_seed.low,
            "accuracy_seed_high": x.by_seed.high,
            "unscored": x.unscored,
        }
    )


def _passes(
    score: Tensor, key: Tensor, ks: Sequence[int] | None, threshold: float, confidence: float
) -> dict[str, float]:
    out: dict[str, float] = {}
    for k, x in pass_at_k(score, key, ks, threshold, confidence).items():
        out |= _named(f"pass@{k}", x)
    return _known(out)


def _lengths(length: Tensor, score: Tensor, threshold: float) -> dict[str, float]:
    return _known(
        {
            "length": _mean(length),
            "length_correct": _mean(length[score >= threshold]),
            "length_incorrect": _mean(length[score < threshold]),
            "length_unscored": _mean(length[score.isnan()]),
        }
    )


def _named(name: str, x: Interval) -> dict[str, float]:
    return {name: x.mean, f"{name}_low": x.low, f"{name}_high": x.high}


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else math.nan


def _known(values: Mapping[str, float]) -> dict[str, float]:
    """Without the values that are not defined."""
    return {name: value for name, value in values.items() if not math.isnan(value)}
