"""Dynamic sampling: only groups that teach something enter a batch, and others are sampled in place of the rest.

A group whose rewards are all equal has no advantage, so it costs time and dilutes token means (DAPO, 2503.14476). What
counts is the raw task reward of the whole group, before shaping, and whether it varies at all: a standard deviation
would take float noise for a signal, and a mean would drop partial credit.

What counts by default is any difference; ``threshold`` takes the right and the wrong instead, so that an all-wrong
group with more and less of partial credit does not pass (the accuracy filter of DAPO and verl).

All ranks sample equally many rounds, because where a forward pass is a collective they must; a rank that has more than
it needs carries the surplus over. Fresh groups go first, so what is carried fills gaps only and is never older than
``max_age`` batches; ``policy_lag`` in the metrics shows it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt

log = logging.getLogger(__name__)
#: Times ``max_rounds`` that are sampled before nothing at all to train on is an error.
PATIENCE = 8


@dataclass(frozen=True)
class DynamicSampling:
    """How a batch is filled with groups whose reward varies.

    Args:
        max_rounds: Most times that prompts are sampled for one batch; then the smaller batch is trained on. While no
            rank has a single group, up to ``PATIENCE`` times as many.
        metric: Name of the reward that must vary within a group; default: the weighted total before shaping.
        threshold: A reward counts as right from here on and as wrong below, and groups must have both; null: any two
            rewards that differ will do.
        max_age: Batches a surplus group may wait for; 0 throws surplus away.

    Raises:
        ValueError: If a number is out of range.
    """

    max_rounds: int = 4
    metric: str | None = None
    max_age: int = 1
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise ValueError(f"dynamic_sampling.max_rounds must be >= 1, got {self.max_rounds}.")
        if self.max_age < 0:
            raise ValueError(f"dynamic_sampling.max_age must be >= 0, got {self.max_age}.")


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its rewards.

    Args:
        group: Prompt and completions.
        parts: Every reward's scores by name, one per completion.
        total: Their weighted sums, before shaping; None where a part is.
    """

    group: Group
    parts: Mapping[str, Sequence[float | None]]
    total: Sequence[float | None]

    def known(self, metric: str | None = None) -> list[float]:
        """The raw rewards of completions that could be scored."""
        return [x for x in (self.total if metric is None else self.parts[metric]) if x is not None]

    def varies(self, metric: str | None = None, threshold: float | None = None) -> bool:
        """Whether they differ, or lie on both sides of a threshold."""
        known: list[float] = self.known(metric)
        if threshold is not None:
            known = [float(x >= threshold - 1e-6) for x in known]
        return bool(known) and max(known) != min(known)


