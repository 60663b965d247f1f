"""A readable table of rollouts, whatever the progress bar and wherever the output goes.

Responses are hostile text: control characters are made visible, and nothing in them is read as markup.
"""

from __future__ import annotations

import io
import shutil
import sys
import unicodedata
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.tools.tokens import response_of, segments_of

PROMPT_CHARS = 160
RESPONSE_CHARS = 480


def visible(text: str, limit: int) -> str:
    """Text on one line with newlines as ``⏎`` and control characters escaped; the middle is cut if too long.

    Example:
        >>> visible("a\\nb\\x1b[31m", 100)
        'a⏎b\\\\x1b[31m'
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]} […] {text[len(text) - limit // 2 :]}"
    out = []
    for character in text:
        if character == "\n":
            out.append("⏎")
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
            out.append(character.encode("unicode_escape").decode("ascii"))
        else:
            out.append(character)
    return "".join(out)


def sample_table(batch: RolloutBatch, tokenizer: Any | None, rows: int, title: str) -> Table:
    """A table of the batch's first responses, one prompt after the other.

    Args:
        batch: The rollouts.
        tokenizer: Decodes responses with their special tokens, and what a tool wrote as ``⟦…⟧``; None takes the batch's
            own texts.
        rows: Most rows shown.
        title: Title.
    """
    table = Table(title=Text(title), show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("response", ratio=5, overflow="fold")
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    kl = batch.extra.get("sampled_kl")
    if kl is not None:
        table.add_column("KL", justify="right", no_wrap=True)
    for i in _spread(batch.group.tolist(), rows):
        mask = batch.response_mask[i]
        text = batch.texts[i] if batch.texts else ""
        if tokenizer is not None:
            parts = segments_of(*response_of(batch, i), tokenizer, special=True)
            text = "".join(p.text if p.role == "assistant" else f"⟦{p.text}⟧" for p in parts)
        length = f"{int(mask.sum())}" + ("" if bool(batch.finished[i]) else " cut")
        cells = [
            Text(visible(batch.prompts[i].text if batch.prompts else "", PROMPT_CHARS)),
            Text(visible(text, RESPONSE_CHARS)),
            _reward(float(batch.rewards[i])),
            Text(length),
        ]
        if kl is not None:
            cells.append(Text(f"{_row_sum(kl[i], mask):.3f}"))
        table.add_row(*cells)
    return table


def _spread(groups: list[int], rows: int) -> list[int]:
    """Rows of as many groups as possible: every group's first, then every group's second, and so on."""
    seen: dict[int, int] = {}
    rank = []
    for i, group in enumerate(groups):
        rank.append((seen.get(group, 0), i))
        seen[group] = seen.get(group, 0) + 1
    chosen = [i for _, i in sorted(rank)[:rows]]
    return sorted(chosen, key=lambda i: (groups[i], i))


def _reward(reward: float) -> Text:
    if reward != reward:
        return Text("unscored", style="dim")
    good = reward >= 1 - 1e-6
    return Text(f"{'✓' if good else '✗'} {reward:.2f}", style="green" if good else "red")


def _row_sum(value: Tensor, mask: Tensor) -> float:
    return float(value if value.ndim == 0 else value[mask].sum())


def print_table(trainer: pl.Trainer, table: Table, least: int = 60) -> None:
    """Print above the progress bar, if there is one; with colours only on a terminal.

    Args:
        trainer: The Trainer.
        table: The table.
        least: Least width, whatever the terminal's.
    """
    width = max(shutil.get_terminal_size((120, 40)).columns, least)
    buffer = io.StringIO()
    Console(file=buffer, width=width, force_terminal=sys.stdout.isatty(), highlight=False).print(table)
    encoding = sys.stdout.encoding or "utf-8"
    text = buffer.getvalue().rstrip("\n").encode(encoding, "replace").decode(encoding)
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
        bar.print(text)
    else:  # rich's live display redirects standard output by itself
        print(text, flush=True)
