"""Make the quickstart's tokenizer, teacher and student from nothing.

Both models are small Llama-style networks trained on the reasoning-gym tasks of a YAML task mix.  The
teacher sees the right answers.  The student sees answers in which characters are replaced at random, so
its most likely answer is usually right while its samples usually are not: the gap that on-policy
distillation closes.  Everything is made on the CPU, offline, and from one seed.

Usage: python tools/make_tiny_models.py --out configs/quickstart/models
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2.sandbox
import reasoning_gym
import torch
import torch.nn.functional as F
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart"

PAD, UNK, BOS, EOS = "<|pad|>", "<|unk|>", "<|bos|>", "<|end|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_ANSWER_TOKENS = 24
IGNORE = -100
MAX_NOISE = 0.35  # of one token: more would hide the right one in short answers
LOG_EVERY = 100
PACKAGES = ("torch", "transformers", "tokenizers", "reasoning-gym")

# reasoning-gym seeds item i with `seed + i`, so streams whose seeds are close share their items.
TRAIN_STREAM, HELDOUT_STREAM, STREAM_STRIDE = 0, 1, 1_000_000_000


def split_of(prompt: str) -> str:
    """Return ``"heldout"`` for one prompt in ten, by the CRC-32 of its UTF-8 text, else ``"train"``."""
    return "heldout" if zlib.crc32(prompt.encode("utf-8")) % 10 == 0 else "train"


@dataclass(frozen=True)
class Item:
    """One task item: the compact prompt, the reference answer and the entry its verifier scores."""

    task: str
    prompt: str
    answer: str
    entry: dict[str, Any]


@dataclass
class Task:
    """One reasoning-gym task of the mix with its compact prompt."""

    name: str
    weight: float
    config: dict[str, Any]
    prompt: str
    render: Callable[[dict[str, Any]], str] = field(init=False)

    def __post_init__(self) -> None:
        template = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(
            self.prompt
        )
        self.render = lambda entry: template.render(question=entry["question"], metadata=entry["metadata"])

    def dataset(self, seed: int, size: int) -> Any:
        """Return the reasoning-gym dataset of this task."""
        return reasoning_gym.create_dataset(self.name, seed=seed, size=size, **self.config)

    def items(self, split: str, seed: int, size: int) -> Iterator[Item]:
        """Yield the items of one split among ``size`` generated ones."""
        stream = HELDOUT_STREAM if split == "heldout" else TRAIN_STREAM
        dataset = self.dataset(seed * 10_000_000 + stream * STREAM_STRIDE, size)
        for index in range(size):
            entry = dataset[index]
            prompt = self.render(entry)
            if split_of(prompt) == split:
                yield Item(self.name, prompt, str(entry["answer"]), entry)


def load_tasks(path: Path) -> list[Task]:
    """Read a task mix."""
    mix = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Task(name, **settings) for name, settings in mix.items()]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Split ``total`` in proportion to ``weights``; the last share takes what rounding leaves."""
    counts = [int(total * weight / sum(weights)) for weight in weights]
    counts[-1] += total - sum(counts)
    return counts


def heldout_items(tasks: Sequence[Task], seed: int, total: int) -> list[Item]:
    """Return ``total`` held-out items with distinct prompts, in the proportions of the mix."""
    chosen: list[Item] = []
    for task, count in zip(tasks, shares([task.weight for task in tasks], total), strict=True):
        seen: dict[str, Item] = {}
        for item in task.items("heldout", seed, count * 100):
            if len(seen) == count:
                break
            seen.setdefault(item.prompt, item)
        chosen.extend(seen.values())
    return chosen


def make_tokenizer(texts: Sequence[str], vocab_size: int = 272) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every letter and digit stays a token of its own."""
    turns = [f"<|{role}|>" for role in ROLES]
    core = Tokenizer(models.BPE(unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Za-z0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=10,
        special_tokens=[PAD, UNK, BOS, EOS, *turns],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=turns,
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Encode user prompts with the chat template, ready for the assistant's answer."""
    chat = [{"role": "user", "content": "{}"}]
    frame = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    texts = [frame.replace("{}", prompt) for prompt in prompts]  # much faster than rendering each chat
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


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


