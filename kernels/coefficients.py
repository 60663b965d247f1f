"""From upstream gradients to a handful of scalars per row.

With ``l = log p`` and ``k = log q``, the logit gradient of every affine statistic collapses to

    dz = p (a + b l + c k) + d q + scatter(sparse)

and each curved divergence j adds ``g_j p (f_j - E_p f_j)``, whose constant part also goes into a. Per unit
upstream:

    log p_y     δ_y - p                 lse       p
    entropy     -p (l + entropy)        KL(p||q)  p ((l - k) - KL)      KL(q||p)  p - q

Legend: ``N`` rows, ``K`` ids per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_onpolicy.kernels.divergences import CURVED


@dataclass(frozen=True)
class Coefficients:
    """Per-row scalars of the logit gradient.

    Args:
        names: Names of the rows of ``table``: ``"a"``, then those of ``"b"``, ``"c"``, ``"d"`` and the curved
            divergences that have an upstream gradient.
        table: ``[len(names), N]``.
        sparse: ``[N, K]`` gradients at the indexed ids, or None.
    """

    names: tuple[str, ...]
    table: Tensor
    sparse: Tensor | None


def coefficients(
    grads: Mapping[str, Tensor | None], state: Mapping[str, Tensor], factor: Tensor | float
) -> Coefficients:
    """Collapse upstream gradients.

    Args:
        grads: Upstream gradient per output, ``[N]`` (``index_logp``: ``[N, K]``); None where unused.
        state: ``[N]`` statistics saved by the forward pass: values of ``entropy`` and ``reverse_kl``, and
            ``E_p f`` under the name of each curved divergence; at least ``lse``.
        factor: ``dz/d(product)``, the logit scale over the temperature: scalar or ``[N]``.
    """
    like = state["lse"]
    rows: dict[str, Tensor] = {"a": torch.zeros_like(like)}

    def add(name: str, value: Tensor) -> None:
        rows[name] = rows[name] + value if name in rows else value

    given = {name: grad.to(like.dtype) for name, grad in grads.items() if grad is not None}
    if "index_logp" in given:
        add("a", -given["index_logp"].sum(1))
    if "lse" in given:
        add("a", given["lse"])
    if "entropy" in given:
        add("a", -given["entropy"] * state["entropy"])
        add("b", -given["entropy"])
    if "reverse_kl" in given:
        add("a", -given["reverse_kl"] * state["reverse_kl"])
        add("b", given["reverse_kl"])
        add("c", -given["reverse_kl"])
    if "forward_kl" in given:
        add("a", given["forward_kl"])
        add("d", -given["forward_kl"])
    for name in CURVED:
        if name in given:
            add("a", -given[name] * state[name])
            add(name, given[name])
    sparse = given.get("index_logp")
    if sparse is not None:
        sparse = sparse * (factor.unsqueeze(1) if isinstance(factor, Tensor) else factor)
    return Coefficients(tuple(rows), torch.stack(list(rows.values())) * factor, sparse)


def logit_gradient(
    l_RC: Tensor,
    k_RC: Tensor | None,
    p_RC: Tensor,
    rows: Mapping[str, Tensor],
    curves: Mapping[str, Tensor],
    out: Tensor,
) -> Tensor:
    """``dz`` without its sparse part.

    Args:
        l_RC: Student log-probabilities; overwritten.
        k_RC: Teacher log-probabilities, needed by ``c`` and ``d``; overwritten.
        p_RC: ``exp(l_RC)``.
        rows: ``[R, 1]`` scalars by name.
        curves: ``f`` per curved divergence, ``[R, C]``.
        out: ``[R, C]``, none of the above.

    Returns:
        ``out``.
    """
    if rows.keys() == {"a"}:
        return torch.mul(p_RC, rows["a"], out=out)
    inner = l_RC.mul_(rows["b"]).add_(rows["a"]) if "b" in rows else l_RC.copy_(rows["a"].expand_as(l_RC))
    if "c" in rows and k_RC is not None:
        inner.addcmul_(k_RC, rows["c"])
    for name, f_RC in curves.items():
        inner.addcmul_(f_RC, rows[name])
    torch.mul(inner, p_RC, out=out)
    if "d" in rows and k_RC is not None:
        out.addcmul_(k_RC.exp_(), rows["d"])
    return out
