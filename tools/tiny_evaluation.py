"""How the tiny models are measured: sampled and greedy answers, scored by the tasks' own verifiers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_data import Item, Task, prompt_ids

MAX_ANSWER_TOKENS = 24


@torch.no_grad()
def sample_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], k: int, generator: torch.Generator | None
) -> list[list[str | None]]:
    """Answer each prompt ``k`` times at temperature 1, or greedily where there is no generator.

    An answer that did not end within the token limit is ``None``.
    """
    model.eval()
    encoded = prompt_ids(tokenizer, prompts)
    answers: list[list[str | None]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(encoded):
        by_length.setdefault(len(row), []).append(index)
    for indices in by_length.values():
        owners = [index for index in indices for _ in range(k)]
        step_ids = torch.tensor([encoded[index] for index in owners])
        cache = DynamicCache(config=model.config)
        finished = torch.zeros(len(owners), dtype=torch.bool)
        columns: list[torch.Tensor] = []
        while len(columns) < MAX_ANSWER_TOKENS and not bool(finished.all()):
            logits = model(input_ids=step_ids, past_key_values=cache, use_cache=True).logits[:, -1].float()
            if generator is None:
                chosen = logits.argmax(dim=-1)
            else:
                chosen = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
            chosen = chosen.masked_fill(finished, tokenizer.pad_token_id)
            finished |= chosen == tokenizer.eos_token_id
            columns.append(chosen)
            step_ids = chosen[:, None]
        for owner, row, ended in zip(
            owners, torch.stack(columns, dim=1).tolist(), finished.tolist(), strict=True
        ):
            text = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]) if ended else None
            answers[owner].append(text)
    return answers


def confidence(values: Sequence[float]) -> list[float]:
    """Return the 95 % normal interval of a mean over items."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    half = 1.96 * math.sqrt(spread / len(values))
    return [round(mean - half, 4), round(mean + half, 4)]


def evaluate(
    model: Any, tokenizer: Any, tasks: Sequence[Task], items: Sequence[Item], seed: int, k: int = 4
) -> dict[str, Any]:
    """Measure sampled (avg@k) and greedy accuracy; an answer counts where its verifier gives full marks."""
    prompts = [item.prompt for item in items]
    sampled = sample_answers(model, tokenizer, prompts, k, torch.Generator().manual_seed(seed))
    greedy = sample_answers(model, tokenizer, prompts, 1, None)
    verifiers = {task.name: task.dataset(seed, 1) for task in tasks}

    def right(item: Item, answer: str | None) -> float:
        return float(answer is not None and verifiers[item.task].score_answer(answer, item.entry) >= 1.0)

    rows = [
        (item.task, sum(right(item, a) for a in many) / k, right(item, one[0]))
        for item, many, one in zip(items, sampled, greedy, strict=True)
    ]

    def summary(part: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
        means, hits = [row[1] for row in part], [row[2] for row in part]
        return {
            "items": len(part),
            f"avg@{k}": round(sum(means) / len(part), 4),
            f"avg@{k}_ci95": confidence(means),
            "greedy": round(sum(hits) / len(part), 4),
        }

    per_task = {task.name: summary([row for row in rows if row[0] == task.name]) for task in tasks}
    return {**summary(rows), "per_task": per_task}