class Corruptor:
    """Replaces letters and digits of answers by others, so that an answer survives with a given chance."""

    def __init__(self, tokenizer: Any, survival: float) -> None:
        self.survival = survival
        vocab = tokenizer.get_vocab()
        self.kind = torch.zeros(len(vocab), dtype=torch.long)
        self.members = [torch.zeros(1, dtype=torch.long)]
        for letters in ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
            ids = torch.tensor([vocab[letter] for letter in letters])
            self.kind[ids] = len(self.members)
            self.members.append(ids)

    def __call__(self, ids: torch.Tensor, answer: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return a copy of ``ids`` with some of the tokens under the mask ``answer`` replaced."""
        kinds = self.kind[ids] * answer
        count = (kinds > 0).sum(dim=1, keepdim=True).clamp_min(1)
        chance = (1.0 - self.survival ** (1.0 / count)).clamp_max(MAX_NOISE)
        hit = torch.rand(ids.shape, generator=generator) < chance
        out = ids.clone()
        for kind, members in enumerate(self.members[1:], start=1):
            where = hit & (kinds == kind)
            rank = torch.searchsorted(members.sort().values, ids[where])
            shift = torch.randint(1, len(members), rank.shape, generator=generator)
            out[where] = members.sort().values[(rank + shift) % len(members)]
        return out


@dataclass(frozen=True)
class Recipe:
    """How one model is built and trained."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    steps: int
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
    """Return Muon for the matrices of the layers, which halves the steps needed, and AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    recipe: Recipe, tokenizer: Any, pools: Sequence[Pool], weights: Sequence[float], seed: int
) -> LlamaForCausalLM:
    """Train one model: right answers first, then corrupted ones if the recipe asks for them."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_model(recipe, tokenizer)
    model.train()
    corrupt = Corruptor(tokenizer, recipe.survival)
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
        ids = corrupt(batch.ids, answer, generator) if step >= recipe.steps else batch.ids
        targets = ids.masked_fill(~answer, IGNORE)
        model.zero_grad()
        for rows in torch.arange(len(ids)).chunk(3):  # sorted by length, so little padding is computed
            width = int(batch.lengths[rows].max())
            logits = model(input_ids=ids[rows, : width - 1], use_cache=False).logits
            losses = F.cross_entropy(
                logits.transpose(1, 2), targets[rows, 1:width], ignore_index=IGNORE, reduction="none"
            )
            # A mean per answer first: else the long answers of a few tasks would outweigh the others.
            loss = (losses.sum(dim=1) / answer[rows].sum(dim=1)).sum() / len(ids)
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


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [reasoning-gym, tiny, quickstart]
---

# Quickstart {name}

A Llama-style model of {parameters:,} parameters for the quickstart, made from nothing by
`tools/make_tiny_models.py` (seed {seed}) on procedurally generated reasoning-gym tasks: {tasks}.
It is a toy for trying out post-training methods and of no other use.

{story}

The user message is a compact prompt (see `configs/quickstart/tasks.yaml`), the reply is the bare answer.

| held-out items | sampled accuracy (avg@4, temperature 1) | greedy accuracy |
| --- | --- | --- |
| {items} | {sampled:.1%} | {greedy:.1%} |

Held-out prompts (CRC-32 of the prompt divisible by ten) were not trained on.
"""
STORIES = {
    "teacher": "Trained on the right answers.",
    "student": (
        "Trained on answers with characters replaced at random, so that its most likely answer is usually\n"
        "right but its samples usually are not."
    ),
}


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a complete model folder with bf16 weights."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_ANSWER_TOKENS,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_round_trip(tokenizer: Any, texts: Sequence[str]) -> None:
    """Raise unless every text survives encoding and decoding."""
    for text in texts:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        if back != text:
            raise ValueError(f"the tokenizer turns {text!r} into {back!r}")


def main(argv: Sequence[str] | None = None) -> None:
    """Make, measure and save the models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="output folder (default: configs/quickstart/models)")
    parser.add_argument("--tasks", type=Path, default=QUICKSTART / "tasks.yaml", help="task mix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="smoke run: a few steps, useless models")
    args = parser.parse_args(argv)
    if args.out is None:
        if args.quick:
            parser.error("--quick makes useless models: name an --out folder for them")
        args.out = QUICKSTART / "models"

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    recipes = [
        Recipe("teacher", layers=4, hidden=128, intermediate=256, steps=950),
        Recipe("student", layers=4, hidden=128, intermediate=192, steps=800, noisy_steps=200, survival=0.35),
    ]
    pool_size, heldout_size = 40_000, 1200
    if args.quick:
        pool_size, heldout_size = 300, 24
        recipes = [Recipe(r.name, 1, 32, 64, 2, 2 if r.noisy_steps else 0, r.survival, 16) for r in recipes]

    tasks = load_tasks(args.tasks)
    trained = [list(task.items("train", args.seed, pool_size)) for task in tasks]
    heldout = heldout_items(tasks, args.seed, heldout_size)
    if {item.prompt for item in heldout} & {item.prompt for items in trained for item in items}:
        raise RuntimeError("a held-out prompt occurs in training")
    sample = [text for items in trained for item in items[:4000] for text in (item.prompt, item.answer)]
    tokenizer = make_tokenizer(sample)
    check_round_trip(tokenizer, sample + [text for item in heldout for text in (item.prompt, item.answer)])
    pools = [make_pool(tokenizer, items) for items in trained]
    print(f"data ready after {time.perf_counter() - started:.0f}s, {len(tokenizer)} tokens", flush=True)

    metrics: dict[str, Any] = {
        "seed": args.seed,
        "versions": {
            name: version(name) for name in ("torch", "transformers", "tokenizers", "reasoning-gym")
        },
        "python": platform.python_version(),
        "threads": args.threads,
        "vocabulary": len(tokenizer),
        "training_items": {task.name: len(items) for task, items in zip(tasks, trained, strict=True)},
        "heldout_items": len(heldout),
        "models": {},
    }
    for recipe in recipes:
        begun = time.perf_counter()
        model = train(recipe, tokenizer, pools, [task.weight for task in tasks], args.seed)
        train_seconds = time.perf_counter() - begun
        folder = args.out / recipe.name
        shutil.rmtree(folder, ignore_errors=True)
        save_model(model, tokenizer, folder)
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # bf16 weights, fp32 maths
        results = evaluate(saved, AutoTokenizer.from_pretrained(folder), tasks, heldout, args.seed)
        parameters = sum(p.numel() for p in saved.parameters())
        card = CARD.format(
            name=recipe.name,
            parameters=parameters,
            seed=args.seed,
            tasks=", ".join(task.name for task in tasks),
            story=STORIES[recipe.name],
            items=len(heldout),
            sampled=results["avg@4"],
            greedy=results["greedy"],
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        metrics["models"][recipe.name] = {
            "parameters": parameters,
            "recipe": asdict(recipe),
            "train_seconds": round(train_seconds, 1),
            **results,
        }
        print(f"{recipe.name} avg@4 {results['avg@4']:.3f} greedy {results['greedy']:.3f}", flush=True)
    metrics["wall_seconds"] = round(time.perf_counter() - started, 1)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
