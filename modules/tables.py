"""An evaluation as a table: a line per task, per domain, and for all of it, by items (micro) and by domains (macro).

Every interval over items has the item as its unit, whatever the number of its samples (see :mod:`.statistics`). Seeds
are the samples' numbers: sample ``j`` of every item together is the ``j``-th of k independent evaluations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_onpolicy.modules.keys import stable_hash
from lightning_onpolicy.modules.metrics import CORRECT
from lightning_onpolicy.modules.paired import Paired, compare_paired, compare_strata, stratified_interval
from lightning_onpolicy.modules.samples import Evaluation, Sample, by_item, scores_by_item
from lightning_onpolicy.modules.statistics import (
    Interval,
    average_at_k,
    cut,
    grouped,
    pass_at_k,
    t_interval,
    unbiased_pass_at_k,
)

Level = Literal["task", "domain", "macro", "micro"]


@dataclass(frozen=True)
class Line:
    """The numbers of one task, of one domain, or of all.

    Args:
        level: ``task``; ``domain``: its items count equally; ``macro``: domains count equally; ``micro``: all items do.
        domain: The domain; empty for macro and micro.
        task: The task; empty for all but tasks.
        items: Number of items.
        k: Fewest and most samples of an item.
        accuracy: avg@k, with its interval over items.
        seed_std: Standard deviation of the mean score over the k seeds; NaN with one.
        by_seed: Mean over the k seeds, with its interval: how far sampling again would move it.
        pass_at: pass@k by k, with its interval over items.
        truncated: Share of samples cut by length.
        length: Mean length of a sample in tokens.
        unscored: Share of samples that could not be scored.
    """

    level: Level
    domain: str
    task: str
    items: int
    k: tuple[int, int]
    accuracy: Interval
    seed_std: float
    by_seed: Interval
    pass_at: dict[int, Interval]
    truncated: float
    length: float
    unscored: float

    @property
    def name(self) -> str:
        """What the line is of."""
        return self.task or self.domain or self.level


@dataclass(frozen=True)
class Settings:
    """What the numbers of a table depend on besides the samples.

    Args:
        ks: For pass@k; None takes the powers of two up to the number of samples of an item.
        correct_threshold: A sample is correct, for pass@k, if its score is at least this.
        confidence: Coverage of all intervals.

    Raises:
        ValueError: If a value is out of range.
    """

    ks: tuple[int, ...] | None = None
    correct_threshold: float = CORRECT
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.ks is not None and (not self.ks or any(k < 1 for k in self.ks)):
            raise ValueError(f"ks must be null or numbers >= 1, got {list(self.ks)}.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}.")


def tabulate(samples: Sequence[Sample], settings: Settings | None = None) -> list[Line]:
    """The lines of an evaluation: each domain followed by its tasks, then macro (of several domains) and micro.

    A domain that is one task of the same name has no line for it.
    """
    settings = settings or Settings()
    lines: list[Line] = []
    domains = split(samples, lambda s: s.domain)
    for name, rows in domains.items():
        lines.append(_line("domain", name, "", rows, settings))
        tasks = split(rows, lambda s: s.task)
        if list(tasks) != [name]:
            lines += [_line("task", name, task, part, settings) for task, part in tasks.items()]
    if len(domains) > 1:
        lines.append(_macro(list(domains.values()), [x for x in lines if x.level == "domain"], settings))
    if domains:
        lines.append(_line("micro", "", "", samples, settings))
    return lines


def split(samples: Sequence[Sample], key: Callable[[Sample], str]) -> dict[str, list[Sample]]:
    """The samples by name, in alphabetic order."""
    out: dict[str, list[Sample]] = {}
    for sample in samples:
        out.setdefault(key(sample), []).append(sample)
    return {name: out[name] for name in sorted(out)}


def _columns(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, items and numbers of the samples."""
    return (
        torch.tensor([s.value for s in samples], dtype=torch.float64),
        torch.tensor([stable_hash(s.item) for s in samples]),
        torch.tensor([s.sample for s in samples]),
    )


def _line(level: Level, domain: str, task: str, samples: Sequence[Sample], settings: Settings) -> Line:
    score, key, sample = _columns(samples)
    x = average_at_k(score, key, sample, settings.confidence)
    counts = [len(rows) for rows in by_item(samples).values()]
    return Line(
        level,
        domain,
        task,
        items=len(counts),
        k=(min(counts), max(counts)),
        accuracy=x.by_prompt,
        seed_std=x.seed_std,
        by_seed=x.by_seed,
        pass_at=pass_at_k(score, key, settings.ks, settings.correct_threshold, settings.confidence),
        truncated=_mean([not s.finished for s in samples]),
        length=_mean([s.length for s in samples]),
        unscored=x.unscored,
    )


