"""What the discriminator of generative adversarial distillation (GAD) minimises.

Source: 2511.10643 v3. A discriminator D gives a whole answer one number s = D(x, y); q is the teacher, p the student.

| name | minimised, per pair of a student's and a teacher's answer | D at the optimum |
|---|---|---|
| bradley_terry | softplus(−Δ), Δ = s_q − s_p | log q(y|x) − log p(y|x) + c(x), c(x) free |
| cross_entropy | softplus(−s_q) + softplus(s_p) | log q − log p, c(x) = 0; the paper's weaker ablation |
| score_penalty | (s_q² + s_p²) / 2 | – (2604.28123 adds it with 1e-3: it pins c(x)) |
| gradient_penalty | ½ ‖∂s/∂e‖², e input embeddings | – (R1, 1801.04406) |

The student's reward is sg(s_p) (``score_rewards.py``). The group mean of an advantage takes c(x) out, so with D at its
optimum the unnormalised policy gradient is that of −KL(p‖q): on-policy reverse KL with an estimated density ratio.

Legend: ``B`` student rows, ``R`` teacher rows, ``C`` pairs of one of each with the same prompt, ``A`` student rows
that have a pair, ``T`` positions, ``H`` hidden units; Δ = s_q − s_p, sg = stop-gradient. Groups may be of any size
and order, and a prompt may have several teacher answers. Losses are computed in at least float32: scores whose
differences bfloat16 rounds away are ties that no loss can undo.

Departures: every student row counts once, whatever the number of teacher answers (the paper has one) and of rows in its
group; where groups are equal that is the paper's mean over prompts and group. A loss is divided by the *global* number
of such rows, so shares of micro-batches and ranks add up. Answers of which one was cut for length can be kept out of
the pairs. A teacher's answer is scored once; its gradient is the sum over its pairs.

Example:
    >>> pairs = pair_rows(group_B=torch.tensor([4, 4, 9]), teacher_group_R=torch.tensor([9, 4]))
    >>> student, teacher = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([2.0, 1.0])
    >>> loss, metrics = bradley_terry(student, teacher, pairs, count=len(pairs))
    >>> metrics["score_gap"]
    tensor([1., 0., 0.])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

Loss = tuple[Tensor, dict[str, Tensor]]
DiscriminatorKind = Literal["bradley_terry", "cross_entropy"]


@dataclass(frozen=True)
class DiscriminatorSpec:
    """What the discriminator minimises.

    Args:
        kind: ``bradley_terry`` (the teacher's answer beats the student's) or ``cross_entropy`` (each is told apart by
            itself).
        smoothing: Probability with which a label is taken to be the wrong one; bounds the scores at their optimum.
        score_penalty: Coefficient of the mean squared score; keeps the scores of different prompts near 0.

    Raises:
        ValueError: If a value is out of range.
    """

    kind: DiscriminatorKind = "bradley_terry"
    smoothing: float = 0.0
    score_penalty: float = 0.0

    def __post_init__(self) -> None:
        kinds = get_args(DiscriminatorKind)
        _require(self.kind in kinds, "kind", self.kind, f"one of {', '.join(kinds)}")
        _require(0 <= self.smoothing < 0.5, "smoothing", self.smoothing, "in [0, 0.5)")
        _require(self.score_penalty >= 0, "score_penalty", self.score_penalty, ">= 0")


def _require(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"discriminator.{key} must be {rule}, got {value!r}.")


@dataclass(frozen=True)
class Pairs:
    """Which rows are compared. Its length is the number of student rows that have a pair: what losses are divided by,
    once it is summed over the micro-batches and ranks of the step.

    Args:
        student_C: int64 student row of each pair.
        teacher_C: int64 teacher row.
        weight_C: float64; the weights of one student row add up to 1.
        row_A: int64 student rows that have a pair, ascending.
        slot_C: int64 position in ``row_A`` of each pair's student row.
    """

    student_C: Tensor
    teacher_C: Tensor
    weight_C: Tensor
    row_A: Tensor
    slot_C: Tensor

    def __len__(self) -> int:
        return len(self.row_A)

    def per_row(self, value_C: Tensor) -> Tensor:
        """``[A]`` the mean of each student row's pairs."""
        weighted_C = value_C * self.weight_C.to(value_C.dtype)
        return weighted_C.new_zeros(len(self)).index_add(0, self.slot_C, weighted_C)


