"""Random problems for `token_stats`, and tiles small enough that tiny problems are cut in many ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_onpolicy.kernels import TeacherHead, TokenStats, TopK, tiles

METRICS = ("max_logp", "argmax")


@dataclass(frozen=True)
class Case:
    """Arguments of one call: ``[N, H]`` hidden states, ``[V, H]`` weight, and the rest by keyword."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    options: dict[str, Any]

    def run(self, op: Callable[..., TokenStats], outputs: tuple[str, ...], **more: Any) -> TokenStats:
        return op(self.hidden, self.weight, self.targets, outputs=outputs, **{**self.options, **more})

    def leaves(self) -> list[Tensor]:
        leaves = (self.hidden, self.weight, self.options["bias"])
        return [x for x in leaves if x is not None and x.requires_grad]

    def frozen(self) -> Case:
        """The same with a head that takes no gradient."""
        bias = self.options["bias"]
        options = {**self.options, "bias": None if bias is None else bias.detach()}
        return replace(self, weight=self.weight.detach(), options=options)

    def padded(self, junk: float = 1e4) -> Case:
        """The same with padding: three rows more in the student's head, one in the teacher's, all junk."""

        def pad(x: Tensor | None, rows: int) -> Tensor | None:
            if x is None:
                return None
            longer = torch.cat((x.detach(), x.new_full((rows, *x.shape[1:]), junk)))
            return longer.requires_grad_(x.requires_grad)

        teacher = self.options["teacher"]
        wide = replace(teacher, weight=pad(teacher.weight, 1), bias=pad(teacher.bias, 1))
        options = {"bias": pad(self.options["bias"], 3), "teacher": wide, "vocab_size": self.weight.shape[0]}
        return replace(self, weight=pad(self.weight, 3), options={**self.options, **options})

    def masked(self, mask: Tensor) -> Case:
        """The same with a mask, and nothing usable in the rows it drops."""

        def spoil(x: Tensor, junk: float) -> Tensor:
            shape = (-1,) + (1,) * (x.ndim - 1)
            return x.detach().masked_fill(~mask.view(shape), junk).requires_grad_(x.requires_grad)

        options = {**self.options, "mask": mask, "ids": spoil(self.options["ids"], -7)}
        teacher, topk = options["teacher"], options["topk"]
        options["teacher"] = replace(teacher, hidden=spoil(teacher.hidden, torch.inf))
        options["topk"] = TopK(spoil(topk.ids, 10**6), spoil(topk.logps, 3.0))
        if isinstance(options["temperature"], Tensor):
            options["temperature"] = spoil(options["temperature"], 0.0)
        return Case(spoil(self.hidden, torch.nan), self.weight, spoil(self.targets, -100), options)

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype, as fresh leaves."""

        def cast(x: Any) -> Any:
            if isinstance(x, Tensor) and x.is_floating_point():
                return x.detach().to(dtype).requires_grad_(x.requires_grad)
            if isinstance(x, TeacherHead):
                return replace(x, hidden=cast(x.hidden), weight=cast(x.weight), bias=cast(x.bias))
            if isinstance(x, TopK):
                return replace(x, logps=cast(x.logps))
            return x

        return Case(
            cast(self.hidden), cast(self.weight), self.targets, {k: cast(v) for k, v in self.options.items()}
        )


def build(
    N: int = 7,
    V: int = 23,
    H: int = 6,
    K: int = 3,
    *,
    size: int | None = None,
    bias: bool = False,
    temperature: float | str = 1.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """A random problem with a teacher of another width, ids and top-k; ``temperature="rows"`` is per token."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    true = V if size is None else size
    ids = torch.rand(N, true, generator=draw).argsort(1)[:, :K]
    targets = torch.randint(0, true, (N,), generator=draw)
    targets[:1] = true - 1
    rows = (0.5 + torch.rand(N, generator=draw, dtype=torch.float64)).to(dtype)
    options = {
        "bias": normal(V).requires_grad_() if bias else None,
        "temperature": rows if temperature == "rows" else temperature,
        "soft_cap": soft_cap,
        "logit_scale": logit_scale,
        "vocab_size": size,
        "ids": ids,
        "teacher": TeacherHead(
            normal(N, 4), normal(V, 4), normal(V) if bias else None, soft_cap=soft_cap, logit_scale=1.3
        ),
        "topk": TopK(ids, normal(N, true + 1).log_softmax(1)[:, :K]),
        "mask": None,
        "beta": 0.3,
        "alpha": 0.2,
    }
    weight = (normal(V, H) * spread).requires_grad_()
    return Case(normal(N, H).requires_grad_(), weight, targets, options)


@pytest.fixture
def make() -> Callable[..., Case]:
    return build


@pytest.fixture
def upstream() -> Callable[..., dict[str, Tensor]]:
    """Random upstream gradients for the differentiable entries of a TokenStats."""

    def draw(stats: TokenStats, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
            for name, x in stats.items()
            if name not in METRICS
        }

    return draw


@pytest.fixture
def grads(upstream: Callable[..., dict[str, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """Gradients of random per-token combinations of all statistics with respect to the leaves of a case."""

    def compute(case: Case, stats: TokenStats, *, keep: bool = False) -> tuple[Tensor, ...]:
        weights = upstream(stats)
        total = sum((stats[name] * weights[name]).sum() for name in weights)
        return torch.autograd.grad(total, case.leaves(), retain_graph=keep)

    return compute


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 rows and 5 ids in strips of 3 rows, so that N = 7 and V = 23 end raggedly every way."""
    monkeypatch.setattr(tiles, "CPU_ROWS", 4)
    monkeypatch.setattr(tiles, "CPU_ELEMENTS", 1)
    monkeypatch.setattr(tiles, "CPU_STRIP", 15)
    monkeypatch.setattr(tiles, "MIN_COLUMNS", 5)
