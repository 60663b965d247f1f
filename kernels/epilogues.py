"""What is done to a tile once its product is there: two implementations of one protocol, and which a call takes.

``eager`` is PyTorch, on every device and in every dtype. ``triton`` does the same in one pass over a tile; it takes
CUDA tensors and float32 logits where Triton is installed, and is imported when the first such call arrives. A call's
backward pass takes the epilogue of its forward pass, because they differ in what the store of kept logits holds.

Legend: ``N`` tokens, ``K`` indexed ids per token; ``R`` and ``C`` rows and columns of a tile.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from lightning_onpolicy.kernels.divergences import Mixing
from lightning_onpolicy.kernels.moments import Moments
from lightning_onpolicy.kernels.tile_logits import Heads, Tile
from lightning_onpolicy.kernels.tiles import Workspace

NAMES = ("eager", "triton")
#: State that turns logits into log-probabilities: ``l = (z - m) - log_s``. The two are kept apart, because their sum is
#: rounded where logits are far from zero.
SHIFTS = ("m", "log_s", "teacher_m", "teacher_log_s")
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
# A plain global: torch.compile guards on it, and cannot trace a ContextVar (torch 2.13).
_forced: str | None = None


@dataclass(frozen=True)
class Upstream:
    """What the gradient of a tile depends on beside its logits.

    Args:
        table: ``[N]`` coefficients by name (:func:`~lightning_onpolicy.kernels.coefficients.coefficients`).
        index_NK: Indexed ids, or None.
        sparse_NK: Gradients at the indexed ids, or None.
        state: :data:`SHIFTS`, the last two only with a teacher, ``[N]`` each.
        mixing: Mixture weights.
    """

    table: dict[str, Tensor]
    index_NK: Tensor | None
    sparse_NK: Tensor | None
    state: dict[str, Tensor]
    mixing: Mixing


class Epilogue(Protocol):
    """Each function is called once per sweep, and what it returns once per tile."""

    def moments(
        self,
        heads: Heads,
        space: Workspace,
        names: Sequence[str],
        index_NK: Tensor | None,
        picked_NK: Tensor | None,
    ) -> Callable[[Tile, Moments | None], Moments]:
        """Moments of the rows over the tile and all before it; writes logits at indexed ids to ``picked_NK``.

        The first visit of a tile: products of kept ones are made here.
        """
        ...

    def curves(
        self,
        heads: Heads,
        space: Workspace,
        names: Sequence[str],
        state: dict[str, Tensor],
        mixing: Mixing,
        sums: Tensor,
    ) -> Callable[[Tile], None]:
        """Adds shares of values and of ``E_p f`` to ``sums``, ``[4, 2, N]`` in the order of ``CURVED``."""
        ...

    def gradient(self, heads: Heads, space: Workspace, upstream: Upstream) -> Callable[[Tile], Tensor]:
        """Gradient of the product ``hidden @ weightᵀ``, ``[R, C]`` in the workspace; kept logits stay."""
        ...


def choose(device_type: str, dtype: torch.dtype) -> str:
    """Name of the epilogue for logits of this dtype on such a device."""
    if _forced is not None:
        return _forced
    return "triton" if _TRITON_IS_INSTALLED and device_type == "cuda" and dtype == torch.float32 else "eager"


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Calls inside take this epilogue, in every thread, for comparisons; so do their backward passes, wherever they
    run.

    Args:
        name: ``"eager"``, or ``"triton"``: without a CUDA device in Triton's interpreter only
            (``TRITON_INTERPRET=1`` before anything imports it).

    Raises:
        ValueError: If there is no such epilogue.
    """
    if name not in NAMES:
        raise ValueError(f"epilogue must be one of {NAMES}, got {name!r}.")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def buffers(name: str, streams: int, *, capped: bool, curved: bool) -> tuple[int, int]:
    """Workspace buffers a call needs: of one tile each, and of one strip each.

    Args:
        name: The epilogue.
        streams: Heads: 1, or 2 with a teacher.
        capped: Whether the student has a soft-cap.
        curved: Whether a curved divergence is asked for.
    """
    if name == "triton":
        return streams, 0
    # Log-probabilities and their exponentials; the slope of the cap; mixtures and curves.
    return streams, 2 * streams + (1 if capped else 0) + (3 if curved else 0)


def load(name: str) -> Epilogue:
    """The epilogue's module."""
    return cast(Epilogue, importlib.import_module(f"lightning_onpolicy.kernels.{name}_epilogue"))
