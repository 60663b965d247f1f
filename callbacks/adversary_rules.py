"""When an adversarial game is no longer worth playing: rules on means over a window of steps, as pure functions.

No single number says that a game is well. An accuracy of 1 with scores that do not differ within a group is a
discriminator that teaches nothing; one of ½ is a dead discriminator or a student that cannot be told from the teacher,
which only a judge from outside can decide. So each rule names what it saw and what else to look at.

Sources of the limits: GAD (2511.10643) for lengths, of which its students' are up to 1.35 times the teacher's; PRISM
(2604.28123) for scores, which it clamps at ±10. The others are of our own choice.

Legend: ``S`` steps in a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from lightning_onpolicy.modules.statistics import Interval


@dataclass(frozen=True)
class GameRules:
    """Limits of a healthy game, on means over the window; null does not look.

    Args:
        high: Accuracy from which a discriminator must still tell answers of one group apart (rule ``no_signal``).
        flat: Share of groups of equal scores from which it does not.
        spread: Standard deviation of scores within a group, in log-odds, up to which it does not either.
        low: Accuracy that a discriminator must exceed (``blind``).
        score_gap: Largest distance of the teacher's and the student's scores (``runaway``).
        matched: Largest loss of accuracy on pairs of equal length (``by_length``).
        length: Largest ratio of student's and teacher's mean length, or its inverse (``length``).
        swing: Largest oscillation of the length gap, as a share of the teacher's mean length (``oscillation``).
        entropy: Share of the entropy of the first full window that must be left (``entropy``).
        probe: Largest sure advantage over ½ of what sees only an artefact: ends, white space or tokenisation
            (``probe/<name>``).
        probe_length: The same of what sees only length, which is a matter of style too (``probe/length``).

    Raises:
        ValueError: If a limit is out of range.
    """

    high: float | None = 0.98
    flat: float = 0.9
    spread: float = 0.05
    low: float | None = 0.5
    score_gap: float | None = 20.0
    matched: float | None = 0.25
    length: float | None = 1.5
    swing: float | None = 0.25
    entropy: float | None = 0.2
    probe: float | None = 0.05
    probe_length: float | None = 0.3

    def __post_init__(self) -> None:
        for key, low, high in (
            ("high", 0.0, 1.0),
            ("flat", 0.0, 1.0),
            ("spread", 0.0, math.inf),
            ("low", 0.0, 1.0),
            ("score_gap", 0.0, math.inf),
            ("matched", 0.0, 1.0),
            ("length", 1.0, math.inf),
            ("swing", 0.0, math.inf),
            ("entropy", 0.0, 1.0),
            ("probe", 0.0, 0.5),
            ("probe_length", 0.0, 0.5),
        ):
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise ValueError(f"rules.{key} must be in [{low:g}, {high:g}], got {value}.")


# rule → its limit, and the metrics without which it cannot be watched
RULES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "no_signal": ("high", ("fresh/accuracy", "fresh/flat_groups", "fresh/score_std")),
    "blind": ("low", ("fresh/accuracy",)),
    "runaway": ("score_gap", ("fresh/score_gap",)),
    "by_length": ("matched", ("fresh/accuracy", "fresh/matched_accuracy")),
    "length": ("length", ("fresh/length_gap", "fresh/teacher_length")),
    "oscillation": ("swing", ("fresh/length_gap", "fresh/teacher_length")),
    "entropy": ("entropy", ("entropy",)),
}
METRICS = tuple(dict.fromkeys(name for _, names in RULES.values() for name in names))


def watched(rules: GameRules) -> dict[str, tuple[str, ...]]:
    """The rules that have a limit, with the metrics that they need."""
    return {rule: names for rule, (key, names) in RULES.items() if getattr(rules, key) is not None}


def broken(rules: GameRules, window: Mapping[str, Sequence[float]], entropy: float | None) -> dict[str, str]:
    """The rules that a full window breaks, with a sentence each.

    Args:
        rules: The limits.
        window: Metric → its last S values. A rule that lacks one of its metrics is not broken.
        entropy: Mean entropy of the first full window; None, not known yet.

    Example:
        >>> sorted(broken(GameRules(), {"fresh/accuracy": [0.4, 0.5]}, None))
        ['blind']
    """
    means = {name: mean(window.get(name, ())) for name in METRICS}
    accuracy, matched = means["fresh/accuracy"], means["fresh/matched_accuracy"]
    flat, std, apart = means["fresh/flat_groups"], means["fresh/score_std"], means["fresh/score_gap"]
    gap, teacher, now = means["fresh/length_gap"], means["fresh/teacher_length"], means["entropy"]
    ratio = 1 + gap / teacher
    swing = oscillation(window.get("fresh/length_gap", ())) / teacher
    start = math.nan if entropy is None else entropy
    # Where a limit or a value is not there it is NaN, which is neither above nor below anything.
    limit = {key: math.nan if value is None else value for key, value in asdict(rules).items()}
    found = {
        "no_signal": (
            accuracy >= limit["high"] and (flat >= rules.flat or std <= rules.spread),
            f"accuracy {accuracy:.3f}, but {flat:.0%} of the groups have equal scores, and within groups they deviate "
            f"by {std:.3g}: the generator learns nothing. Let the discriminator wait (gate.high) or bound it "
            "(pairs.smoothing, r1)",
        ),
        "blind": (
            accuracy <= limit["low"],
            f"accuracy {accuracy:.3f} is not above {rules.low}: the reward says nothing, or the reverse of the truth. "
            "Give the discriminator more (its learning rate, discriminator_loop.updates, generator_every, replay), or "
            "stop here if a held-out judge says that the student has caught up",
        ),
        "runaway": (
            apart > limit["score_gap"],
            f"the teacher's score is {apart:.1f} above the student's, most {rules.score_gap}: bound it "
            "(pairs.score_penalty, pairs.smoothing, r1) or let the discriminator wait (gate.high)",
        ),
        "by_length": (
            accuracy - matched > limit["matched"],
            f"accuracy {accuracy:.3f} falls to {matched:.3f} among answers of equal length: length is most of what "
            "is paid. reward.debias takes it off",
        ),
        "length": (
            max(ratio, 1 / ratio if ratio else math.inf) > limit["length"],
            f"the student's answers have {ratio:.2f} times the teacher's length, most {rules.length} either way: "
            "length may be what is paid. Compare fresh/matched_accuracy; reward.debias takes length off",
        ),
        "oscillation": (
            swing > limit["swing"],
            f"the length gap swings by {swing:.2f} of the teacher's length, most {rules.swing}: the players chase each "
            "other on length. Try replay, a lower learning rate, reward.debias",
        ),
        "entropy": (
            now < limit["entropy"] * start,
            f"entropy {now:.4f} is below {rules.entropy} of its start, {start:.4f}: groups will soon be of one answer. "
            "Raise kl.coef or entropy.bonus, or lower the learning rate",
        ),
    }
    return {name: said for name, (hit, said) in found.items() if hit}


def leaks(rules: GameRules, probes: Mapping[str, Interval]) -> dict[str, str]:
    """The probes that surely do better than they may, with a sentence each, as ``probe/<name>``.

    Args:
        rules: The limits.
        probes: Name → accuracy; a bound that is NaN breaks nothing.
    """
    found = {}
    for name, x in probes.items():
        limit = rules.probe_length if name == "length" else rules.probe
        if limit is not None and x.low > 0.5 + limit:
            found[f"probe/{name}"] = (
                f"{name} alone tells teacher from student in {x.mean:.3f} of the pairs ({x.low:.3f} to {x.high:.3f}, "
                f"{x.n} prompts): the discriminator can live on it"
            )
    return found


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of none."""
    return sum(values) / len(values) if len(values) else math.nan


def oscillation(gap_S: Sequence[float]) -> float:
    """Root mean square distance of a series from its straight line: what is left when the trend is taken off.

    A gap that only grows has 0. What batches of finite size add shows as well, so compare with a run's own start.

    Args:
        gap_S: Mean length gap of each step; NaN of fewer than three.

    Example:
        >>> round(oscillation([1.0, 2.0, 3.0, 4.0]), 6), round(oscillation([1.0, -1.0, -1.0, 1.0]), 6)
        (0.0, 1.0)
    """
    count = len(gap_S)
    if count < 3:
        return math.nan
    middle, average = (count - 1) / 2, mean(gap_S)
    spread = sum((i - middle) ** 2 for i in range(count))
    slope = sum((i - middle) * g for i, g in enumerate(gap_S)) / spread
    rest = ((g - average - slope * (i - middle)) ** 2 for i, g in enumerate(gap_S))
    return math.sqrt(sum(rest) / count)
