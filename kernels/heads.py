"""An output head that gives logits to ``generate`` and token statistics to losses, sharing the model's
weight.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_onpolicy.kernels import reference
from lightning_onpolicy.kernels.head_logits import full_logits
from lightning_onpolicy.kernels.spec import TokenStats
from lightning_onpolicy.kernels.token_stats import token_stats


class LogProbHead(nn.Module):
    """Replaces a causal LM's ``lm_head``; holds the very same Parameter, so tied embeddings stay tied.

    Without targets it is ``nn.Linear``: bare products in the dtype of ``hidden``, to which the Hugging Face
    model applies its own soft-cap and scale. With targets (or other statistics) it is
    :func:`~lightning_onpolicy.kernels.token_stats.token_stats`.

    Args:
        weight: ``[V, H]`` Parameter of the model's head or input embedding; shared, not copied.
        bias: ``[V]`` Parameter or None.
        soft_cap: Final logit soft-cap of the model (Gemma 2: ``final_logit_softcapping``), or None.
        logit_scale: Factor on the products (Cohere: ``logit_scale``).
        vocab_size: True vocabulary size; later rows of ``weight`` are padding and get probability 0.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        soft_cap: float | None = None,
        logit_scale: float = 1.0,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.soft_cap = soft_cap
        self.logit_scale = logit_scale
        self.vocab_size = vocab_size

    @property
    def in_features(self) -> int:
        """H, as on ``nn.Linear``."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """V, padding rows included, as on ``nn.Linear``."""
        return self.weight.shape[0]

    @overload
    def forward(self, hidden: Tensor) -> Tensor: ...

    @overload
    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, *, outputs: Sequence[str], **options: Any
    ) -> TokenStats: ...

    @overload
    def forward(self, hidden: Tensor, targets: Tensor, **options: Any) -> TokenStats: ...

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        outputs: Sequence[str] | None = None,
        **options: Any,
    ) -> Tensor | TokenStats:
        """Bare linear output without targets and outputs, token statistics with them.

        Args:
            hidden: ``[..., H]`` for the linear output, ``[N, H]`` for statistics.
            targets: ``[N]`` int64 ids, needed by ``"logp"``.
            outputs: Names of statistics; default ``("logp",)`` where targets are given.
            **options: Passed to ``token_stats``: ``temperature``, ``ids``, ``teacher``, ``topk``, ``mask``,
                ``beta``, ``alpha``, ``budget_bytes``, ``shard``.

        Returns:
            ``[..., V]`` in the dtype of ``hidden``, or :class:`TokenStats`.
        """
        if targets is None and outputs is None:
            return F.linear(hidden, self.weight, self.bias)
        return token_stats(
            hidden,
            self.weight,
            targets,
            outputs=("logp",) if outputs is None else outputs,
            bias=self.bias,
            soft_cap=self.soft_cap,
            logit_scale=self.logit_scale,
            vocab_size=self.vocab_size,
            **options,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits at temperature 1, scale and soft-cap applied, padding ids at -inf.

        Without gradients these are the very products that ``token_stats`` forms, in float32, so that sampled
        and trained log-probabilities agree. With gradients, plain float32 PyTorch over the whole weight.

        Args:
            hidden: ``[..., H]``.

        Returns:
            ``[..., V]`` float32 (float64 where ``hidden`` is).
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        inputs = [x for x in (hidden, self.weight, self.bias) if x is not None]
        with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        compute = reference.logits if with_grad else full_logits
        out = compute(flat, self.weight, self.bias, soft_cap=self.soft_cap, logit_scale=self.logit_scale)
        if self.vocab_size is not None:
            padding = torch.arange(out.shape[1], device=out.device) >= self.vocab_size
            out = out.masked_fill(padding, -torch.inf)
        return out.view(*hidden.shape[:-1], out.shape[1])


def linear_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Log-probability of each target: ``token_stats(hidden, weight, targets, **options).logp``.

    Args:
        hidden: ``[N, H]``.
        weight: ``[V, H]``.
        targets: ``[N]`` int64.
        **options: Other arguments of ``token_stats`` except ``outputs``.

    Returns:
        ``[N]`` float32 (float64 where ``hidden`` is).
    """
    return token_stats(hidden, weight, targets, outputs=("logp",), **options).logp
