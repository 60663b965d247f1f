"""What `token_stats` can be asked for, and the small dataclasses that cross its boundary.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` rows of the output head, ``K`` ids per token; ``p`` student,
``q`` teacher distribution, both ``[N, V]`` and never materialised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree

#: Differentiable outputs that need neither a teacher nor ids.
STUDENT_OUTPUTS = ("logp", "lse", "entropy")
#: Differentiable outputs over the full vocabulary that need ``teacher``.
TEACHER_OUTPUTS = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
)
#: Differentiable outputs that need ``topk``.
TOPK_OUTPUTS = ("topk_reverse_kl", "topk_forward_kl")
#: Detached metrics.
METRIC_OUTPUTS = ("max_logp", "argmax")
#: Every name ``outputs`` accepts.
OUTPUTS = (*STUDENT_OUTPUTS, "logp_at_ids", *TEACHER_OUTPUTS, *TOPK_OUTPUTS, *METRIC_OUTPUTS)


@dataclass(frozen=True)
class TeacherHead:
    """A white-box teacher's last hidden states and output head (payload T1); frozen, it never gets a
    gradient.

    Teacher logits are ``soft_cap(logit_scale · hidden @ weightᵀ + bias) / temperature`` with the student's
    temperature.

    Args:
        hidden: ``[N, Ht]`` teacher hidden states of the student's tokens, after the final norm.
        weight: ``[V2, Ht]`` output head; a DTensor is gathered.
        bias: ``[V2]`` or None.
        soft_cap: Cap of ``cap · tanh(logits / cap)``, or None.
        logit_scale: Factor on ``hidden @ weightᵀ``.
        vocab_size: True vocabulary size; rows past it are padding. None: the student's.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    soft_cap: float | None = None
    logit_scale: float = 1.0
    vocab_size: int | None = None


@dataclass(frozen=True)
class TopK:
    """A teacher's log-probabilities at K ids per token (payload T2).

    Args:
        ids: ``[N, K]`` int64, distinct within a row.
        logps: ``[N, K]`` teacher log-probabilities at the ids, natural log, at the student's temperature. An
            entry of -inf is not part of the support: rows may have fewer than K ids.
    """

    ids: Tensor
    logps: Tensor


@dataclass(frozen=True, eq=False)
class TokenStats(Mapping[str, Tensor]):
    """Per-token statistics by name, as attributes (``stats.logp``) or items (``stats["logp"]``).

    Args:
        values_by_name: ``[N]`` tensors in the order asked for (``logp_at_ids`` is ``[N, K]``): float32, or
            float64 where the hidden states are; ``argmax`` is int64.
    """

    values_by_name: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.values_by_name[name]

    def __getattr__(self, name: str) -> Tensor:
        values: dict[str, Tensor] = self.__dict__.get("values_by_name", {})
        if name in values:
            return values[name]
        if name in OUTPUTS:
            raise AttributeError(f"{name!r} was not computed; add it to outputs (computed: {tuple(values)}).")
        raise AttributeError(f"TokenStats has no attribute {name!r}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


def _register_pytree() -> None:
    """Make TokenStats a pytree node.

    FSDP2 hangs its pre-backward hook on the output tensors it finds with ``tree_flatten``; without this a
    sharded head that returns a TokenStats would not be gathered for the backward pass.
    ``torch.utils._pytree`` has no public spelling as of torch 2.13.
    """
    _pytree.register_pytree_node(
        TokenStats,
        lambda stats: (list(stats.values_by_name.values()), list(stats.values_by_name)),
        lambda values, names: TokenStats(dict(zip(names, values, strict=True))),
        serialized_type_name="lightning_onpolicy.kernels.TokenStats",
    )


_register_pytree()
