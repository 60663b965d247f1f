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
            ``E_p f`` under the name of each curved divergence; at least ``m``.
        factor: ``dz/d(product)``, the logit scale over the temperature: scalar or ``[N]``.
    """
    like = state["m"]
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


def centred(table: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Coefficients for centred logits ``u = z - m``, ``w = t - m'`` in place of log-probabilities: one pass less, and
    nothing lost where logits are far from zero.

        p (a + b l + c k + Σ g f) + d q = e^u (a' + b' u + c' w + Σ g' f) + d' e^w

    Args:
        table: ``[N]`` coefficients by name.
        state: ``[N]`` :data:`~lightning_onpolicy.kernels.epilogues.SHIFTS` by name.
    """
    student = state["log_s"]
    out = {
        name: x * (-(state["teacher_log_s"] if name == "d" else student)).exp() for name, x in table.items()
    }
    for name, shift in (("b", "log_s"), ("c", "teacher_log_s")):
        if name in out:
            out["a"] = out["a"] - out[name] * state[shift]
    return out


def logit_gradient(
    u_RC: Tensor,
    w_RC: Tensor | None,
    exp_RC: Tensor,
    rows: Mapping[str, Tensor],
    curves: Mapping[str, Tensor],
    out: Tensor,
) -> Tensor:
    """``dz`` without its sparse part.

    Args:
        u_RC: Centred student logits; overwritten.
        w_RC: Centred teacher logits, needed by ``c`` and ``d``; overwritten.
        exp_RC: ``exp(u_RC)``.
        rows: ``[R, 1]`` scalars by name, as :func:`centred` gives them.
        curves: ``f`` per curved divergence, ``[R, C]``.
        out: ``[R, C]``, none of the above.

    Returns:
        ``out``.
    """
    if rows.keys() == {"a"}:
        return torch.mul(exp_RC, rows["a"], out=out)
    inner = u_RC.mul_(rows["b"]).add_(rows["a"]) if "b" in rows else u_RC.copy_(rows["a"].expand_as(u_RC))
    if "c" in rows and w_RC is not None:
        inner.addcmul_(w_RC, rows["c"])
    for name, f_RC in curves.items():
        inner.addcmul_(f_RC, rows[name])
    torch.mul(inner, exp_RC, out=out)
    if "d" in rows and w_RC is not None:
        out.addcmul_(w_RC.exp_(), rows["d"])
    return out
