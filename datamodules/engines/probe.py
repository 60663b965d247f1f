"""Does somebody elsewhere compute with a policy's present weights? What one needs to find out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_onpolicy.datamodules.engines.modes import eval_mode


def _floating(policy: nn.Module) -> Iterator[torch.Tensor]:
    return (p.detach() for p in policy.parameters() if p.is_floating_point())


def fingerprint(policy: nn.Module) -> torch.Tensor:
    """``[P, 2]`` float64 on the CPU: sum and norm of every parameter."""
    rows = [
        torch.stack([p.sum(dtype=torch.float64), torch.linalg.vector_norm(p, dtype=torch.float64)])
        for p in _floating(policy)
    ]
    return torch.stack([row.cpu() for row in rows])


@contextmanager
def changed(policy: nn.Module) -> Iterator[None]:
    """Every weight a tenth larger for a while; the same bits as before afterwards."""
    before = [p.cpu().clone() for p in _floating(policy)]
    try:
        for p in _floating(policy):
            p.mul_(1.1)
        yield
    finally:
        for p, value in zip(_floating(policy), before, strict=True):
            p.copy_(value)


@torch.no_grad()
def logprobs_of(policy: Any, prompt: list[int], new: list[int]) -> torch.Tensor:
    """``[L]``: the policy's log-probabilities of the tokens after a prompt if it may not end yet, on the CPU."""
    device, width = next(policy.parameters()).device, len(prompt) + len(new) - 1
    rows = [prompt + new[:i] for i in range(len(new))]  # left-padded, all ending where a token is predicted
    ids = torch.tensor([[policy.pad_token_id] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    place = torch.arange(width, device=device) - (width - lengths)[:, None]
    with eval_mode(policy):
        logits = policy.decode(ids, (place >= 0).long(), place.clamp(min=0), policy.new_cache())
    logits[:, list(policy.eos_token_ids)] = -torch.inf
    found: torch.Tensor = logits.float().log_softmax(-1).cpu()[range(len(new)), new]
    return found
