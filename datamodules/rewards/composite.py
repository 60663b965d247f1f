"""Rewards made of rewards, whose parts are all logged: weighed, gated, or chosen by the prompt.

A weighted sum of rewards needs none of these: ``rewards`` and ``reward_weights`` of the datamodule are one. They are
for mixes of domains, where maths needs one verifier (or a sum of its own) and code another.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_onpolicy.datamodules.rewards.base import Reward, is_concurrent

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Group

Scores = list[list[float | None]]


class CompositeReward(Reward):
    """A reward with named rewards inside."""

    inner: Mapping[str, Reward]

    @property
    def concurrent(self) -> bool:
        """Whether all rewards inside are."""
        return all(is_concurrent(reward) for reward in self.inner.values())

    @abstractmethod
    def score_parts(self, groups: Sequence[Group]) -> tuple[Scores, dict[str, Scores]]:
        """The scores, and those of every reward inside by its name; a composite's own are ``name/part``.

        Raises:
            ValueError: If a reward inside does not return one score per completion; the message names it.
        """

    def score(self, groups: Sequence[Group]) -> Scores:
        """One list per group, one score per completion."""
        return self.score_parts(groups)[0]

    def close(self) -> None:
        """Close every reward inside that can be closed."""
        for reward in self.inner.values():
            close = getattr(reward, "close", None)
            if close is not None:
                close()


class WeightedReward(CompositeReward):
    """The weighted sum of rewards; None where one with non-zero weight is None.

    Args:
        rewards: Named rewards.
        weights: Their weights; default 1 each.

    Raises:
        ValueError: If there is no reward, or a weight names none.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> from lightning_onpolicy.datamodules.rewards import FunctionReward, TagReward
        >>> right = FunctionReward(lambda prompt, text: float("4" in text))
        >>> reward = WeightedReward({"right": right, "format": TagReward(["answer"])}, {"format": 0.1})
        >>> reward.score([group_of({}, "<answer>4</answer>", "4", "<answer>5</answer>")])
        [[1.1, 1.0, 0.1]]
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float] | None = None) -> None:
        unknown = sorted(set(weights or {}) - set(rewards))
        if unknown or not rewards:
            raise ValueError(f"weights names {unknown}; the rewards are {sorted(rewards)}.")
        self.inner, self.weights = dict(rewards), {**dict.fromkeys(rewards, 1.0), **(weights or {})}

    def score_parts(self, groups: Sequence[Group]) -> tuple[Scores, dict[str, Scores]]:
        """The sums and their terms, unweighted."""
        parts = score_all(self.inner, groups)
        return weighted_sum(parts, self.weights, groups), parts


class GatedReward(CompositeReward):
    """A reward that counts only where another, the gate, reaches a threshold.

    Args:
        reward: What counts.
        gate: What must hold, e.g. a format.
        threshold: The gate's least score.
        otherwise: Score where the gate is lower.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> from lightning_onpolicy.datamodules.rewards import FunctionReward, TagReward
        >>> right = FunctionReward(lambda prompt, text: float("4" in text))
        >>> reward = GatedReward(right, gate=TagReward(["answer"]), otherwise=-0.5)
        >>> reward.score([group_of({}, "<answer>4</answer>", "4", "<answer>5</answer>")])
        [[1.0, -0.5, 0.0]]
    """

    def __init__(self, reward: Reward, gate: Reward, threshold: float = 1.0, otherwise: float = 0.0) -> None:
        self.inner = {"reward": reward, "gate": gate}
        self.threshold, self.otherwise = threshold, otherwise

    def score_parts(self, groups: Sequence[Group]) -> tuple[Scores, dict[str, Scores]]:
        """The reward behind the gate; None where the gate is None."""
        parts = score_all(self.inner, groups)
        pairs = zip(parts["reward"], parts["gate"], strict=True)
        return [[self._one(*pair) for pair in zip(*rows, strict=True)] for rows in pairs], parts

    def _one(self, score: float | None, gate: float | None) -> float | None:
        if gate is None:
            return None
        return score if gate >= self.threshold - 1e-6 else self.otherwise


