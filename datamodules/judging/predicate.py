"""When a judgement is right: one pure predicate for rejection, reward and meta labels (SPCT, 2504.02495, eq. 10).

Legend: ``n`` responses; S scores, lab labels, both ``[n]``. With j = argmax lab, whose maximum is unique:

    n >= 2: right ⇔ S_j > S_i for all i ≠ j      strict: a tie at the top is wrong, the order of the others is ignored
    n = 1:  right ⇔ S_1 = lab_1, lab_1 ∈ {0, 1}  the template then asks for 0 or 1

A judgement that could not be read is never right. That makes a reward of −1 where the *judge* is trained
(:func:`judge_reward`); where a judge rewards a policy it is "not scored", which is another matter
(:mod:`.votes`).
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_onpolicy.datamodules.judging.items import check_labels


def is_right(scores: Sequence[int] | None, labels: Sequence[float]) -> bool:
    """Whether the scores single out the best response.

    Args:
        scores: ``[n]`` integers in the item's own order; None if none could be read.
        labels: ``[n]`` ground truth.

    Raises:
        ValueError: If the labels have no unique maximum or, for one response, are not 0 or 1; or their number differs
            from the scores'.

    Example:
        >>> is_right([7, 9, 2], labels=[0.1, 0.8, 0.3]), is_right([9, 9, 2], labels=[0.1, 0.8, 0.3])
        (True, False)
    """
    check_labels(labels, len(labels) if scores is None else len(scores), "is_right")
    if scores is None:
        return False
    if len(labels) == 1:
        return scores[0] == labels[0]
    best = max(range(len(labels)), key=labels.__getitem__)
    return all(scores[best] > score for i, score in enumerate(scores) if i != best)


def judge_reward(scores: Sequence[int] | None, labels: Sequence[float], wrong: float = -1.0) -> float:
    """+1 if the judgement is right, else ``wrong``, also if it could not be read (the rest as in :func:`is_right`)."""
    return 1.0 if is_right(scores, labels) else wrong