class Refill:
    """Fills batches with groups that vary; keeps the surplus for the next one.

    Args:
        spec: How.
        wanted: Groups per batch on this rank.
        any_rank: Whether a statement holds on any rank; a collective, called equally often everywhere.
    """

    def __init__(self, spec: DynamicSampling, wanted: int, any_rank: Callable[[bool], bool]) -> None:
        self.spec, self.wanted, self.any_rank = spec, wanted, any_rank
        # With the number of the batch it was sampled for, and how.
        self._surplus: list[tuple[int, str, ScoredGroup]] = []
        self._said = False

    def fill(
        self, number: int, sample: Callable[[int], Sequence[ScoredGroup]], drawn: str = ""
    ) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Groups of one batch, and what was counted on the way.

        Args:
            number: Of the batch.
            sample: Makes the groups of a round, given its number.
            drawn: How they are sampled; surplus that was sampled otherwise is thrown away.

        Returns:
            At most ``wanted`` groups; none if no group varies on this rank but some do on others. Counts are of all
            that was sampled: groups ``sampled``, ``varying``, in which all were right (``solved``) or none
            (``failed``), the share of right completions (``pass_rate``), ``tokens``; then groups ``carried`` over and
            ``missing``, and ``rounds``.

        Raises:
            RuntimeError: If no group varies on any rank.
        """
        old = [x for x in self._surplus if number - x[0] <= self.spec.max_age and x[1] == drawn]
        fresh: list[ScoredGroup] = []
        seen: list[ScoredGroup] = []
        rounds = 0
        while self._more(rounds, len(fresh) + len(old)):
            groups = sample(rounds)
            rounds += 1
            seen += groups
            fresh += [g for g in groups if g.varies(self.spec.metric, self.spec.threshold)]
        used = fresh[: self.wanted]
        carried = old[: self.wanted - len(used)]
        self._surplus = [*old[len(carried) :], *((number, drawn, g) for g in fresh[len(used) :])]
        batch = [*used, *(g for *_, g in carried)]
        if not self.any_rank(bool(batch)):
            silent = sum(not g.known(self.spec.metric) for g in seen)
            raise RuntimeError(
                f"batch {number}: none of the {len(seen)} groups sampled in {rounds} rounds has rewards that differ: "
                f"{silent} could not be scored, and in the others every prompt is always solved or never. Change the "
                "difficulty of the prompts, raise group_size or temperature, or look at what the verifier answers."
            )
        if len(batch) < self.wanted:
            # Once aloud; groups/missing in the metrics says how often.
            log.log(
                logging.INFO if self._said else logging.WARNING,
                "batch %d: %d of %d groups after %d rounds (%d sampled): training on the smaller batch.",
                number,
                len(batch),
                self.wanted,
                rounds,
                len(seen),
            )
            self._said = True
        counts = {"varying": len(fresh), "carried": len(carried), "rounds": rounds}
        counts["missing"] = self.wanted - len(batch)
        return batch, {**summary(seen, self.spec), **{name: float(n) for name, n in counts.items()}}

    def _more(self, rounds: int, have: int) -> bool:
        """Whether another round is sampled: the same answer on all ranks."""
        if rounds == 0:
            return True
        if rounds < self.spec.max_rounds:
            return self.any_rank(have < self.wanted)
        return rounds < PATIENCE * self.spec.max_rounds and not self.any_rank(have > 0)

    def state_dict(self) -> list[dict[str, Any]]:
        """The surplus in plain values and tensors; a group whose row has others is left out, with a warning."""
        kept = []
        for number, drawn, scored in self._surplus:
            try:
                kept.append({"number": number, "drawn": drawn, **_plain(scored)})
            except TypeError as error:
                prompt = scored.group.prompt
                log.warning(
                    "dynamic sampling: a checkpoint cannot keep the surplus group of prompt %r: %s. A resumed run "
                    "samples others; keep such columns as text.",
                    prompt.uid or prompt.text,
                    error,
                )
        return kept

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take up a surplus."""
        self._surplus = [(int(item["number"]), item["drawn"], _scored(item)) for item in state]


def summary(seen: Sequence[ScoredGroup], spec: DynamicSampling) -> dict[str, float]:
    """What all sampled groups say of the prompts, the dropped ones included; see :meth:`Refill.fill`."""
    threshold = 1.0 if spec.threshold is None else spec.threshold
    right = [[x >= threshold - 1e-6 for x in known] for g in seen if (known := g.known(spec.metric))]
    flat = [one for group in right for one in group]
    return {
        "sampled": float(len(seen)),
        "solved": float(sum(map(all, right))),
        "failed": float(sum(not any(group) for group in right)),
        "pass_rate": sum(flat) / len(flat) if flat else 0.0,
        "tokens": float(sum(c.tokens for g in seen for c in g.group.completions)),
    }


def plain(value: Any) -> Any:
    """A row's value as weights-only loading accepts it: NumPy's scalars and arrays become Python's.

    Raises:
        TypeError: If it has none such.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | int | float | bool | bytes | torch.Tensor):
        return value
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        inside = [plain(v) for v in value]
        return (
            inside if isinstance(value, list) else tuple(inside) if isinstance(value, tuple) else set(inside)
        )
    raise TypeError(f"its row holds a {type(value).__module__}.{type(value).__qualname__}")


def _plain(scored: ScoredGroup) -> dict[str, Any]:
    prompt, completions = scored.group.prompt, scored.group.completions
    return {
        "prompt": {**asdict(prompt), "ids": list(prompt.ids), "row": plain(prompt.row)},
        "completions": [dict(vars(c)) for c in completions],
        "parts": {name: list(scores) for name, scores in scored.parts.items()},
        "total": list(scored.total),
    }


def _scored(item: Mapping[str, Any]) -> ScoredGroup:
    prompt = Prompt(**{**item["prompt"], "ids": tuple(item["prompt"]["ids"])})
    group = Group(prompt, tuple(Completion(**c) for c in item["completions"]))
    return ScoredGroup(group, item["parts"], item["total"])
