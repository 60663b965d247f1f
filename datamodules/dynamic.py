"""Dynamic sampling: only groups that teach something enter a batch, and others are sampled in place of the rest.

A group whose rewards are all equal has no advantage, so it costs time and dilutes token means (DAPO, 2503.14476). What
counts is the raw task reward of the whole group, before shaping, and whether it varies at all: a standard deviation
would take float noise for a signal, and a mean would drop partial credit.

All ranks sample equally many rounds, because where a forward pass is a collective they must; a rank that has more than
it needs carries the surplus over. Fresh groups go first, so what is carried fills gaps only and is never older than
``max_age`` batches; ``policy_lag`` in the metrics shows it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DynamicSampling:
    """How a batch is filled with groups whose reward varies.

    Args:
        max_rounds: Most times that prompts are sampled for one batch; then the smaller batch is trained on.
        metric: Name of the reward that must vary within a group; default: the weighted total before shaping.
        max_age: Batches a surplus group may wait for; 0 throws surplus away.

    Raises:
        ValueError: If a number is out of range.
    """

    max_rounds: int = 4
    metric: str | None = None
    max_age: int = 1

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

    def varies(self, metric: str | None) -> bool:
        """Whether the raw reward differs between completions that could be scored."""
        known = self._known(metric)
        return bool(known) and max(known) != min(known)

    def silent(self, metric: str | None) -> bool:
        """Whether no completion could be scored."""
        return not self._known(metric)

    def _known(self, metric: str | None) -> list[float]:
        return [x for x in (self.total if metric is None else self.parts[metric]) if x is not None]


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
            At most ``wanted`` groups; none if no group varies on this rank but some do on others.

        Raises:
            RuntimeError: If no group varies on any rank.
        """
        old = [x for x in self._surplus if number - x[0] <= self.spec.max_age and x[1] == drawn]
        fresh: list[ScoredGroup] = []
        sampled = rounds = silent = 0
        while rounds == 0 or (
            rounds < self.spec.max_rounds and self.any_rank(len(fresh) + len(old) < self.wanted)
        ):
            groups = sample(rounds)
            rounds += 1
            sampled += len(groups)
            silent += sum(g.silent(self.spec.metric) for g in groups)
            fresh += [g for g in groups if g.varies(self.spec.metric)]
        used = fresh[: self.wanted]
        carried = old[: self.wanted - len(used)]
        self._surplus = [*old[len(carried) :], *((number, drawn, g) for g in fresh[len(used) :])]
        batch = [*used, *(g for *_, g in carried)]
        if not self.any_rank(bool(batch)):
            raise RuntimeError(
                f"batch {number}: none of the {sampled} groups sampled in {rounds} rounds has rewards that differ: "
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
                sampled,
            )
            self._said = True
        counts = {"sampled": sampled, "varying": len(fresh), "carried": len(carried), "rounds": rounds}
        return batch, {name: float(n) for name, n in counts.items()} | {
            "missing": float(self.wanted - len(batch))
        }

    def state_dict(self) -> list[dict[str, Any]]:
        """The surplus in plain values and tensors."""
        return [
            {"number": number, "drawn": drawn, **_plain(scored)} for number, drawn, scored in self._surplus
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take up a surplus."""
        self._surplus = [(int(item["number"]), item["drawn"], _scored(item)) for item in state]


def _plain(scored: ScoredGroup) -> dict[str, Any]:
    prompt, completions = scored.group.prompt, scored.group.completions
    return {
        "prompt": {**asdict(prompt), "ids": list(prompt.ids), "row": dict(prompt.row)},
        "completions": [dict(vars(c)) for c in completions],
        "parts": {name: list(scores) for name, scores in scored.parts.items()},
        "total": list(scored.total),
    }


def _scored(item: Mapping[str, Any]) -> ScoredGroup:
    prompt = Prompt(**{**item["prompt"], "ids": tuple(item["prompt"]["ids"])})
    group = Group(prompt, tuple(Completion(**c) for c in item["completions"]))
    return ScoredGroup(group, item["parts"], item["total"])
