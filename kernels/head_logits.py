"""Logits of one tile of an output head, in the accumulation dtype.

``z = soft_cap(logit_scale · hidden @ weightᵀ + bias) / temperature``, in this order (Gemma 2 caps after the
product, Cohere scales the product).

Precision. On CUDA, half-precision operands go to the tensor cores and come out in float32 (``out_dtype``), so
that logits are never rounded to half precision. The CPU has no such product: rounding its half-precision
output would cost 0.06 at logits of 8, so operands are upcast to float32, slice by slice, and multiplied in
float32. float64 operands are multiplied in float64.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` true vocabulary, ``R`` and ``C`` rows and columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Stands in for -inf biases: exp gives exactly 0, and products with finite factors stay finite (no 0 * inf).
MASKED_LOGIT = -1e30


def accumulation_dtype(operand_dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 operands, float32 for all others."""
    return torch.float64 if operand_dtype == torch.float64 else torch.float32


def operand_dtype(hidden: Tensor, weight: Tensor, like: Tensor | None = None) -> torch.dtype:
    """Dtype of a product's operands.

    On the CPU float32; elsewhere autocast's dtype, or else the one that holds hidden states and weight.
    float64 if and only if the student's hidden states are.

    Args:
        hidden: ``[N, H]``.
        weight: ``[V, H]``.
        like: The student's hidden states, where ``hidden`` is the teacher's.
    """
    if (hidden if like is None else like).dtype == torch.float64:
        return torch.float64
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if dtype == torch.float64 or hidden.device.type == "cpu":
        return torch.float32
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return dtype


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """``out = a @ b`` or ``out += a @ b``, with the sum of products in the dtype of ``out``."""
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif add:
        # Added to by the product itself: no temporary, and no pass over both.
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


@dataclass(frozen=True)
class HeadLogits:
    """An output head ready to produce tiles of logits; build it with :meth:`prepare`.

    Args:
        x: ``[N, H]`` left operand, in the operand dtype.
        weight: ``[V, H]`` in its own dtype.
        bias: ``[V]`` in the accumulation dtype, -inf replaced, or None.
        soft_cap: Cap, or None.
        scale: Factor still to be applied to the product (1 where ``x`` contains it).
        inverse_temperature: ``[N, 1]``, or None for temperature 1.
        temperature_in_x: Whether ``x`` contains the inverse temperature.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    soft_cap: float | None
    scale: float
    inverse_temperature: Tensor | None
    temperature_in_x: bool

    @classmethod
    def prepare(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        temperature: Tensor | None,
        soft_cap: float | None,
        logit_scale: float,
        vocab_size: int,
        operand_dtype: torch.dtype,
    ) -> HeadLogits:
        """Cast the hidden states and fold scale and temperature into them where no rounding is at stake."""
        dtype = accumulation_dtype(operand_dtype)
        x = hidden.to(operand_dtype)
        inverse = None if temperature is None else temperature.to(dtype).reciprocal().unsqueeze(1)
        full_precision = operand_dtype == dtype
        temperature_in_x = full_precision and soft_cap is None and inverse is not None
        if full_precision and logit_scale != 1:
            x = x * logit_scale
        if temperature_in_x and inverse is not None:
            x = x * inverse
        return cls(
            x=x,
            weight=weight[:vocab_size],
            bias=None if bias is None else bias[:vocab_size].to(dtype).clamp(min=MASKED_LOGIT),
            soft_cap=soft_cap,
            scale=1.0 if full_precision else logit_scale,
            inverse_temperature=inverse,
            temperature_in_x=temperature_in_x,
        )

    def weight_slice(self, start: int, stop: int) -> Tensor:
        """``[C, H]`` rows of the weight in the operand dtype."""
        return self.weight[start:stop].to(self.x.dtype)

    def into(self, out_RC: Tensor, weight_CH: Tensor, start: int, rows: slice) -> Tensor:
        """Write the logits of ids ``[start, start + C)`` for ``rows`` into ``out_RC`` and return it."""
        multiply(out_RC, self.x[rows], weight_CH.T)
        inverse_R1 = None if self.inverse_temperature is None else self.inverse_temperature[rows]
        if self.scale != 1:
            out_RC.mul_(self.scale)
        if self.bias is not None:
            bias_C = self.bias[start : start + out_RC.shape[1]]
            if self.temperature_in_x and inverse_R1 is not None:
                out_RC.addr_(inverse_R1.squeeze(1), bias_C)
            else:
                out_RC.add_(bias_C)
        if self.soft_cap is not None:
            out_RC.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if inverse_R1 is not None and not self.temperature_in_x:
            out_RC.mul_(inverse_R1)
        return out_RC


@torch.no_grad()
def full_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Logits of every id at temperature 1, with the products `token_stats` uses; for decoding, without
    gradient.

    Args:
        hidden: ``[N, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        soft_cap: Cap, or None.
        logit_scale: Factor on the product.

    Returns:
        ``[N, V]`` float32 (float64 where ``hidden`` is).
    """
    operand = operand_dtype(hidden, weight)
    V, H = weight.shape
    # A weight in another dtype is cast 4M elements at a time, never whole.
    step = V if weight.dtype == operand else max(128, 2**22 // H)
    with torch.autocast(hidden.device.type, enabled=False):
        head = HeadLogits.prepare(
            hidden,
            weight,
            bias,
            temperature=None,
            soft_cap=soft_cap,
            logit_scale=logit_scale,
            vocab_size=V,
            operand_dtype=operand,
        )
        out = hidden.new_empty((hidden.shape[0], V), dtype=accumulation_dtype(operand))
        for start in range(0, V, step):
            stop = min(start + step, V)
            head.into(out[:, start:stop], head.weight_slice(start, stop), start, slice(None))
    return out
