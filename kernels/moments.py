"""Softmax moments of rows of logits that are seen a slice at a time, and their merge.

Every affine statistic follows from sums over the vocabulary that merge across slices, whether the slices are
visited in turn or live on different ranks. With shifts ``m = max z`` and ``m' = max t``:

    S  = Σ e^{z-m}          A  = Σ e^{z-m} (z-m)        D  = Σ e^{z-m} ((z-m) - (t-m'))
    S' = Σ e^{t-m'}                                     D' = Σ e^{t-m'} ((t-m') - (z-m))

    lse = m + log S         entropy = log S - A/S
    KL(p||q) = D/S - log S + log S'                     KL(q||p) = D'/S' - log S' + log S

Sums are centred on the shifts before anything is multiplied, so rows far from zero lose nothing.

Legend: ``R`` rows, ``C`` columns of a tile; ``z`` student and ``t`` teacher logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Moments of R rows over the part of the vocabulary seen so far; None where not asked for.

    Args:
        m: ``[R]`` largest student logit.
        s: ``[R]`` ``Σ e^{z-m}``.
        a: ``[R]`` ``Σ e^{z-m} (z-m)``.
        teacher_m: ``[R]`` largest teacher logit.
        teacher_s: ``[R]`` ``Σ e^{t-m'}``.
        d: ``[R]`` student-weighted difference.
        teacher_d: ``[R]`` teacher-weighted difference.
        argmax: ``[R]`` int64, vocabulary id of ``m``.
    """

    m: Tensor
    s: Tensor
    a: Tensor | None = None
    teacher_m: Tensor | None = None
    teacher_s: Tensor | None = None
    d: Tensor | None = None
    teacher_d: Tensor | None = None
    argmax: Tensor | None = None

    def lse(self) -> Tensor:
        """``[R]`` log-sum-exp of the student logits. For log-probabilities subtract its summands one after the other:
        their sum is rounded where logits are far from zero."""
        return self.m + self.s.log()

    def entropy(self) -> Tensor:
        """``[R]`` entropy of p."""
        assert self.a is not None
        return self.s.log() - self.a / self.s

    def reverse_kl(self) -> Tensor:
        """``[R]`` KL(p || q)."""
        assert self.d is not None
        assert self.teacher_s is not None
        return self.d / self.s - self.s.log() + self.teacher_s.log()

    def forward_kl(self) -> Tensor:
        """``[R]`` KL(q || p)."""
        assert self.teacher_d is not None
        assert self.teacher_s is not None
        return self.teacher_d / self.teacher_s - self.teacher_s.log() + self.s.log()


def tile_moments(
    z_RC: Tensor,
    t_RC: Tensor | None,
    buffers: Sequence[Tensor],
    *,
    start: int,
    entropy: bool,
    reverse_kl: bool,
    forward_kl: bool,
    argmax: bool,
) -> Moments:
    """Moments of some rows of a tile.

    Args:
        z_RC: Student logits; read only, unless it is ``buffers[0]``.
        t_RC: Teacher logits or None; read only, unless it is ``buffers[2]``.
        buffers: ``[R, C]`` workspace: two, with a teacher four; overwritten.
        start: Vocabulary id of the first column.
        entropy: Whether to sum A.
        reverse_kl: Whether to sum D.
        forward_kl: Whether to sum D'.
        argmax: Whether to find the id of the largest logit.
    """
    centred, weight, *more = buffers
    m = z_RC.amax(1)
    best = z_RC.argmax(1) + start if argmax else None
    torch.sub(z_RC, m.unsqueeze(1), out=centred)
    torch.exp(centred, out=weight)
    s = weight.sum(1)
    if t_RC is None:
        return Moments(m, s, a=weight.mul_(centred).sum(1) if entropy else None, argmax=best)
    teacher_centred, spare = more
    a = torch.mul(weight, centred, out=spare).sum(1) if entropy else None
    teacher_m = t_RC.amax(1)
    torch.sub(t_RC, teacher_m.unsqueeze(1), out=teacher_centred)
    teacher_weight = torch.exp(teacher_centred, out=spare)
    teacher_s = teacher_weight.sum(1)
    difference = centred.sub_(teacher_centred)
    d = weight.mul_(difference).sum(1) if reverse_kl else None
    teacher_d = teacher_weight.mul_(difference).sum(1).neg_() if forward_kl else None
    return Moments(m, s, a, teacher_m, teacher_s, d, teacher_d, best)


def merge(x: Moments, y: Moments) -> Moments:
    """Moments of the union of two disjoint parts of the vocabulary; ``x`` holds the smaller ids."""
    m = torch.maximum(x.m, y.m)
    fx, fy = x.m - m, y.m - m
    ex, ey = fx.exp(), fy.exp()
    s = ex * x.s + ey * y.s
    a = d = teacher_m = teacher_s = teacher_d = argmax = None
    if x.a is not None and y.a is not None:
        a = ex * (x.a + fx * x.s) + ey * (y.a + fy * y.s)
    if x.argmax is not None and y.argmax is not None:
        argmax = torch.where(y.m > x.m, y.argmax, x.argmax)
    if x.teacher_m is not None and y.teacher_m is not None:
        assert x.teacher_s is not None
        assert y.teacher_s is not None
        teacher_m = torch.maximum(x.teacher_m, y.teacher_m)
        gx, gy = x.teacher_m - teacher_m, y.teacher_m - teacher_m
        tx, ty = gx.exp(), gy.exp()
        teacher_s = tx * x.teacher_s + ty * y.teacher_s
        if x.d is not None and y.d is not None:
            d = ex * (x.d + (fx - gx) * x.s) + ey * (y.d + (fy - gy) * y.s)
        if x.teacher_d is not None and y.teacher_d is not None:
            teacher_d = tx * (x.teacher_d + (gx - fx) * x.teacher_s) + ty * (
                y.teacher_d + (gy - fy) * y.teacher_s
            )
    return Moments(m, s, a, teacher_m, teacher_s, d, teacher_d, argmax)


def concatenate(parts: Sequence[Moments]) -> Moments:
    """Moments of the rows of all parts, one after another."""

    def joined(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    if len(parts) == 1:
        return parts[0]
    m, s = (torch.cat([getattr(part, name) for part in parts]) for name in ("m", "s"))
    rest = ("a", "teacher_m", "teacher_s", "d", "teacher_d", "argmax")
    return Moments(m, s, **{name: joined(name) for name in rest})
