"""Could teacher and student be told apart without reading? Probes for what a discriminator must not live on.

A probe is a tiny Bradley–Terry classifier, σ(w · (φ(teacher) − φ(student))), over a few features of one artefact:
length, the end of the answer, white space, tokenisation. It is fitted on some prompts and judged on the others. Where
it does better than ½, so can the discriminator, and the student is then paid for the artefact. Judge what the
discriminator is *given* (after re-encoding, templates and cuts), not what the sampler emitted.

Legend: ``P`` prompts, ``C`` pairs of a teacher's and a student's answer to one prompt, ``F`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_onpolicy.datamodules.shuffle import Permutation
from lightning_onpolicy.modules.statistics import Interval, grouped, t_interval


@dataclass(frozen=True)
class Answer:
    """One answer as the discriminator sees it.

    Args:
        text: Its decoded text, special tokens left out.
        ids: Its token ids, an end-of-sequence token included where there is one.
        finished: Whether it ended by itself (False: cut for length).
    """

    text: str
    ids: tuple[int, ...]
    finished: bool


Features = Callable[[Answer], Sequence[float]]


def length_features(answer: Answer) -> Sequence[float]:
    """Tokens and characters."""
    return len(answer.ids), len(answer.text)


def end_features(eos_ids: Sequence[int]) -> Features:
    """Whether the answer ended by itself, whether its last id is an end-of-sequence token, and which.

    Args:
        eos_ids: Ids that end a sequence.
    """

    def features(answer: Answer) -> Sequence[float]:
        last = answer.ids[-1] if answer.ids else None
        return float(answer.finished), *(float(last == eos) for eos in eos_ids)

    return features


def white_features(answer: Answer) -> Sequence[float]:
    """White space before and after, and, per character between, spaces in a row, line breaks, blank lines, tabs.

    Rates leave the ends out: one line break at the end of every answer, over its size, would be its length.
    """
    text, inner = answer.text, answer.text.strip()
    rates = (inner.count(what) / max(len(inner), 1) for what in ("  ", "\n", "\n\n", "\t", "\r"))
    return float(text != text.lstrip()), float(text != text.rstrip()), *rates


def token_features(encode: Callable[[str], Sequence[int]], special_ids: Sequence[int] = ()) -> Features:
    """Whether the ids are those that encoding the text gives, and how many there are too many.

    A sampler may spell a text in ids that its tokenizer never would; a teacher's text is always encoded.

    Args:
        encode: From text to ids without special tokens.
        special_ids: Ids that do not show in the text, such as the end-of-sequence token: left out.
    """
    hidden = frozenset(special_ids)

    def features(answer: Answer) -> Sequence[float]:
        ids = [i for i in answer.ids if i not in hidden]
        canonical = list(encode(answer.text))
        return float(ids == canonical), float(len(ids) - len(canonical))

    return features


def probe(
    teacher: Mapping[str, Sequence[Answer]],
    student: Mapping[str, Sequence[Answer]],
    features: Features,
    *,
    folds: int = 5,
    seed: int = 0,
    ridge: float = 1e-2,
) -> Interval:
    """Held-out accuracy of a classifier that sees these features and their squares, and nothing else.

    Args:
        teacher: Answers by prompt uid.
        student: The student's; prompts that only one side has are left out.
        features: From an answer to a fixed number of values.
        folds: Parts into which prompts are cut; each is judged by the classifier of the others.
        seed: Chooses the parts.
        ridge: Penalty on the weights of standardised features.

    Returns:
        Share of pairs in which the teacher's answer is told, a tie half, with its interval over prompts. It does not
        count that classifiers of different parts share prompts, so it is a little too narrow.

    Raises:
        ValueError: If there are fewer prompts than folds, or folds < 2.
    """
    uids = sorted(uid for uid in teacher.keys() & student.keys() if teacher[uid] and student[uid])
    if not 2 <= folds <= len(uids):
        raise ValueError(
            f"folds must be from 2 to the number of prompts with answers from both sides, got {folds} and {len(uids)}."
        )
    difference_CF, prompt_C = _pairs([(teacher[uid], student[uid]) for uid in uids], features)
    weight_C = 1.0 / prompt_C.bincount().double()[prompt_C]
    order = Permutation(len(uids), key=(seed,))
    fold_C = torch.tensor([order(i) % folds for i in range(len(uids))])[prompt_C]
    right_C = torch.empty(len(prompt_C), dtype=torch.float64)
    for fold in range(folds):
        out_C = fold_C == fold
        weights_F = fit(difference_CF[~out_C], weight_C[~out_C], ridge)
        right_C[out_C] = 0.5 * (1 + (difference_CF[out_C] @ weights_F).sign())
    sums_P, counts_P, _ = grouped(right_C, prompt_C)
    return t_interval(sums_P / counts_P)


def fit(difference_CF: Tensor, weight_C: Tensor, ridge: float, steps: int = 50) -> Tensor:
    """``[F]`` weights of the ridge logistic regression without intercept of "teacher first", by damped Newton steps.

    Args:
        difference_CF: ``[C, F]`` float64 features of teacher − student.
        weight_C: ``[C]`` weights of the pairs.
        ridge: λ in mean softplus(−w · d) + ½ λ ‖w‖².
        steps: Most steps taken; few are.
    """
    weight_C = weight_C / weight_C.sum()
    eye_FF = torch.eye(difference_CF.shape[1], dtype=torch.float64)

    def value(w_F: Tensor) -> float:
        return float(weight_C @ softplus(-(difference_CF @ w_F)) + 0.5 * ridge * (w_F @ w_F))

    w_F = torch.zeros(difference_CF.shape[1], dtype=torch.float64)
    for _ in range(steps):
        wrong_C = torch.sigmoid(-(difference_CF @ w_F))
        gradient_F = ridge * w_F - difference_CF.T @ (weight_C * wrong_C)
        if float(gradient_F.abs().max()) < 1e-12:
            break
        curve_C = weight_C * wrong_C * (1 - wrong_C)
        step_F = torch.linalg.solve(
            difference_CF.T @ (curve_C[:, None] * difference_CF) + ridge * eye_FF, gradient_F
        )
        # A whole step may overshoot where the classes are far apart. The slope along −step is −gradient · step < 0.
        size, here, slope = 1.0, value(w_F), float(gradient_F @ step_F)
        while value(w_F - size * step_F) > here - 1e-4 * size * slope and size > 1e-6:
            size /= 2
        w_F = w_F - size * step_F
    return w_F


Verdict = Literal["leak", "chance", "undecided"]


def verdict(accuracy: Interval, margin: float = 0.05) -> Verdict:
    """What an interval around an accuracy says: nothing, unless it is narrow enough.

    ``chance``: it ends below ½ + margin. ``leak``: it begins above ½ and does not. Else ``undecided``: ask with more
    prompts.

    Args:
        accuracy: From :func:`probe`.
        margin: Advantage over ½ that does not matter.
    """
    if accuracy.high < 0.5 + margin:
        return "chance"
    return "leak" if accuracy.low > 0.5 else "undecided"


def _pairs(
    prompts: Sequence[tuple[Sequence[Answer], Sequence[Answer]]], features: Features
) -> tuple[Tensor, Tensor]:
    """``[C, 2F]`` differences of standardised features and their squares, and ``[C]`` the number of the prompt.

    Standardising uses all answers without asking whose they are, so it tells a classifier nothing about the others.
    """
    rows = [features(answer) for sides in prompts for side in sides for answer in side]
    value_NF = torch.tensor([list(row) for row in rows], dtype=torch.float64)
    value_NF = value_NF - value_NF.mean(0)
    scale_F = value_NF.std(0, correction=0)
    constant_F = value_NF.abs().amax(0) < 1e-12
    value_NF = torch.where(constant_F, 0.0, value_NF / torch.where(constant_F, 1.0, scale_F))
    value_NF = torch.cat([value_NF, value_NF**2], 1)
    differences, numbers, start = [], [], 0
    for number, (teacher, student) in enumerate(prompts):
        middle, end = start + len(teacher), start + len(teacher) + len(student)
        difference_CF = (value_NF[start:middle, None] - value_NF[None, middle:end]).flatten(0, 1)
        differences.append(difference_CF)
        numbers += [number] * len(difference_CF)
        start = end
    return torch.cat(differences), torch.tensor(numbers)