def pair_rows(
    group_B: Tensor, teacher_group_R: Tensor, keep_B: Tensor | None = None, keep_R: Tensor | None = None
) -> Pairs:
    """Every student row with every teacher row of its prompt.

    A micro-batch has its own pairs; all teacher rows of a prompt must be in it with any of the prompt's student rows.

    Args:
        group_B: ``[B]`` number of the student row's prompt.
        teacher_group_R: ``[R]`` number of the teacher row's.
        keep_B: ``[B]`` bool; False keeps a row out (not scored, cut for length); None keeps all.
        keep_R: ``[R]`` bool, likewise.

    Raises:
        ValueError: If shapes do not agree.
    """
    for name, keep, group in (("keep_B", keep_B, group_B), ("keep_R", keep_R, teacher_group_R)):
        if group.ndim != 1 or (keep is not None and keep.shape != group.shape):
            shape = None if keep is None else tuple(keep.shape)
            raise ValueError(
                f"{name} and its groups must be vectors alike: {shape} and {tuple(group.shape)}."
            )
    match_BR = group_B[:, None] == teacher_group_R[None, :]
    if keep_B is not None:
        match_BR = match_BR & keep_B[:, None]
    if keep_R is not None:
        match_BR = match_BR & keep_R[None, :]
    student_C, teacher_C = match_BR.nonzero(as_tuple=True)
    row_A, slot_C, pairs_A = torch.unique(student_C, return_inverse=True, return_counts=True)
    return Pairs(student_C, teacher_C, 1.0 / pairs_A.double()[slot_C], row_A, slot_C)


def bradley_terry(
    score_B: Tensor, teacher_R: Tensor, pairs: Pairs, count: float, *, smoothing: float = 0.0
) -> Loss:
    """−log σ(s_q − s_p): only differences within a prompt count.

    Args:
        score_B: ``[B]`` scores of the student's answers, with gradient; ignored on rows without a pair, NaN included.
        teacher_R: ``[R]`` scores of the teacher's, with gradient; ignored likewise.
        pairs: What is compared.
        count: Student rows with a pair, over all micro-batches and ranks of the step.
        smoothing: ε: (1−ε)·softplus(−Δ) + ε·softplus(Δ), whose optimum is Δ = log((1−ε)/ε) where an answer is told
            apart with certainty, in place of infinity.

    Returns:
        This micro-batch's share of the loss: without a pair 0, still a function of the scores. Metrics ``[A]``, one
        value per student row with a pair: ``accuracy`` (Δ > 0; a tie is half), ``score_gap`` (Δ), ``score_student``,
        ``score_teacher``. They are of the D that made the scores: *fresh* accuracy needs new rollouts and the D before
        its update on them.
    """
    student_C, teacher_C = _scores(score_B, teacher_R, pairs)
    delta_C = teacher_C - student_C
    loss_C = _smooth(softplus(-delta_C), softplus(delta_C), smoothing)
    return _share(loss_C, pairs, count), _metrics(student_C, teacher_C, pairs)


def cross_entropy(
    score_B: Tensor, teacher_R: Tensor, pairs: Pairs, count: float, *, smoothing: float = 0.0
) -> Loss:
    """−log σ(s_q) − log(1 − σ(s_p)): teacher against student, each answer by itself.

    Arguments and metrics as in :func:`bradley_terry`; ``smoothing`` is that of both labels.
    """
    student_C, teacher_C = _scores(score_B, teacher_R, pairs)
    right_C = softplus(-teacher_C) + softplus(student_C)
    wrong_C = softplus(teacher_C) + softplus(-student_C)
    return _share(_smooth(right_C, wrong_C, smoothing), pairs, count), _metrics(student_C, teacher_C, pairs)