def _macro(domains: Sequence[Sequence[Sample]], lines: Sequence[Line], settings: Settings) -> Line:
    """Means over domains; a pass@k that a domain has not, and a mean that one has not, are left out."""
    columns = [_columns(rows) for rows in domains]
    means = [item_means(score, key) for score, key, _ in columns]
    seeds = [seed_means(score, sample) for score, _, sample in columns]
    shared = sorted(set.intersection(*(set(x) for x in seeds)))
    by_seed = torch.tensor([_mean([x[j] for x in seeds]) for j in shared], dtype=torch.float64)
    ks = sorted(set.intersection(*(set(line.pass_at) for line in lines)))
    confidence = settings.confidence
    return Line(
        "macro",
        "",
        "",
        items=sum(line.items for line in lines),
        k=(min(line.k[0] for line in lines), max(line.k[1] for line in lines)),
        accuracy=_stratified(means, confidence),
        seed_std=float(by_seed.std()) if len(by_seed) > 1 else math.nan,
        by_seed=_within(t_interval(by_seed, confidence), by_seed),
        pass_at={
            k: _stratified([_passes(c[0], c[1], k, settings.correct_threshold) for c in columns], confidence)
            for k in ks
        },
        truncated=_mean([line.truncated for line in lines]),
        length=_mean([line.length for line in lines]),
        unscored=_mean([line.unscored for line in lines]),
    )


def _stratified(values: Sequence[Tensor], confidence: float) -> Interval:
    if not all(len(x) for x in values):  # a domain without a score: the mean over domains does not exist
        return Interval(math.nan, math.nan, math.nan, 0)
    return _within(stratified_interval(values, confidence), torch.cat(list(values)))


def _within(x: Interval, values: Tensor) -> Interval:
    """The interval, cut to [0, 1] if all values lie there."""
    return cut(x) if bool(((values >= 0) & (values <= 1)).all()) else x


def item_means(score: Tensor, key: Tensor) -> Tensor:
    """Mean score of each item with a score."""
    scored = ~score.isnan()
    sums, counts, _ = grouped(score[scored], key[scored])
    return sums / counts


def seed_means(score: Tensor, sample: Tensor) -> dict[int, float]:
    """Mean score of each seed with a score."""
    scored = ~score.isnan()
    sums, counts, numbers = grouped(score[scored], sample[scored])
    return dict(zip(numbers.tolist(), (sums / counts).tolist(), strict=True))


def _passes(score: Tensor, key: Tensor, k: int, threshold: float) -> Tensor:
    scored = ~score.isnan()
    correct, counts, _ = grouped((score[scored] >= threshold).double(), key[scored])
    return unbiased_pass_at_k(counts[counts >= k], correct[counts >= k], k)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Change:
    """How one domain, or all, differs between two evaluations.

    Args:
        level: As in :class:`Line`; there is none for tasks.
        domain: The domain; empty for macro and micro.
        result: The comparison.
    """

    level: Level
    domain: str
    result: Paired

    @property
    def name(self) -> str:
        """What the line is of."""
        return self.domain or self.level


def changes(before: Evaluation, after: Evaluation, confidence: float = 0.95) -> list[Change]:
    """The paired comparison of each domain, of their macro average, and of all items.

    Raises:
        ValueError: If items or domains differ; :func:`~.samples.differences` says more.
    """
    old, new = (
        {name: scores_by_item(rows) for name, rows in split(side.samples, lambda s: s.domain).items()}
        for side in (before, after)
    )
    if old.keys() != new.keys():
        raise ValueError(f"the two evaluations have different domains: {sorted(old)} and {sorted(new)}.")
    out = [Change("domain", name, compare_paired(old[name], new[name], confidence)) for name in old]
    if len(old) > 1:
        out.append(Change("macro", "", compare_strata(old, new, confidence)))
    whole = [scores_by_item(side.samples) for side in (before, after)]
    return [*out, Change("micro", "", compare_paired(whole[0], whole[1], confidence))]


def plain(value: Any) -> Any:
    """Lines and changes as JSON can hold them: NaN is null, keys are text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value
