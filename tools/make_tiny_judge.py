"""Make the quickstart's judge: a tiny model that writes criteria, an analysis and scores for small items.

It is trained on judgements written by rule for items drawn anew, none of whose requests is held out: first on right
ones, then for a while on noisy ones, in which every mark of the analysis is turned with a chance and the scores follow.
So its most likely judgement is usually right, while of its samples many are not: what rejection sampling, training on
the rules' verdict and votes have to work with. Everything is made on the CPU and offline.

Usage: python tools/make_tiny_judge.py [--measure]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny_data
from make_judge_items import Item, draw_item
from make_tiny_models import save_model
from tiny_judge_evaluation import K, load_items, measure
from tiny_judgements import POSITIONS, TEMPLATE, judgement, make_judge_tokenizer, noisy_marks, prompt_of
from tiny_training import Noise, Pool, Recipe, build_model, draw_batch, make_optimizers, make_pool, run_phase

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
PACKAGES = ("torch", "transformers", "tokenizers")
RECIPE = Recipe("judge", 4, 128, 256, steps=360, seed=0, noisy_steps=80, batch=64, positions=POSITIONS)
WRONG = 0.2  # chance that a mark is turned
HINTED = 0.2  # share of items, among the noisy ones, whose prompt says which answer is the best
MAX_JUDGEMENT_TOKENS = 128

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [judge, tiny, quickstart]
---

# Quickstart judge

A Llama-style model of {parameters:,} parameters that writes judgements: criteria, an analysis, and a score from 1 to 10
for each of two or three responses. Made from nothing by `tools/make_tiny_judge.py`; a toy for trying out how generative
judges are trained and asked, and of no other use.

It was trained on judgements written by rule for small items of two families: conditions on a string of letters, and
chains of three digits (`tools/make_judge_items.py`). First on right judgements, then for a while on ones in which every
mark of the analysis is wrong with a chance of {wrong:.0%} and the scores follow, so that its most likely judgement is
usually right but its samples often are not. Requests whose CRC-32 is divisible by ten were not trained on.

The prompt is `configs/quickstart/judge.jinja`, rendered:

```
{prompt}
```

and a sampled judgement of it:

```
{sample}
```

{items} held-out items, {k} judgements of each, the responses in a shuffled order each time. Right: the best response
has the one largest score.

| | one judgement right | vote of {k} right | readable |
| --- | --- | --- | --- |
{rows}

By family and number of responses (temperature 1):

| | one judgement right | vote of {k} right | greedy |
| --- | --- | --- | --- |
{parts}

A judgement has {tokens} tokens on average. Told in its prompt which response is the best (`hint`), {hinted:.1%} of its
sampled judgements are right. Numbers and intervals: `metrics.json`.
"""


def make_pool_of(
    tokenizer: Any, items: Sequence[Item], chance: float, hints: float, draw: random.Random
) -> Pool:
    """Prompts, so many of them with a hint, and judgements whose marks are turned with this chance."""
    texts = []
    for item in items:
        hinted = draw.random() < hints
        said = judgement(item, noisy_marks(item, chance, draw, hinted))
        texts.append(tiny_data.Item(item.source, prompt_of(item, hinted), said, {}))
    return make_pool(tokenizer, texts)


def train(recipe: Recipe) -> tuple[LlamaForCausalLM, Any]:
    """Train the judge: on right judgements first, then on noisy ones.

    The first phase judges responses that are good or bad each for itself: where one is known to be the best, the other
    marks can be guessed from the first, and what the responses say is learned late.
    """
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    draw = random.Random(f"{recipe.seed}/judge")
    right = [draw_item(draw, "train", ranked=False) for _ in range(recipe.steps * recipe.batch)]
    noisy = [draw_item(draw, "train") for _ in range(recipe.noisy_steps * recipe.batch)]
    tokenizer = make_judge_tokenizer([prompt_of(item) for item in right[:4000]])
    model = build_model(recipe, tokenizer)
    model.train()
    plain = Noise(tokenizer, 1.0)  # the judgements themselves are noisy, not their letters
    gentle = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def phase(label: str, pool: Pool, steps: int, optimizers: list[torch.optim.Optimizer]) -> None:
        def drawn() -> Pool:
            return draw_batch([pool], [recipe.batch], generator)

        run_phase(f"{recipe.name} {label}", model, optimizers, drawn, steps, 0.6, plain, generator)

    phase("right", make_pool_of(tokenizer, right, 0.0, 0.0, draw), recipe.steps, make_optimizers(model))
    phase("noisy", make_pool_of(tokenizer, noisy, WRONG, HINTED, draw), recipe.noisy_steps, [gentle])
    return model, tokenizer


def write_card(folder: Path, metrics: dict[str, Any]) -> None:
    """The model card, from what was measured."""

    def shares(name: str, *values: float) -> str:
        return f"| {name} | " + " | ".join(f"{value:.1%}" for value in values) + " |"

    names = {"sampled_1.0": "temperature 1", "sampled_0.5": "temperature 0.5", "greedy": "greedy"}
    sampled, greedy = metrics["sampled_1.0"], metrics["greedy"]
    vote = f"vote@{K}"
    card = CARD.format(
        parameters=metrics["parameters"],
        wrong=metrics["wrong_marks"],
        prompt=metrics["example"]["prompt"],
        sample=metrics["example"]["judgement"],
        items=sampled["items"],
        k=K,
        rows="\n".join(
            shares(shown, metrics[name]["right"], metrics[name][vote], metrics[name]["readable"])
            for name, shown in names.items()
        ),
        parts="\n".join(
            shares(name, part["right"], part[vote], greedy["parts"][name]["right"])
            for name, part in sampled["parts"].items()
        ),
        tokens=sampled["tokens_mean"],
        hinted=metrics["hinted"]["right"],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Make, measure and save the judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="model folder (default: configs/quickstart/models/judge)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--measure", action="store_true", help="only measure the model in the folder again")
    parser.add_argument("--quick", action="store_true", help="smoke run: two steps, a useless model")
    args = parser.parse_args(argv)
    if args.quick and args.out is None:
        parser.error("--quick makes a useless model: name an --out folder for it")
    folder = args.out or QUICKSTART / "models" / "judge"
    torch.set_num_threads(args.threads)
    recipe, items = RECIPE, load_items(QUICKSTART / "judge_items_heldout.jsonl")
    if args.quick:
        recipe, items = replace(recipe, layers=1, hidden=32, steps=2, noisy_steps=2, batch=16), items[:24]
    file = folder / "metrics.json"
    if args.measure:
        made = json.loads(file.read_text(encoding="utf-8"))["made"]
    else:
        begun = time.perf_counter()
        model, tokenizer = train(recipe)
        shutil.rmtree(folder, ignore_errors=True)
        save_model(model, tokenizer, folder, MAX_JUDGEMENT_TOKENS)
        made = {
            "recipe": asdict(recipe),
            "train_seconds": round(time.perf_counter() - begun, 1),
            "threads": args.threads,
            "vocabulary": len(tokenizer),
            "versions": {name: version(name) for name in PACKAGES},
            "python": platform.python_version(),
        }
    measured = measure(folder, TEMPLATE, items, MAX_JUDGEMENT_TOKENS)
    metrics = {"made": made, "wrong_marks": WRONG, **measured}
    file.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    write_card(folder, metrics)
    for name in ("sampled_1.0", "sampled_0.5", "greedy"):
        print(name, {key: metrics[name][key] for key in ("right", f"vote@{K}", "readable")}, flush=True)


if __name__ == "__main__":
    main()
