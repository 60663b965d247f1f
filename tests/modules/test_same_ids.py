"""The ids a sampler drew and the ids a trainer grades are one thing, whatever they are padded with and beside.

Left-padded prefill, a cache and rows that join and leave on one side; right-padded micro-batches on the other.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import toys
from torch import Tensor
from torch.nn import functional as F

from lightning_onpolicy.datamodules.batch import RolloutBatch, Sampling
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.datamodules.loader import RolloutLoader, RolloutMaker
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.modules.losses.mismatch import mismatch
from lightning_onpolicy.modules.losses.rows import gather, scatter
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.sampled import temperature_of

PROMPTS = [
    {"prompt": " ".join(f"t{(i + j) % 20}" for j in range(1 + 4 * i)), "uid": f"{i}"} for i in range(4)
]


def rollouts(policy: Policy, temperature: float, max_rows: int) -> RolloutBatch:
    """Responses of one to twelve tokens to prompts of one to thirteen."""
    maker = RolloutMaker(
        TransformersEngine(policy, max_rows=max_rows),
        policy.tokenizer,
        group_size=5,
        sampling=Sampling(temperature=temperature, max_new_tokens=12),
    )
    stream = PromptStream(PROMPTS, policy.tokenizer, chat=False)
    batch = RolloutLoader(stream, maker, prompts_per_batch=4, steps=1).make()
    assert len(set(batch.response_lengths.tolist())) > 3
    return batch


def padded(batch: RolloutBatch, columns: int) -> RolloutBatch:
    """More padding at the end, of ids that mean something."""

    def wider(x: Tensor, value: int) -> Tensor:
        return F.pad(x, (0, columns), value=value)

    return dataclasses.replace(
        batch,
        input_ids=wider(batch.input_ids, 7),
        attention_mask=wider(batch.attention_mask, False),
        response_mask=wider(batch.response_mask, False),
        sampler_logprobs=wider(batch.sampler_logprobs, 0),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("max_rows", [3, 20])
def test_sampler_and_trainer_agree_in_any_padding(temperature: float, max_rows: int) -> None:
    """Catches: positions that count padding, padding that is attended to, a temperature on one side, a shift."""
    policy = toys.policy(0, scale=2.0)
    batch = rollouts(policy, temperature, max_rows)
    policy.eval()

    def grades(part: RolloutBatch) -> Tensor:
        with torch.no_grad():
            logp_N = policy(part.input_ids, part.response_mask, temperature=temperature_of(part)).logp
        return scatter(logp_N, part.response_mask)

    whole = grades(batch)
    T = whole.shape[1]
    assert torch.allclose(grades(padded(batch, 9))[:, :T], whole, atol=1e-5, rtol=0)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0)).tolist()
    for rows in [[i] for i in range(len(batch))] + [order[i : i + 3] for i in range(0, len(batch), 3)]:
        part = batch.select(rows)
        torch.testing.assert_close(grades(part), whole[rows][:, : part.input_ids.shape[1]], atol=1e-5, rtol=0)
    gap = mismatch(gather(whole, batch.response_mask), gather(batch.sampler_logprobs, batch.response_mask))
    assert float(gap["log_ratio_abs"].max()) < 1e-4
    assert float(gap["ratio"].mean()) == pytest.approx(1, abs=1e-5)
