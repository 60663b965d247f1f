"""What a meta reward model minimises: is this judgement right? Binary cross-entropy on logits.

Source: SPCT, 2504.02495 (a scalar head, labels from its eq. 10).

    loss = 1/N Σ_b  w·softplus(−s_b) if right, softplus(s_b) if wrong

Legend: ``B`` judgements; s scores, N judgements of the optimizer step over all micro-batches and ranks, w weight of the
right ones. softplus is −log σ(−s), computed without overflow; in at least float32.

At the optimum s = log w + log P(right)/P(wrong): w moves the threshold and leaves every order as it is.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_onpolicy.modules.losses.adversarial import Loss, wide


def rightness_loss(
    score_B: Tensor,
    right_B: Tensor,
    count: float,
    *,
    positive_weight: float = 1.0,
    keep_B: Tensor | None = None,
) -> Loss:
    """This micro-batch's share of the loss.

    Args:
        score_B: ``[B]`` logits, with gradient.
        right_B: ``[B]`` bool.
        count: Judgements of the step, over all micro-batches and ranks.
        positive_weight: w.
        keep_B: ``[B]`` bool; False keeps a row out; None keeps all.

    Returns:
        The share; metrics ``accuracy`` (of s > 0), ``accuracy_right`` and ``accuracy_wrong`` (their mean is the
        balanced accuracy), ``right`` (share of right ones), ``score_right``, ``score_wrong``.

    Example:
        >>> import torch
        >>> loss, _ = rightness_loss(torch.tensor([100.0, -100.0]), torch.tensor([False, True]), count=2)
        >>> float(loss)
        100.0
    """
    kept_B = right_B.new_ones(right_B.shape) if keep_B is None else keep_B
    score, right = wide(score_B)[kept_B], right_B[kept_B].bool()
    loss = -positive_weight * logsigmoid(score[right]).sum() - logsigmoid(-score[~right]).sum()
    score = score.detach()
    hit = ((score > 0) == right).to(score)
    metrics = {
        "accuracy": hit,
        "accuracy_right": hit[right],
        "accuracy_wrong": hit[~right],
        "right": right.to(score),
        "score_right": score[right],
        "score_wrong": score[~right],
    }
    return loss / max(count, 1.0), metrics
