"""Scripted judges: what they say is a function of the prompt and the seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from lightning_onpolicy.datamodules.judging.items import JudgeItem

ANSWER = re.compile(r"<answer-(\d+)-[0-9a-f]{8}>\n(.*?)\n</answer-\1-", re.S)


def shown(prompt: str) -> list[str]:
    """The responses in a prompt of group.jinja, in the order shown."""
    return [text for _, text in ANSWER.findall(prompt)]


def by_content(prompt: str, seed: int) -> str:
    """A response's length is its score."""
    return f"Longer is better. \\boxed{{{', '.join(str(min(10, len(text))) for text in shown(prompt))}}}"


def by_slot(prompt: str, seed: int) -> str:
    """The first slot gets 10, the next ones less."""
    return f"\\boxed{{{', '.join(str(10 - 2 * i) for i in range(len(shown(prompt))))}}}"


def noisy(right: float, readable: float = 1.0) -> Callable[[str, int], str]:
    """Prefers the longest response with that probability, another one otherwise."""

    def judge(prompt: str, seed: int) -> str:
        rng, texts = random.Random(f"{seed} {prompt}"), shown(prompt)
        if rng.random() >= readable:
            return "I cannot say."
        best = max(range(len(texts)), key=lambda i: len(texts[i]))
        if rng.random() >= right:
            best = rng.choice([i for i in range(len(texts)) if i != best])
        return f"\\boxed{{{', '.join('8' if i == best else '3' for i in range(len(texts)))}}}"

    return judge


def items(count: int, n: int = 3) -> list[JudgeItem]:
    """Labelled items whose longest response is the best."""
    found = []
    for number in range(count):
        responses = tuple("ab"[number % 2] * (1 + (i + number) % n) for i in range(n))
        found.append(
            JudgeItem(
                ({"role": "user", "content": f"question {number}"},),
                responses,
                tuple(float(len(text)) for text in responses),
                f"item{number}",
                "toy",
            )
        )
    return found
