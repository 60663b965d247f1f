"""Make the quickstart's judge: a tiny model that writes criteria, an analysis and scores for small items.

It is trained on judgements written by rule for items drawn anew, none of whose requests is held out: first on right
ones, then for a while on noisy ones, in which every mark of the analysis is turned with a chance and the scores follow.
So its most likely judgement is usually right, while of its samples many are not: what rejection sampling, training on
the rules' verdict and votes have to work with. Everything is made on the CPU and offline.

Usage: python tools/make_tiny_judge.py
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
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny_data
from judge_evaluation import measure
from make_judge_items import Item, draw_item
from make_tiny_models import save_model
from tiny_judgements import POSITIONS, judgement, make_judge_tokenizer, noisy_marks, prompt_of
from tiny_training import Noise, Pool, Recipe, build_model, draw_batch, make_optimizers, make_pool, run_phase

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
PACKAGES = ("torch", "transformers", "tokenizers")
RECIPE = Recipe("judge", 4, 128, 256, steps=420, seed=0, noisy_steps=80, batch=96, positions=POSITIONS)
WRONG = 0.2  # chance that a mark is turned
HINTED = 0.1  # share of items whose prompt says which answer is the best
MAX_JUDGEMENT_TOKENS = 80


def make_pools(
    tokenizer: Any, items: Sequence[Item], chance: float, draw: random.Random
) -> list[Pool]:
    """One pool of prompts and judgements; marks are turned with this chance."""
    texts = []
    for item in items:
        hinted = draw.random() < HINTED
        said = judgement(item, noisy_marks(item, chance, draw, hinted))
        texts.append(tiny_data.Item(item.source, prompt_of(item, hinted), said, {}))
    return [make_pool(tokenizer, texts)]
