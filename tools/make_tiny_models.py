"""Make the quickstart's tokenizer, teacher and student from nothing.

Both models are small Llama-style networks trained on the reasoning-gym tasks of a YAML task mix, from
different seeds.  The teacher sees the right answers.  So does the student, as long as the teacher; then it
learns for a while that characters of the answer are replaced at random.  So its most likely answer is
usually right while its samples usually are not: the gap that on-policy distillation closes.  A third, smaller
model reads the same texts through a tokenizer of its own and is trained for a short while: a student to which
the teacher can only show text.  Everything is made on the CPU and offline.

Usage: python tools/make_tiny_models.py --out configs/quickstart/models [--only reader]
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_data import Item, Task, check_round_trip, heldout_items, load_tasks, make_tokenizer
from tiny_evaluation import MAX_ANSWER_TOKENS, evaluate
from tiny_training import Pool, Recipe, make_pool, train

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
PACKAGES = ("torch", "transformers", "tokenizers", "reasoning-gym")


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [reasoning-gym, tiny, quickstart]
---

# Quickstart {name}

A Llama-style model of {parameters:,} parameters for the quickstart, made from nothing by
`tools/make_tiny_models.py` (its own seed: {seed}) on procedurally generated reasoning-gym tasks: {tasks}.
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
        "Trained on the right answers, then for a while on answers with characters replaced at random, so that\n"
        "its most likely answer is usually right but its samples usually are not."
    ),
    "reader": (
        "Trained on the right answers for a short while, with a tokenizer of its own, whose tokens are pieces\n"
        "of words."
    ),
}


def save_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> None:
    """Write a complete model folder with bf16 weights."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipes(seed: int, quick: bool) -> list[Recipe]:
    """Return how the teacher and the student are made; ``quick`` ones are useless but made in seconds."""
    if quick:
        return [
            Recipe("teacher", layers=1, hidden=32, intermediate=64, steps=2, seed=seed, batch=16),
            Recipe("student", 1, 32, 64, steps=2, seed=seed + 1, noisy_steps=2, survival=0.25, batch=16),
            Recipe("reader", 1, 32, 64, steps=2, seed=seed + 2, batch=16, pieces=300),
        ]
    return [
        Recipe("teacher", layers=4, hidden=128, intermediate=256, steps=1000, seed=seed),
        Recipe("student", 4, 128, 256, steps=1000, seed=seed + 1, noisy_steps=60, survival=0.35),
        Recipe("reader", 4, 128, 256, steps=1000, seed=seed + 2, noisy_steps=60, survival=0.35, pieces=384),
    ]


def make_items(
    tasks: Sequence[Task], seed: int, pool_size: int, heldout_size: int
) -> tuple[list[list[Item]], list[Item]]:
    """Return the training items of each task and the held-out items."""
    trained = [list(task.items("train", seed, pool_size)) for task in tasks]
    heldout = heldout_items(tasks, seed, heldout_size)
    if {item.prompt for item in heldout} & {item.prompt for items in trained for item in items}:
        raise RuntimeError("a held-out prompt occurs in training")
    return trained, heldout


def encode(
    trained: Sequence[Sequence[Item]], heldout: Sequence[Item], pieces: int
) -> tuple[PreTrainedTokenizerFast, list[Pool]]:
    """Return a tokenizer of the items and the training sequences of each task."""
    sample = [text for items in trained for item in items[:4000] for text in (item.prompt, item.answer)]
    tokenizer = make_tokenizer(sample, pieces, pieces=True) if pieces else make_tokenizer(sample)
    check_round_trip(tokenizer, sample + [text for item in heldout for text in (item.prompt, item.answer)])
    return tokenizer, [make_pool(tokenizer, items) for items in trained]


def make_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    pools: Sequence[Pool],
    tasks: Sequence[Task],
    heldout: Sequence[Item],
    folder: Path,
) -> dict[str, Any]:
    """Train one model, save it with its card and return what was measured of the saved one."""
    begun = time.perf_counter()
    model = train(recipe, tokenizer, pools, [task.weight for task in tasks])
    train_seconds = time.perf_counter() - begun
    shutil.rmtree(folder, ignore_errors=True)
    save_model(model, tokenizer, folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # bf16 weights, fp32 maths
    results = evaluate(saved, AutoTokenizer.from_pretrained(folder), tasks, heldout, recipe.seed)
    parameters = sum(p.numel() for p in saved.parameters())
    card = CARD.format(
        name=recipe.name,
        parameters=parameters,
        seed=recipe.seed,
        tasks=", ".join(task.name for task in tasks),
        story=STORIES[recipe.name],
        items=len(heldout),
        sampled=results["avg@4"],
        greedy=results["greedy"],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{recipe.name} avg@4 {results['avg@4']:.3f} greedy {results['greedy']:.3f}", flush=True)
    return {
        "parameters": parameters,
        "recipe": asdict(recipe),
        "train_seconds": round(train_seconds, 1),
        **results,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Make, measure and save the models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="output folder (default: configs/quickstart/models)")
    parser.add_argument("--tasks", type=Path, default=QUICKSTART / "tasks.yaml", help="task mix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--only", help="make this model alone; metrics.json keeps the others' entries")
    parser.add_argument("--quick", action="store_true", help="smoke run: a few steps, useless models")
    args = parser.parse_args(argv)
    if args.out is None:
        if args.quick:
            parser.error("--quick makes useless models: name an --out folder for them")
        args.out = QUICKSTART / "models"

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    tasks = load_tasks(args.tasks)
    pool_size, heldout_size = (300, 24) if args.quick else (40_000, 1200)
    trained, heldout = make_items(tasks, args.seed, pool_size, heldout_size)
    chosen = [r for r in recipes(args.seed, args.quick) if args.only in (None, r.name)]
    if not chosen:
        parser.error(f"--only {args.only}: the models are {[r.name for r in recipes(args.seed, args.quick)]}")
    file = args.out / "metrics.json"
    made = json.loads(file.read_text(encoding="utf-8"))["models"] if args.only and file.exists() else {}
    for recipe in chosen:
        tokenizer, pools = encode(trained, heldout, recipe.pieces)
        print(f"data ready after {time.perf_counter() - started:.0f}s, {len(tokenizer)} tokens", flush=True)
        made[recipe.name] = {
            "vocabulary": len(tokenizer),
            "threads": args.threads,
            **make_model(recipe, tokenizer, pools, tasks, heldout, args.out / recipe.name),
        }
    metrics = {
        "seed": args.seed,
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "training_items": {task.name: len(items) for task, items in zip(tasks, trained, strict=True)},
        "heldout_items": len(heldout),
        "models": made,
    }
    file.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
