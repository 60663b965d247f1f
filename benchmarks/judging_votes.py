"""What voting over several judgements buys: a scripted, noisy judge, and the library's own orders and votes.

The judge is a rule, so that nothing but the vote is measured: the better of two responses deserves one point more,
every score has a normal error of 2, a third of the judgements (35 %) know nothing of the difference, and whatever
stands in the first slot gets a point for it. Scores are whole and from 1 to 10; a tie counts half. Arms: responses
shuffled before each judgement, rotated, left in place (the better one in a random slot, the same each time), and
shuffled with the better half of the judgements chosen by a noisy oracle of which are right.

Usage: python benchmarks/judging_votes.py [--items 4000] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import hardware, write_results

from lightning_onpolicy.datamodules.judging.orders import OrderKind, orders, restored
from lightning_onpolicy.datamodules.judging.predicate import is_right
from lightning_onpolicy.datamodules.judging.votes import meta_vote, preference, vote

GAP, SIGMA, BLIND, BONUS, LEVEL = 1.0, 2.0, 0.35, 1.0, 5.5
META_NOISE = 0.8
KS = (1, 2, 4, 8, 16, 32)
ARMS: dict[str, tuple[OrderKind, bool]] = {
    "shuffled": ("shuffled", False),
    "rotated": ("rotated", False),
    "in place": ("fixed", False),
    "shuffled, meta-filtered": ("shuffled", True),
}


def judgement(best: int, order: Sequence[int], draw: random.Random) -> tuple[int, ...]:
    """Two scores by response, as the scripted judge gives them."""
    gap = 0.0 if draw.random() < BLIND else GAP
    slots = [
        LEVEL + gap * (response == best) + BONUS * (slot == 0) + draw.gauss(0.0, SIGMA)
        for slot, response in enumerate(order)
    ]
    return tuple(restored([min(10, max(1, round(s))) for s in slots], order))


def item_accuracy(kind: OrderKind, filtered: bool, item: int) -> list[float]:
    """What the verdict is worth at every k, from one pass of samples."""
    draw = random.Random(f"{kind} {item}")
    best = draw.randrange(2)
    labels = (1, 0) if best == 0 else (0, 1)
    samples = [judgement(best, order, draw) for order in orders(2, max(KS), kind, ("votes", item))]
    meta = [is_right(scores, labels) + draw.gauss(0.0, META_NOISE) for scores in samples]
    worth = []
    for k in KS:
        verdict = meta_vote(samples[:k], meta[:k], max(1, k // 2)) if filtered else vote(samples[:k])
        worth.append(preference(verdict.sums, best, "fractional"))
    return worth


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, plot, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for name, (kind, filtered) in ARMS.items():
        worth = [item_accuracy(kind, filtered, item) for item in range(args.items)]
        for k, column in zip(KS, zip(*worth, strict=True), strict=True):
            mean = sum(column) / len(column)
            spread = sum((x - mean) ** 2 for x in column) / (len(column) - 1)
            half = 1.96 * (spread / len(column)) ** 0.5
            rows.append({"arm": name, "k": k, "accuracy": round(mean, 4), "half_width": round(half, 4)})
    seconds = time.perf_counter() - begun
    for name in ARMS:
        mine = [r for r in rows if r["arm"] == name]
        print(
            f"{name:<26}", "  ".join(f"k={r['k']}: {r['accuracy']:.3f} ± {r['half_width']:.3f}" for r in mine)
        )
    plot(rows, args.out / "judging-votes.png", args.items)
    machine = hardware("cpu")
    write_results(
        args.out, "judging-votes", rows=rows, machine=machine, items=args.items, seconds=round(seconds, 1)
    )


def plot(rows: Sequence[dict[str, Any]], path: Path, items: int) -> None:
    """Accuracy against k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, colour in zip(ARMS, ("#33658a", "#86bbd8", "#444444", "#d1495b"), strict=True):
        mine = [r for r in rows if r["arm"] == name]
        x, y, e = ([r[key] for r in mine] for key in ("k", "accuracy", "half_width"))
        axes.plot(x, y, "o-", color=colour, ms=4, label=name)
        axes.fill_between(x, [a - b for a, b in zip(y, e, strict=True)], [a + b for a, b in zip(y, e, strict=True)],
                          color=colour, alpha=0.15, lw=0)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(KS, [str(k) for k in KS])
    axes.set(xlabel="judgements per item, k", ylabel="accuracy", title="Voting with a scripted, noisy judge")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    note = f"{items:,} items; bands: 95 %"
    axes.text(0.99, 0.02, note, transform=axes.transAxes, ha="right", fontsize=8, color="#666")
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
