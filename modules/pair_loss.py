"""One micro-batch of comparisons: scores from a :class:`ScalarModel`, the loss from ``losses/adversarial.py``.

Shared by GAD's discriminator and by reward models trained on preference pairs. Groups are whole.

Legend: ``B`` student (losing) rows, ``R`` teacher (preferred) rows, ``T`` positions, ``H`` hidden units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.judged import PREFERRED
from lightning_onpolicy.modules.losses.adversarial import (
    DiscriminatorSpec,
    discriminator_loss,
    gradient_penalty,
    pair_rows,
)
from lightning_onpolicy.modules.outcome import Counts, LossOutput
from lightning_onpolicy.modules.scalar import ScalarModel


def pair_loss(
    model: ScalarModel, micro: RolloutBatch, counts: Counts, spec: DiscriminatorSpec, r1: float = 0.0
) -> LossOutput:
    """The micro-batch's share of the discriminator's loss.

    Args:
        model: What scores.
        micro: Rows as :mod:`lightning_onpolicy.datamodules.judged` makes them, groups whole.
        counts: Of the optimizer step; ``compared`` divides the loss.
        spec: What is minimised.
        r1: Coefficient of the gradient penalty on the preferred rows' input embeddings.
    """
    preferred = micro.extra[PREFERRED]
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(_embeddings(model)) if r1 else []
        score = model.scores(micro.input_ids, micro.attention_mask)
        pairs = pair_rows(micro.group[~preferred], micro.group[preferred])
        loss, means = discriminator_loss(spec, score[~preferred], score[preferred], pairs, counts.compared)
        if r1:
            # As many penalties as comparisons weigh: a teacher's row counts as often as it is compared.
            weight_R = torch.zeros(int(preferred.sum()), dtype=score.dtype, device=score.device)
            weight_R = weight_R.index_add(0, pairs.teacher_C, pairs.weight_C.to(score.dtype))
            penalty, more = gradient_penalty(weight_R.sqrt() * score[preferred], seen[0], counts.compared)
            norm_R = (
                more["gradient_norm"][preferred] / weight_R.sqrt()
            )  # the other rows have none by construction
            loss, means = loss + r1 * penalty, {**means, "gradient_norm": norm_R[weight_R > 0]}
    return LossOutput(loss, means, within=unfused if r1 else contextlib.nullcontext)


def unfused() -> contextlib.AbstractContextManager[None]:
    """Attention without fused kernels, which cannot be differentiated twice; for the backward pass too, in which
    gradient checkpointing runs the forward pass again."""
    return sdpa_kernel(SDPBackend.MATH)


@contextlib.contextmanager
def _embeddings(model: ScalarModel) -> Iterator[list[Tensor]]:
    """The body's input embeddings in the forward passes inside, which are :func:`unfused`."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, out: Tensor) -> Tensor:
        seen.append(out if out.requires_grad else out.requires_grad_())
        return seen[-1]

    handle = model.body.get_input_embeddings().register_forward_hook(keep)
    try:
        with unfused():
            yield seen
    finally:
        handle.remove()
