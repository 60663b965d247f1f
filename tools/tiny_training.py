"""How the tiny models are trained: on right answers, then, for the student, on noisy ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_data import EOS, Item, prompt_ids, shares

MAX_NOISE = 0.5  # of one token: with more, the right one would hide in short answers
LOG_EVERY = 100


@dataclass
class Pool:
    """The training sequences of one task as right-padded rows."""

    ids: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor


def make_pool(tokenizer: Any, items: Sequence[Item]) -> Pool:
    """Encode items as prompt + answer + end of turn."""
    prompts = prompt_ids(tokenizer, [item.prompt for item in items])
    answers = tokenizer([item.answer + EOS for item in items], add_special_tokens=False)["input_ids"]
    rows = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return Pool(ids, torch.tensor([len(p) for p in prompts]), torch.tensor([len(row) for row in rows]))


class Noise:
    """Replaces letters and digits of answers by others, so that an answer survives with a given chance."""

    def __init__(self, tokenizer: Any, survival: float) -> None:
        self.survival = survival
        vocab = tokenizer.get_vocab()
        self.kind = torch.zeros(len(vocab), dtype=torch.long)  # 0: never replaced
        self.members = torch.zeros(4, len(vocab))
        for kind, letters in enumerate(
            ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), start=1
        ):
            ids = torch.tensor([vocab[letter] for letter in letters])
            self.kind[ids] = kind
            self.members[kind, ids] = 1.0

    def chances(self, ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """Return each token's chance of being replaced; it is zero outside the mask ``answer``."""
        noisy = (self.kind[ids] > 0) & answer
        count = noisy.sum(dim=1, keepdim=True).clamp_min(1)
        return (1.0 - self.survival ** (1.0 / count)).clamp_max(MAX_NOISE) * noisy

    def sample(self, ids: torch.Tensor, chances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return a copy of ``ids`` in which tokens are replaced by another of their kind."""
        hit = torch.rand(ids.shape, generator=generator) < chances
        out = ids.clone()
        if hit.any():
            others = self.members[self.kind[ids[hit]]].scatter(1, ids[hit][:, None], 0.0)
            out[hit] = torch.multinomial(others, 1, generator=generator)[:, 0]
        return out

    def losses(self, logp: torch.Tensor, ids: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
        """Return the expected negative log-probability of the tokens that ``sample`` might draw."""
        right = logp.gather(-1, ids[..., None])[..., 0]
        sums = (logp @ self.members.T).gather(-1, self.kind[ids][..., None])[..., 0]
        sizes = self.members.sum(dim=1)[self.kind[ids]]
        others = torch.where(chances > 0, (sums - right) / (sizes - 1), right)
        return -((1.0 - chances) * right + chances * others)


@dataclass(frozen=True)
class Recipe:
    """How one model is built and trained."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    steps: int
    seed: int
    noisy_steps: int = 0
    survival: float = 1.0
    batch: int = 160


def build_model(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
    """Return a randomly initialised Llama of the recipe's size."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def draw_batch(pools: Sequence[Pool], counts: Sequence[int], generator: torch.Generator) -> Pool:
    """Draw ``counts[i]`` sequences of task i, shortest first."""
    width = max(pool.ids.shape[1] for pool in pools)
    parts: list[Pool] = []
    for pool, count in zip(pools, counts, strict=True):
        rows = torch.randint(len(pool.ids), (count,), generator=generator)
        ids = F.pad(pool.ids[rows], (0, width - pool.ids.shape[1]))
        parts.append(Pool(ids, pool.prompt_lengths[rows], pool.lengths[rows]))
    lengths = torch.cat([part.lengths for part in parts])
    order = lengths.argsort(stable=True)
    prompt_lengths = torch.cat([part.prompt_lengths for part in parts])
    return Pool(torch.cat([part.ids for part in parts])[order], prompt_lengths[order], lengths[order])


def rate(step: int, recipe: Recipe) -> float:
    """Return the learning-rate factor of a step: both phases decay to zero, the noisy one from 0.15."""
    if step >= recipe.steps:
        return 0.15 * (recipe.steps + recipe.noisy_steps - step) / recipe.noisy_steps
    return min(1.0, (step + 1) / 30, (recipe.steps - step) / (0.6 * recipe.steps))


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    recipe: Recipe, tokenizer: Any, pools: Sequence[Pool], weights: Sequence[float]
) -> LlamaForCausalLM:
    """Train one model: right answers first, then noisy ones if the recipe asks for them."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = build_model(recipe, tokenizer)
    model.train()
    noise = Noise(tokenizer, recipe.survival)
    optimizers = make_optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    total = recipe.steps + recipe.noisy_steps
    counts = shares(weights, recipe.batch)
    started, running = time.perf_counter(), 0.0
    for step in range(total):
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(step, recipe)
        batch = draw_batch(pools, counts, generator)
        position = torch.arange(batch.ids.shape[1])
        answer = (position >= batch.prompt_lengths[:, None]) & (position < batch.lengths[:, None])
        noisy = step >= recipe.steps
        chances = noise.chances(batch.ids, answer) if noisy else torch.zeros(batch.ids.shape)
        inputs = noise.sample(batch.ids, chances, generator) if noisy else batch.ids
        model.zero_grad()
        for rows in torch.arange(len(inputs)).chunk(3):  # sorted by length, so little padding is computed
            width = int(batch.lengths[rows].max())
            logits = model(input_ids=inputs[rows, : width - 1], use_cache=False).logits
            targets = batch.ids[rows, 1:width]
            losses = noise.losses(logits.log_softmax(dim=-1), targets, chances[rows, 1:width])
            losses = losses * answer[rows, 1:width]
            # A mean per answer first: else the long answers of a few tasks would outweigh the others.
            loss = (losses.sum(dim=1) / answer[rows].sum(dim=1)).sum() / len(inputs)
            torch.autograd.backward(loss)
            running += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == total:
            mean = running / (step % LOG_EVERY + 1)
            seconds = time.perf_counter() - started
            print(f"{recipe.name} step {step + 1}/{total} loss {mean:.4f} {seconds:.0f}s", flush=True)
            running = 0.0
    return model
