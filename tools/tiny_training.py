"""How the tiny models are trained: on right answers, then, for the student, on noisy ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_data import EOS, Item, prompt_ids, shares

MAX_NOISE = 0.35  # of one token: with more, the right one would hide in short answers
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
    """Replaces tokens of letters or digits in answers by others, so that an answer survives with a given chance."""

    def __init__(self, tokenizer: Any, survival: float) -> None:
        self.survival = survival
        vocab = tokenizer.get_vocab()
        self.kind = torch.zeros(len(vocab), dtype=torch.long)  # 0: never replaced
        self.members = torch.zeros(4, len(vocab))
        kinds = (str.isdigit, str.islower, str.isupper)
        for token, index in vocab.items():
            if token.isascii() and token.isalnum():
                self.kind[index] = 1 + next((k for k, holds in enumerate(kinds) if holds(token)), -1)
        for kind in range(1, 4):
            self.members[kind, self.kind == kind] = 1.0

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

    def losses(self, logits: torch.Tensor, ids: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
        """Return the expected cross-entropy of the tokens that ``sample`` might draw for ``ids``."""
        logp = logits.log_softmax(dim=-1)
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
    positions: int = 128  # longest sequence, in tokens
    pieces: int = 0  # entries of a tokenizer of its own, whose tokens are pieces of words; 0: the shared one


def build_model(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
    """Return a randomly initialised Llama of the recipe's size."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=recipe.positions,
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


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def answer_mask(batch: Pool) -> torch.Tensor:
    """Return where a batch's answers, with their ends of turn, are."""
    position = torch.arange(batch.ids.shape[1])
    return (position >= batch.prompt_lengths[:, None]) & (position < batch.lengths[:, None])


def run_phase(
    label: str,
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    draw: Callable[[], Pool],
    steps: int,
    decay: float,
    noise: Noise,
    generator: torch.Generator,
) -> None:
    """Train for ``steps`` steps; the learning rate falls to zero over the last part, ``decay`` of them."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    started, running = time.perf_counter(), 0.0
    for step in range(steps):
        factor = min(1.0, (step + 1) / (0.03 * steps), (steps - step) / (decay * steps))
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        batch = draw()
        answer = answer_mask(batch)
        chances = noise.chances(batch.ids, answer)
        inputs = noise.sample(batch.ids, chances, generator)
        model.zero_grad()
        for rows in torch.arange(len(inputs)).chunk(3):  # sorted by length, so little padding is computed
            width = int(batch.lengths[rows].max())
            logits = model(input_ids=inputs[rows, : width - 1], use_cache=False).logits
            right, part = batch.ids[rows, 1:width], answer[rows, 1:width]
            losses = noise.losses(logits, right, chances[rows, 1:width]) * part
            # Per letter or digit of the answer: a plain sum would favour long answers, and a mean over all
            # tokens would starve those that are mostly punctuation (number_sorting, then learned last).
            size = (part & (noise.kind[right] > 0)).sum(dim=1).clamp_min(1)
            loss = (losses.sum(dim=1) / size).sum() / len(inputs)
            torch.autograd.backward(loss)
            running += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            mean = running / (step % LOG_EVERY + 1)
            seconds = time.perf_counter() - started
            print(f"{label} step {step + 1}/{steps} loss {mean:.4f} {seconds:.0f}s", flush=True)
            running = 0.0


@torch.no_grad()
def flatten(model: LlamaForCausalLM, batch: Pool, noise: Noise, generator: torch.Generator) -> float:
    """Scale the logits, by the last norm, to fit noisy answers best, and return the factor.

    The most likely tokens stay what they are.  Without this step the first noisy updates, large because the
    model is sure of itself, would destroy part of what it knows.
    """
    answer = answer_mask(batch)
    chances = noise.chances(batch.ids, answer)
    logits = model(input_ids=noise.sample(batch.ids, chances, generator)[:, :-1], use_cache=False).logits

    def misfit(factor: float) -> float:
        losses = noise.losses(factor * logits, batch.ids[:, 1:], chances[:, 1:]) * answer[:, 1:]
        return float((losses.sum(dim=1) / answer.sum(dim=1)).mean())

    best = min((0.05 * i for i in range(1, 21)), key=misfit)
    model.model.norm.weight.mul_(best)
    return best


def train(
    recipe: Recipe, tokenizer: Any, pools: Sequence[Pool], weights: Sequence[float]
) -> LlamaForCausalLM:
    """Train one model: on right answers first, then on noisy ones if the recipe asks for them."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = build_model(recipe, tokenizer)
    model.train()
    counts = shares(weights, recipe.batch)

    def draw() -> Pool:
        return draw_batch(pools, counts, generator)

    clean = Noise(tokenizer, 1.0)
    run_phase(recipe.name, model, make_optimizers(model), draw, recipe.steps, 0.6, clean, generator)
    if recipe.noisy_steps:
        noise = Noise(tokenizer, recipe.survival)
        factor = flatten(model, draw(), noise, generator)
        print(f"{recipe.name} logits scaled by {factor:.2f}", flush=True)
        gentle = [torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)]
        run_phase(f"{recipe.name} noisy", model, gentle, draw, recipe.noisy_steps, 0.5, noise, generator)
    return model
