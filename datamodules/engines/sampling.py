"""Drawing tokens: the filtered distribution, counter-based uniforms and the draw itself. Pure functions.

Legend: ``B`` rows, ``V`` vocabulary, ``K`` blocks of the vocabulary, ``W`` tokens per block.

One uniform number decides one token, by inverting the cumulative distribution. It is a hash of (seed, prompt,
sample, position) instead of the next state of a generator: a row then draws the same tokens whichever rows
share its batch, and no random state exists that could be shared, saved or disturbed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import Sampling

BLOCK = 256  # W: the cumulative sum runs over V / W block sums, then inside one block
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def uniforms(seed: int, *counters_B: Tensor) -> Tensor:
    """Uniform numbers that depend on the seed and on each row's counters, and on nothing else.

    Each counter is absorbed by one round of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
    number generators", 2014), so that the last counter steps through an ordinary splitmix64 stream.

    Args:
        seed: Any integer; used modulo 2^64.
        *counters_B: ``[B]`` int64 tensors, e.g. prompt, sample and position.

    Returns:
        ``[B]`` float64 in the open interval (0, 1), 52 random bits each.
    """
    state_B = torch.full_like(counters_B[0], _signed(seed))
    for counter_B in (torch.zeros_like(state_B), *counters_B):
        state_B = _splitmix64(state_B + (counter_B + 1) * _signed(_GAMMA))
    return (_shift_right(state_B, 12).double() + 0.5) * 2.0**-52


def _splitmix64(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 (torch shifts arithmetically, copying the sign)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as ``value`` modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def distribution(logits_BV: Tensor, sampling: Sampling, stop_ids: Tensor, generated_B: Tensor) -> Tensor:
    """Unnormalised log-probabilities of the distribution that is sampled from.

    Order: end-of-sequence ids before ``min_new_tokens``, temperature, top-k, top-p (of what top-k left),
        min-p.
    Each filter is a threshold per row, and tokens that tie with it stay, so the result does not depend on the
    order of equal logits.

    Args:
        logits_BV: ``[B, V]`` logits.
        sampling: Temperature and filters; temperature 0 is treated as 1.
        stop_ids: Ids that end a response, int64.
        generated_B: ``[B]`` int64, tokens each row has sampled so far.

    Returns:
        ``[B, V]`` float32, -inf where removed.
    """
    x_BV = logits_BV.float()
    if sampling.min_new_tokens and len(stop_ids):
        stop_V = torch.zeros(x_BV.shape[1], dtype=torch.bool, device=x_BV.device)
        stop_V[stop_ids] = True
        early_B = generated_B < sampling.min_new_tokens
        x_BV = x_BV.masked_fill(early_B[:, None] & stop_V, -math.inf)
    if sampling.temperature not in (0.0, 1.0):
        x_BV = x_BV / sampling.temperature
    if 0 < sampling.top_k < x_BV.shape[1]:
        x_BV = _drop_below(x_BV, x_BV.topk(sampling.top_k).values[:, -1:])
    if sampling.top_p < 1:
        x_BV = _drop_below(x_BV, _nucleus_edge(x_BV, sampling.top_p))
    if sampling.min_p > 0:
        x_BV = _drop_below(x_BV, x_BV.amax(1, keepdim=True) + math.log(sampling.min_p))
    return x_BV


def _drop_below(x_BV: Tensor, edge_B1: Tensor) -> Tensor:
    return x_BV.masked_fill(x_BV < edge_B1, -math.inf)


def _nucleus_edge(x_BV: Tensor, top_p: float) -> Tensor:
    """``[B, 1]``: the smallest logit of the smallest set of most probable tokens with mass ``top_p`` or more.

    Sorts no more of the vocabulary than is needed to reach the mass.
    """
    V = x_BV.shape[1]
    logz_B1 = x_BV.logsumexp(1, keepdim=True)
    width = min(V, 256)
    while True:
        top_BW = x_BV.topk(width).values
        mass_BW = (top_BW - logz_B1).double().exp().cumsum(1)
        if width == V or bool((mass_BW[:, -1] >= top_p).all()):
            break
        width = min(V, 8 * width)
    edge_B1 = (mass_BW < top_p).sum(1, keepdim=True).clamp(max=width - 1)
    return top_BW.gather(1, edge_B1)


def draw(x_BV: Tensor, uniform_B: Tensor, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """One token per row, with its log-probability.

    The inverse of the cumulative distribution in two levels, block sums and then one block, because a full
    cumulative sum costs more than all the rest.

    Args:
        x_BV: ``[B, V]`` float32 unnormalised log-probabilities, -inf where impossible.
        uniform_B: ``[B]`` float64 in (0, 1).
        greedy: Take the most probable token instead of drawing.

    Returns:
        ``[B]`` int64 tokens, never one of probability 0, and ``[B]`` float32 log-probabilities: not finite on
        rows whose logits hold a NaN, +inf or no finite value.
    """
    B, V = x_BV.shape
    K = -(-V // BLOCK)
    peak_B1 = x_BV.amax(1, keepdim=True)
    mass_BU = x_BV.new_zeros(B, K * BLOCK)  # U = V rounded up to whole blocks
    torch.sub(x_BV, peak_B1, out=mass_BU[:, :V]).exp_()
    mass_BKW = mass_BU.view(B, K, BLOCK)
    upto_BK = mass_BKW.sum(2).double().cumsum(1)
    total_B1 = upto_BK[:, -1:]
    if greedy:
        token_B1 = x_BV.argmax(1, keepdim=True)
    else:
        target_B1 = uniform_B[:, None] * total_B1
        block_B1 = _first_above(upto_BK, target_B1)
        before_B1 = torch.where(block_B1 > 0, upto_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
        block_BW = mass_BKW.gather(1, block_B1[:, :, None].expand(B, 1, BLOCK))[:, 0].double()
        inside_B1 = (target_B1 - before_B1).clamp(min=0)
        token_B1 = block_B1 * BLOCK + _first_above(block_BW.cumsum(1), inside_B1)
        token_B1 = token_B1.clamp(max=V - 1)  # only a row of NaN gets past the vocabulary
    logp_B1 = (x_BV.gather(1, token_B1) - peak_B1).double() - total_B1.log()
    return token_B1[:, 0], logp_B1[:, 0].float()


def _first_above(upto_BK: Tensor, target_B1: Tensor) -> Tensor:
    """``[B, 1]``: first index whose cumulative sum exceeds the target, at most the last one that adds mass.

    The bound matters where rounding lifts the target to the total; both ends therefore have positive mass.
    """
    first_B1 = torch.searchsorted(upto_BK, target_B1, right=True)
    last_B1 = torch.searchsorted(upto_BK, upto_BK[:, -1:].contiguous())
    return torch.minimum(first_B1, last_B1).clamp(max=upto_BK.shape[1] - 1)
