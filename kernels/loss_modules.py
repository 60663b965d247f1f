"""The linear losses as modules: hyper-parameters in the constructor, tensors in the call.

The heads' weights are arguments of the call, never parameters here: a loss belongs to nobody's ``state_dict``.

Legend: ``...`` leading dimensions (tokens), ``H`` hidden size, ``V`` rows of the head.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_onpolicy.kernels.linear_loss import (
    Divergence,
    Reduction,
    linear_cross_entropy,
    linear_distillation,
)
from lightning_onpolicy.kernels.tiles import DEFAULT_BUDGET_BYTES


class LinearCrossEntropyLoss(nn.Module):
    """:func:`~lightning_onpolicy.kernels.linear_loss.linear_cross_entropy` with fixed options.

    Args:
        ignore_index: Target of tokens that are left out and never computed; None: every target counts.
        reduction: ``"mean"`` over the targets that count, ``"sum"`` or ``"none"``.
        z_loss: Weight of the squared log-sum-exp that is added per token.
        temperature: Divides the logits.
        soft_cap: Final logit soft-cap, or None.
        logit_scale: Factor on the product.
        vocab_size: True vocabulary size; later rows of the weight are padding.
        budget_bytes: Bytes of logits a call may hold.

    Example:
        >>> import torch
        >>> head, criterion = nn.Linear(8, 50), LinearCrossEntropyLoss()
        >>> hidden, targets = torch.randn(2, 5, 8), torch.randint(0, 50, (2, 5))
        >>> criterion(hidden, head.weight, targets, bias=head.bias).backward()
        >>> head.weight.grad.shape
        torch.Size([50, 8])
    """

    def __init__(
        self,
        *,
        ignore_index: int | None = -100,
        reduction: Reduction = "mean",
        z_loss: float = 0.0,
        temperature: float = 1.0,
        soft_cap: float | None = None,
        logit_scale: float = 1.0,
        vocab_size: int | None = None,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.z_loss = z_loss
        self.temperature = temperature
        self.soft_cap = soft_cap
        self.logit_scale = logit_scale
        self.vocab_size = vocab_size
        self.budget_bytes = budget_bytes

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None
    ) -> Tensor:
        """The loss.

        Args:
            hidden: ``[..., H]`` last hidden states.
            weight: ``[V, H]`` output head.
            targets: ``[...]`` int64 ids.
            bias: ``[V]`` or None.

        Returns:
            Scalar, or ``[...]`` for ``reduction="none"``.
        """
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            z_loss=self.z_loss,
            temperature=self.temperature,
            soft_cap=self.soft_cap,
            logit_scale=self.logit_scale,
            vocab_size=self.vocab_size,
            budget_bytes=self.budget_bytes,
        )


class LinearDistillationLoss(nn.Module):
    """:func:`~lightning_onpolicy.kernels.linear_loss.linear_distillation` with fixed options.

    Args:
        divergence: ``"reverse_kl"``, ``"forward_kl"``, ``"jsd"``, ``"skew_forward_kl"``, ``"skew_reverse_kl"``
            or ``"total_variation"``.
        reduction: ``"mean"`` over the tokens that count, ``"sum"`` or ``"none"``.
        temperature: Divides both logits.
        beta: Teacher share of the JSD mixture, in (0, 1).
        alpha: Share of the first argument in the skew KLs' mixture, in (0, 1).
        soft_cap: Student's final logit soft-cap, or None.
        teacher_soft_cap: Teacher's, or None.
        logit_scale: Factor on the student's product.
        teacher_logit_scale: Factor on the teacher's.
        vocab_size: True size of the shared vocabulary; later rows of either head are padding.
        budget_bytes: Bytes of logits a call may hold.

    Example:
        >>> import torch
        >>> student, teacher = nn.Linear(8, 50), nn.Linear(16, 64)  # the teacher's head is padded
        >>> criterion = LinearDistillationLoss("forward_kl", vocab_size=50)
        >>> hidden, teacher_hidden = torch.randn(2, 5, 8), torch.randn(2, 5, 16)
        >>> loss = criterion(hidden, student.weight, teacher_hidden, teacher.weight)
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        divergence: Divergence = "reverse_kl",
        *,
        reduction: Reduction = "mean",
        temperature: float = 1.0,
        beta: float = 0.5,
        alpha: float = 0.1,
        soft_cap: float | None = None,
        teacher_soft_cap: float | None = None,
        logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        vocab_size: int | None = None,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
    ) -> None:
        super().__init__()
        self.divergence: Divergence = divergence
        self.reduction: Reduction = reduction
        self.temperature = temperature
        self.beta = beta
        self.alpha = alpha
        self.soft_cap = soft_cap
        self.teacher_soft_cap = teacher_soft_cap
        self.logit_scale = logit_scale
        self.teacher_logit_scale = teacher_logit_scale
        self.vocab_size = vocab_size
        self.budget_bytes = budget_bytes

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        *,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            hidden: ``[..., H]`` student's last hidden states.
            weight: ``[V, H]`` student's output head.
            teacher_hidden: ``[..., Ht]`` teacher's last hidden states of the same tokens.
            teacher_weight: ``[V2, Ht]`` teacher's output head.
            bias: ``[V]`` or None.
            teacher_bias: ``[V2]`` or None.
            mask: ``[...]`` bool, tokens that count, or None for all.

        Returns:
            Scalar, or ``[...]`` for ``reduction="none"``.
        """
        return linear_distillation(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            divergence=self.divergence,
            mask=mask,
            reduction=self.reduction,
            bias=bias,
            teacher_bias=teacher_bias,
            temperature=self.temperature,
            soft_cap=self.soft_cap,
            teacher_soft_cap=self.teacher_soft_cap,
            logit_scale=self.logit_scale,
            teacher_logit_scale=self.teacher_logit_scale,
            vocab_size=self.vocab_size,
            beta=self.beta,
            alpha=self.alpha,
            budget_bytes=self.budget_bytes,
        )