class RoutedReward(CompositeReward):
    """Each prompt's own reward, by its ``source`` or another value of its row.

    Args:
        routes: Value → reward; the route ``"*"`` takes what no other does.
        key: Key of the value in the row; null takes the prompt's source.

    Raises:
        ValueError: If there is no route; while scoring, if a prompt's value has none (the message names both).

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> from lightning_onpolicy.datamodules.rewards import FunctionReward
        >>> short, right = (FunctionReward(lambda prompt, text, n=n: float(len(text) < n)) for n in (2, 4))
        >>> reward = RoutedReward({"sums": short, "*": right})
        >>> reward.score([group_of({"source": "sums"}, "123"), group_of({"source": "words"}, "123")])
        [[0.0], [1.0]]
    """

    def __init__(self, routes: dict[str, Reward], key: str | None = None) -> None:
        if not routes:
            raise ValueError("routes must name at least one reward.")
        self.inner, self.key = dict(routes), key

    def score_parts(self, groups: Sequence[Group]) -> tuple[Scores, dict[str, Scores]]:
        """Each group's scores; the parts of the routes that it did not take are None.

        All parts are there whatever was routed, so that all ranks log the same names.
        """
        taken = [self._route(group) for group in groups]
        out: Scores = [[] for _ in groups]
        parts: dict[str, Scores] = {
            name: [[None] * len(group.completions) for group in groups] for name in part_names(self.inner)
        }
        for route, reward in self.inner.items():
            mine = [i for i, name in enumerate(taken) if name == route]
            if not mine:
                continue
            for name, scores in score_all({route: reward}, [groups[i] for i in mine]).items():
                for i, row in zip(mine, scores, strict=True):
                    parts[name][i] = row
                    if name == route:
                        out[i] = row
        return out, parts

    def _route(self, group: Group) -> str:
        prompt = group.prompt
        value = prompt.source if self.key is None else str(prompt.row.get(self.key))
        route = value if value in self.inner else "*"
        if route not in self.inner:
            raise ValueError(
                f"prompt {prompt.uid!r}: no reward for {self.key or 'source'} {value!r}; routes has "
                f"{sorted(self.inner)}. Add it, or '*' for all others."
            )
        return route


def part_names(rewards: Mapping[str, Reward]) -> list[str]:
    """The names under which :func:`score_all` gives scores."""
    names: list[str] = []
    for name, reward in rewards.items():
        inner = part_names(reward.inner) if isinstance(reward, CompositeReward) else []
        names += [name, *(f"{name}/{part}" for part in inner)]
    return names


def score_all(rewards: Mapping[str, Reward], groups: Sequence[Group]) -> dict[str, Scores]:
    """Every reward's scores by name, those inside composites as ``name/part``.

    Raises:
        ValueError: If a reward does not return one score per completion; the message names it.
    """
    out: dict[str, Scores] = {}
    sizes = [len(group.completions) for group in groups]
    for name, reward in rewards.items():
        if not hasattr(reward, "score"):
            raise ValueError(
                f"reward {name!r} is a {type(reward).__name__}, which has no score(groups): wrap a function of "
                "(prompt, text) in FunctionReward."
            )
        inner: dict[str, Scores] = {}
        if isinstance(reward, CompositeReward):
            scores, inner = reward.score_parts(groups)
        else:
            scores = reward.score(groups)
        if (given := [len(s) if isinstance(s, Sequence) else "no" for s in scores]) != sizes:
            raise ValueError(
                f"reward {name!r} returned {given} scores per group, and the groups have {sizes} completions: "
                "score(groups) returns one list per group, one score per completion."
            )
        out[name] = scores
        out |= {f"{name}/{part}": value for part, value in inner.items()}
    return out


def weighted_sum(
    parts: Mapping[str, Scores], weights: Mapping[str, float], groups: Sequence[Group]
) -> Scores:
    """The weighted sum of the parts; None where a part with non-zero weight is None, or no part has a weight."""
    used = {name: parts[name] for name, weight in weights.items() if weight != 0}
    out: Scores = []
    for g, group in enumerate(groups):
        row: list[float | None] = []
        for i in range(len(group.completions)):
            values = {name: scores[g][i] for name, scores in used.items()}
            known = {name: v for name, v in values.items() if v is not None}
            complete = bool(used) and len(known) == len(values)
            row.append(sum(weights[n] * v for n, v in known.items()) if complete else None)
        out.append(row)
    return out
