"""How well a discriminator tells teacher from student, and how much of that is length: pure functions.

Legend: ``B`` student rows, ``R`` teacher rows, ``C`` pairs of one of each with the same prompt (``Pairs`` of
``losses/adversarial.py``). Intervals are over prompts, as in :mod:`.statistics`: every prompt counts once, with the
mean of its pairs.

Only what was sampled by the present student and scored by the discriminator *before* its update on it says how good
the discriminator is as a reward: rows of a replay buffer, or a second look at the same rows, flatter it. An accuracy of
1 with a flat group means no signal, one of ½ a dead discriminator or a student that cannot be told from the teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.adversarial import Pairs
from lightning_onpolicy.modules.statistics import Interval, grouped, t_interval


def pair_accuracy(score_B: Tensor, teacher_R: Tensor, pairs: Pairs, group_B: Tensor) -> Interval:
    """Share of pairs in which the teacher's score is the higher one; a tie is half. Chance is ½ for any group size.

    Args:
        score_B: ``[B]`` scores of the student's answers.
        teacher_R: ``[R]`` scores of the teacher's.
        pairs: What is compared.
        group_B: ``[B]`` number of the row's prompt.
    """
    gap_C = _gap(score_B, teacher_R, pairs)
    return _by_prompt(0.5 * (1 + gap_C.sign()), pairs, group_B)


def score_gap(score_B: Tensor, teacher_R: Tensor, pairs: Pairs, group_B: Tensor) -> Interval:
    """Mean of s_q − s_p (arguments as in :func:`pair_accuracy`)."""
    return _by_prompt(_gap(score_B, teacher_R, pairs), pairs, group_B)


def length_gap(length_B: Tensor, teacher_length_R: Tensor, pairs: Pairs, group_B: Tensor) -> Interval:
    """Mean of student's − teacher's length, in the unit given.

    Args:
        length_B: ``[B]`` lengths of the student's answers.
        teacher_length_R: ``[R]`` of the teacher's.
        pairs: What is compared.
        group_B: ``[B]`` number of the row's prompt.
    """
    return _by_prompt(-_gap(length_B, teacher_length_R, pairs), pairs, group_B)


def matched_accuracy(
    score_B: Tensor,
    teacher_R: Tensor,
    length_B: Tensor,
    teacher_length_R: Tensor,
    pairs: Pairs,
    group_B: Tensor,
    *,
    tolerance: float = 0.1,
) -> Interval:
    """Accuracy over pairs of about equal length: what is left of it when length is no help.

    Args:
        score_B: ``[B]`` scores of the student's answers.
        teacher_R: ``[R]`` scores of the teacher's.
        length_B: ``[B]`` lengths of the student's answers.
        teacher_length_R: ``[R]`` of the teacher's.
        pairs: What is compared.
        group_B: ``[B]`` number of the row's prompt.
        tolerance: The longer of a pair is at most 1 + this times the shorter; 0 wants equal lengths.

    Returns:
        The accuracy; ``n`` is the number of prompts that have such a pair, 0 with a mean of NaN if none has.
    """
    student_C, teacher_C = length_B[pairs.student_C].double(), teacher_length_R[pairs.teacher_C].double()
    near_C = torch.maximum(student_C, teacher_C) <= (1 + tolerance) * torch.minimum(student_C, teacher_C)
    right_C = 0.5 * (1 + _gap(score_B, teacher_R, pairs).sign())
    return _by_prompt(right_C, pairs, group_B, near_C)


def length_correlation(score_B: Tensor, length_B: Tensor, group_B: Tensor) -> Interval:
    """Spearman's rank correlation of score and length within each group, averaged over groups.

    Within groups, because Bradley–Terry leaves a prompt's level of scores free and advantages compare nothing else;
    of ranks, because a score has no unit. Ties share their mean rank.

    Args:
        score_B: ``[B]`` scores; NaN = not scored, left out.
        length_B: ``[B]`` lengths.
        group_B: ``[B]`` number of the row's prompt.

    Returns:
        The mean; ``n`` is the number of groups that have one. A group with fewer than two scored rows, or of equal
        scores or lengths, has none.
    """
    scored_B = ~score_B.isnan()
    found = []
    for group in torch.unique(group_B[scored_B]).tolist():
        here_B = scored_B & (group_B == group)
        value = spearman(score_B[here_B], length_B[here_B])
        if not math.isnan(value):
            found.append(value)
    return t_interval(torch.tensor(found, dtype=torch.float64))


def spearman(x_N: Tensor, y_N: Tensor) -> float:
    """Pearson's correlation of mean ranks; NaN if either is constant or there are fewer than two.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3, 2, 1]))
        -1.0
    """
    x_N, y_N = (_ranks(v) for v in (x_N, y_N))
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    # Ranks are halves of integers: a constant has a deviation of exactly 0.
    scale = float((x_N @ x_N) * (y_N @ y_N))
    return float(x_N @ y_N) / math.sqrt(scale) if scale > 0 else math.nan


def _ranks(value_N: Tensor) -> Tensor:
    """``[N]`` float64 ranks from ½; equal values share their mean."""
    values, index_N, count = torch.unique(value_N.detach().cpu(), return_inverse=True, return_counts=True)
    rank: Tensor = torch.zeros(len(values), dtype=torch.float64) + count.cumsum(0) - 0.5 * count
    return rank[index_N]


def _gap(student_B: Tensor, teacher_R: Tensor, pairs: Pairs) -> Tensor:
    """``[C]`` teacher − student, float64."""
    return teacher_R.detach()[pairs.teacher_C].double() - student_B.detach()[pairs.student_C].double()


def _by_prompt(value_C: Tensor, pairs: Pairs, group_B: Tensor, keep_C: Tensor | None = None) -> Interval:
    prompt_C = group_B[pairs.student_C]
    if keep_C is not None:
        value_C, prompt_C = value_C[keep_C], prompt_C[keep_C]
    sums_P, counts_P, _ = grouped(value_C, prompt_C)
    return t_interval(sums_P / counts_P)
