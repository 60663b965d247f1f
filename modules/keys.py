"""Numbers that stand for prompts and samples, so that rows can be grouped after they were gathered from
ranks."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import Prompt


def stable_hash(*parts: object) -> int:
    """A 63-bit number from anything printable, equal on all ranks and in all runs (``hash`` is not)."""
    digest = hashlib.blake2b(repr(parts).encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def prompt_key(prompt: Prompt) -> int:
    """The number that stands for a prompt: from its source and uid, or its token ids if it has no uid."""
    return stable_hash(prompt.source, prompt.uid or prompt.ids)


def sample_index(group: Tensor) -> Tensor:
    """``[B]`` int64: the how-manieth row of its group each row is, from 0.

    Example:
        >>> sample_index(torch.tensor([7, 7, 3, 7]))
        tensor([0, 1, 0, 2])
    """
    seen: dict[int, int] = {}
    out: list[int] = []
    for g in group.tolist():
        out.append(seen.get(g, 0))
        seen[g] = out[-1] + 1
    return torch.tensor(out, dtype=torch.int64)