def score_penalty(score_B: Tensor, teacher_R: Tensor, pairs: Pairs, count: float) -> Loss:
    """Mean squared score, half from each side (arguments as in :func:`bradley_terry`); metric ``score_penalty``."""
    student_C, teacher_C = _scores(score_B, teacher_R, pairs)
    square_C = 0.5 * (student_C**2 + teacher_C**2)
    return _share(square_C, pairs, count), {"score_penalty": pairs.per_row(square_C.detach())}


def discriminator_loss(
    spec: DiscriminatorSpec, score_B: Tensor, teacher_R: Tensor, pairs: Pairs, count: float
) -> Loss:
    """The loss that ``spec`` names (arguments and metrics as in :func:`bradley_terry` and :func:`score_penalty`)."""
    kind = bradley_terry if spec.kind == "bradley_terry" else cross_entropy
    loss, metrics = kind(score_B, teacher_R, pairs, count, smoothing=spec.smoothing)
    if spec.score_penalty:
        penalty, more = score_penalty(score_B, teacher_R, pairs, count)
        loss, metrics = loss + spec.score_penalty * penalty, metrics | more
    return loss, metrics


def gradient_penalty(score_B: Tensor, embedding_BTH: Tensor, count: float) -> Loss:
    """R1: half the squared norm of each score's gradient with respect to its row's input embeddings.

    The loss is differentiated a second time, which fused attention kernels cannot do: run the forward under
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` or with eager attention.

    Args:
        score_B: ``[B]`` scores; row b must depend on row b of the embeddings alone. R1 takes the teacher's.
        embedding_BTH: ``[B, T, H]`` the embeddings that they were computed from, with gradient.
        count: Scores that are penalised, over all micro-batches and ranks of the step.

    Returns:
        This micro-batch's share; metric ``gradient_norm`` ``[B]``.

    Raises:
        ValueError: If the embeddings have no gradient.
    """
    if not embedding_BTH.requires_grad:
        raise ValueError(
            "gradient_penalty needs embeddings with requires_grad: take them from the embedding layer, call "
            "requires_grad_() where it is frozen, and give them to the model as inputs_embeds."
        )
    (gradient_BTH,) = torch.autograd.grad(score_B.sum(), embedding_BTH, create_graph=True)
    square_B = (wide(gradient_BTH) ** 2).flatten(1).sum(1)
    return 0.5 * square_B.sum() / max(count, 1.0), {"gradient_norm": square_B.detach().sqrt()}


def wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(score_B: Tensor, teacher_R: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Both ``[C]`` scores of each pair. An empty selection still belongs to the graph, so that a rank without a pair
    takes part in the backward's collectives."""
    return wide(score_B)[pairs.student_C], wide(teacher_R)[pairs.teacher_C]


def _smooth(right_C: Tensor, wrong_C: Tensor, smoothing: float) -> Tensor:
    return right_C if smoothing == 0 else (1 - smoothing) * right_C + smoothing * wrong_C


def _share(loss_C: Tensor, pairs: Pairs, count: float) -> Tensor:
    return (loss_C * pairs.weight_C.to(loss_C.dtype)).sum() / max(count, 1.0)


def _metrics(student_C: Tensor, teacher_C: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    delta_C = (teacher_C - student_C).detach()
    values = {
        "accuracy": 0.5 * (1 + delta_C.sign()),
        "score_gap": delta_C,
        "score_student": student_C.detach(),
        "score_teacher": teacher_C.detach(),
    }
    return {name: pairs.per_row(value_C) for name, value_C in values.items()}
