"""Rollouts of random words with a teacher's answer beside each group: both sides as long as a test wants them."""

from __future__ import annotations

import dataclasses

import torch
import toys

from lightning_onpolicy.datamodules.batch import Group, Prompt, RolloutBatch, Sampling, collate
from lightning_onpolicy.datamodules.given import text_completion

TOKENIZER = toys.tokenizer()


def duels(
    seed: int = 0,
    *,
    groups: int = 4,
    size: int = 2,
    words: tuple[int, int] = (2, 6),
    taught: tuple[int, int] = (2, 6),
    beside: bool = True,
) -> RolloutBatch:
    """Random words on both sides; all answers end by themselves.

    Args:
        seed: Of the words; prompts differ from seed to seed.
        groups: Prompts.
        size: Sampled answers to each.
        words: Fewest and most words of a sampled answer.
        taught: The same of a teacher's.
        beside: Whether the teacher answers at all.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> str:
        count = int(torch.randint(low, high + 1, (), generator=g))
        return " ".join(f"t{n}" for n in torch.randint(0, toys.WORDS, (count,), generator=g).tolist())

    mine, theirs = [], []
    for i in range(groups):
        ids = (seed % 20, seed // 20, i % 20, i // 20)
        prompt = Prompt(ids, f"prompt {i} of {seed}", {}, f"{seed}/{i}", "toy")
        sampled = []
        for _ in range(size):
            given = text_completion(draw(*words), TOKENIZER)
            logprobs = torch.full((len(given.ids),), -3.0)
            sampled.append(dataclasses.replace(given, logprobs=logprobs, version=0))
        mine.append(Group(prompt, tuple(sampled)))
        theirs.append(Group(prompt, (text_completion(draw(*taught), TOKENIZER),), on_policy=False))
    made = mine + theirs if beside else mine
    none: list[list[float | None]] = [[None] * len(group.completions) for group in made]
    numbers = [*range(groups), *range(groups)][: len(made)]
    return collate(made, 20, rewards=none, sampling=Sampling(max_new_tokens=24), numbers=numbers)
