"""A distilled student on held-out prompts: right answers, and how far it is from the teacher, whose likelihood we know.

Legend: ``B`` responses, ``T`` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_onpolicy.datamodules import (
    EvaluationLoader,
    GymSource,
    PromptStream,
    RolloutMaker,
    Sampling,
    collate,
)
from lightning_onpolicy.datamodules.batch import Group, Prompt
from lightning_onpolicy.datamodules.engines import TransformersEngine
from lightning_onpolicy.datamodules.given import text_completion
from lightning_onpolicy.datamodules.judged import read_anew
from lightning_onpolicy.datamodules.rewards import GymReward
from lightning_onpolicy.modules import ModelSpec, Policy

TASKS = "onpolicy://quickstart/tasks.yaml"
TEACHER = "onpolicy://quickstart/models/teacher"
ITEMS, SAMPLES, NEW_TOKENS = 512, 4, 24
SAMPLING = Sampling(temperature=1.0, max_new_tokens=NEW_TOKENS)


def evaluate(model: str | Path) -> dict[str, Any]:
    """Right answers of each item (a digit each), per task, and the two divergences; always the same items and seeds."""
    student, teacher = (ModelSpec(str(m), dtype="float32").load().eval() for m in (model, TEACHER))
    source = GymSource(TASKS, size=ITEMS, seed=78, split="heldout")
    prompts = PromptStream(source, student.tokenizer, shuffle=False).take(ITEMS)
    reward = GymReward()
    maker = RolloutMaker(
        TransformersEngine(student),
        student.tokenizer,
        rewards={"accuracy": reward},
        group_size=SAMPLES,
        sampling=SAMPLING,
    )
    right: list[int] = []
    logp: list[float] = []
    logq: list[float] = []
    for batch in EvaluationLoader(prompts, maker, prompts_per_batch=128, seed=5):
        right += batch.rewards.view(-1, SAMPLES).sum(1).long().tolist()
        logp += batch.sampler_logprobs.nan_to_num(0.0).double().sum(1).tolist()
        ended = batch.finished.tolist()
        logq += likelihoods(
            teacher, read_anew(batch.prompts, teacher.tokenizer, chat=True), batch.texts, ended
        )
    reward.close()
    gaps = [p - q for p, q in zip(logp, logq, strict=True)]
    tasks: dict[str, list[int]] = {}
    for prompt, count in zip(prompts, right, strict=True):
        tasks.setdefault(prompt.source, []).append(count)
    return {
        "right": "".join(map(str, right)),
        "accuracy": sum(right) / (SAMPLES * len(right)),
        "tasks": {name: round(sum(c) / (SAMPLES * len(c)), 4) for name, c in sorted(tasks.items())},
        "reverse": sum(gaps) / len(gaps),
        "reverse_median": sorted(gaps)[len(gaps) // 2],
        "forward_nll": nll(student, prompts, teacher),
    }


@torch.no_grad()
def likelihoods(
    policy: Policy, prompts: Sequence[Prompt], texts: Sequence[str], ended: Sequence[bool]
) -> list[float]:
    """log-probability of each text, and of ending after it where it ended, as the policy's tokenizer has it."""
    tokenizer = policy.tokenizer
    groups = [
        Group(prompt, (text_completion(text, tokenizer, cut=bool(text) and not done),), on_policy=False)
        for prompt, text, done in zip(prompts, texts, ended, strict=True)
    ]
    batch = collate(groups, tokenizer.pad_token_id)
    mask = batch.response_mask.clone()
    logp_N = policy(batch.input_ids, mask).logp
    logp_BT = torch.zeros(mask[:, 1:].shape, dtype=torch.float64)
    logp_BT[mask[:, 1:]] = logp_N.double()
    found: list[float] = logp_BT.sum(1).tolist()
    return found


def nll(student: Policy, prompts: Sequence[Prompt], teacher: Policy) -> float:
    """Mean negative log-likelihood, per answer, of what the teacher samples on these prompts."""
    asked = read_anew(prompts, teacher.tokenizer, chat=True)
    maker = RolloutMaker(TransformersEngine(teacher), teacher.tokenizer, group_size=1, sampling=SAMPLING)
    answers = [group.completions[0] for group in maker.sample(asked, seed=9)]
    found = likelihoods(
        student,
        prompts,
        [answer.text for answer in answers],
        [answer.finish != "length" for answer in answers],
    )
    return -sum(found) / len(found)
