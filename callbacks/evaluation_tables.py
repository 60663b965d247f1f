"""An evaluation's lines for people: tables for the terminal and a picture of pass@k."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lightning_onpolicy.callbacks.rollout_table import visible
from lightning_onpolicy.modules.statistics import Interval
from lightning_onpolicy.modules.tables import Change, Line

NAMES = {"macro": "macro (over domains)", "micro": "micro (over items)"}


def line_table(lines: Sequence[Line], title: str, confidence: float) -> Table:
    """Domains in bold, their tasks below them, then the averages; shares in percent.

    Args:
        lines: As :func:`~lightning_onpolicy.modules.tables.tabulate` gives them, not empty.
        title: Title.
        confidence: Coverage of the intervals.
    """
    ks = sorted({k for line in lines for k in line.pass_at})
    k = span((min(line.k[0] for line in lines), max(line.k[1] for line in lines)))
    unscored = any(line.unscored > 0 for line in lines)
    table = _table(title)
    table.caption = Text(
        f"avg, pass and cut (by length) in %. Over items: {confidence:.0%} interval; an item's samples count once.\n"
        f"Seeds are the {k} samples of each item: standard deviation and interval of the mean over them."
        + ("" if unscored else "\nAll samples were scored.")
    )
    heads = [
        "items",
        f"avg@{k}",
        "over items",
        "sd",
        "over seeds",
        *(f"pass@{k}" for k in ks),
        "cut",
        "length",
    ]
    for name in [*heads, *(["unscored"] if unscored else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for number, line in enumerate(lines):
        if number and line.level != "task" and (line.level != "micro" or lines[number - 1].level != "macro"):
            table.add_section()
        cells = [
            ("  " if line.level == "task" else "") + visible(NAMES.get(line.name, line.name), 40),
            str(line.items),
            percent(line.accuracy.mean),
            ends(line.accuracy),
            percent(line.seed_std),
            ends(line.by_seed),
            *(percent(line.pass_at[k].mean) if k in line.pass_at else "–" for k in ks),
            percent(line.truncated),
            f"{line.length:.1f}",
            *([percent(line.unscored)] if unscored else []),
        ]
        table.add_row(*(Text(cell, style="" if line.level == "task" else "bold") for cell in cells))
    return table


def _table(title: str) -> Table:
    """A table without vertical lines, whose first column holds names."""
    table = Table(
        title=Text(title, no_wrap=True, overflow="ignore"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.title_justify, table.caption_justify = "left", "left"
    table.add_column("", min_width=16, overflow="fold")
    return table


def change_table(changes: Sequence[Change], title: str, confidence: float) -> Table:
    """A line per domain and for the averages; scores in percent, differences in points.

    Args:
        changes: As :func:`~lightning_onpolicy.modules.tables.changes` gives them.
        title: Title.
        confidence: Coverage of the intervals.
    """
    table = _table("\n" + title)
    estimated = any(not change.result.test.exact for change in changes)
    table.caption = Text(
        f"Paired by item: difference in points and its {confidence:.0%} interval over items;\n"
        "better, worse, equal: items; p: two-sided sign-flip test, each line by itself"
        + ("; ~: from 20,000 random flips." if estimated else ".")
    )
    for name in ("before", "after", "difference", "interval", "better", "worse", "equal", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, change in enumerate(changes):
        if number and change.level != "domain" and changes[number - 1].level == "domain":
            table.add_section()
        x = change.result
        cells = [
            visible(NAMES.get(change.name, change.name), 40),
            percent(x.before),
            percent(x.after),
            percent(x.difference.mean, signed=True),
            ends(x.difference, signed=True),
            str(x.better),
            str(x.worse),
            str(x.equal),
            ("" if x.test.exact else "~") + p_value(x.test.p_value),
        ]
        table.add_row(*(Text(cell, style="" if change.level == "domain" else "bold") for cell in cells))
    return table


def percent(share: float, signed: bool = False) -> str:
    """A share in percent with one decimal; a dash if there is none.

    Example:
        >>> percent(0.125), percent(0.125, signed=True), percent(float("nan"))
        ('12.5', '+12.5', '–')
    """
    if math.isnan(share):
        return "–"
    return f"{100 * share:{'+' if signed else ''}.1f}"


def ends(x: Interval, signed: bool = False) -> str:
    """Both ends of an interval in percent; a dash if there is none."""
    return "–" if math.isnan(x.low) else f"{percent(x.low, signed)} … {percent(x.high, signed)}"


def span(k: tuple[int, int]) -> str:
    """One number if both are the same.

    Example:
        >>> span((4, 4)), span((2, 4))
        ('4', '2–4')
    """
    return "–".join(str(x) for x in dict.fromkeys(k))


def p_value(p: float) -> str:
    """Three decimals, and what is smaller as such.

    Example:
        >>> p_value(0.0312), p_value(1e-9)
        ('0.031', '<0.001')
    """
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def width_of(table: Table) -> int:
    """Characters that the table needs to show everything on single lines."""
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def as_text(tables: Sequence[Table], width: int = 160) -> str:
    """The tables as plain text."""
    buffer = io.StringIO()
    for table in tables:
        Console(file=buffer, width=width, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def draw_passes(
    path: Path, lines: Sequence[Line], title: str, confidence: float, before: Sequence[Line] = ()
) -> None:
    """Write a PNG of pass@k over k: a curve per domain, and their average in black if there are several.

    Args:
        path: The file.
        lines: Lines of a table.
        title: Title.
        confidence: Coverage of the bands.
        before: Lines of the evaluation compared with, drawn dashed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and pyplot stays untouched
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    old = {(line.level, line.domain): line for line in before}
    drawn = [line for line in lines if line.level in ("domain", "macro") and line.pass_at]
    for number, line in enumerate(drawn):
        colour = "black" if line.level == "macro" else f"C{number % 10}"
        ks = sorted(line.pass_at)
        values = [line.pass_at[k] for k in ks]
        label = "macro average" if line.level == "macro" else visible(line.name, 40).replace("$", r"\$")
        axis.plot(ks, [100 * x.mean for x in values], color=colour, marker="o", markersize=4, label=label)
        axis.fill_between(
            ks,
            [100 * x.low for x in values],
            [100 * x.high for x in values],
            color=colour,
            alpha=0.1,
            linewidth=0,
        )
        if (line.level, line.domain) in old:
            then = old[line.level, line.domain].pass_at
            axis.plot(
                sorted(then),
                [100 * then[k].mean for k in sorted(then)],
                color=colour,
                linestyle="--",
                alpha=0.7,
            )
    ks = sorted({k for line in drawn for k in line.pass_at})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.set_ylim(-2, 102)
    axis.set_xlabel("k (samples per item)")
    axis.set_ylabel("pass@k (%)")
    axis.set_title(
        f"{title}\nbands: {confidence:.0%} over items{'; dashed: before' if before else ''}", fontsize=9
    )
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, format="png")
