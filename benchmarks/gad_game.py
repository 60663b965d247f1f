"""Does the adversarial game do what its theory says, and what breaks it?

Theory: for pairs of a student's and a teacher's answer, the Bradley–Terry optimum is D = log q − log p + c, so a
student that ascends D descends KL(p‖q). The table D shows it with exact expectations and with samples.

Game: teacher and student of `gad_game_world.py`, D a table of ten scores, the library's own losses and advantages. Per
step every student takes 32 prompts × 8 answers, is scored by D before its update, then D and student take one step of
plain SGD (learning rates 1 and 0.01); 200 steps of D alone come first. Arms: GAD (D learns on), the same with
cross-entropy or with half of D's student answers from the last 40 steps (replay), D frozen after its warm-up, SeqKD
(imitation of 32 teacher answers per step), and GAD from the wide Gaussian that SeqKD ends in. GAD is also played from
starts of other widths, beside the exact gradient flow of KL(p‖q).

    python benchmarks/gad_game.py

Writes `gad-game.json` (every seed's path), `.csv` (a line per arm) and, where matplotlib is installed, `.png`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import hardware, write_results
from gad_game_world import (
    CATEGORIES,
    FLOOR,
    LOGQ_V,
    NARROW,
    descend,
    fit_table,
    imitation,
    reverse_kl,
    student,
)

from lightning_onpolicy.modules.losses.advantages import group_zscore
from lightning_onpolicy.modules.losses.adversarial import DiscriminatorSpec, discriminator_loss, pair_rows
from lightning_onpolicy.modules.losses.policy_gradient import clipped
from lightning_onpolicy.modules.statistics import t_interval

PROMPTS, GROUP, WARMUP = 32, 8, 200
RATE, TABLE_RATE = 0.01, 1.0
MEMORY = 40  # steps whose answers replay draws from: 10,240 answers
BT, CE = DiscriminatorSpec(), DiscriminatorSpec("cross_entropy")


@dataclass(frozen=True)
class Arm:
    """One way to learn.

    Args:
        name: What it is called in the results.
        table: Whether D learns on (``online``), stops after its warm-up (``frozen``), or there is none.
        spec: D's loss.
        replay: Half of D's student answers are old.
        starts: (mean, log σ), one for all seeds or one each.
    """

    name: str
    table: Literal["online", "frozen", "none"] = "online"
    spec: DiscriminatorSpec = field(default_factory=DiscriminatorSpec)
    replay: bool = False
    starts: tuple[tuple[float, float], ...] = (NARROW,)


class Draws:
    """A stream of its own per seed, so that no seed's path depends on how many others run beside it."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, n: int) -> Tensor:
        """``[S, n]``."""
        return torch.stack([torch.rand(n, generator=g, dtype=torch.float64) for g in self.generators])

    def categories(self, logp_SV: Tensor, n: int) -> Tensor:
        """``[S, n]`` by the inverse distribution function."""
        below_SV = logp_SV.exp().cumsum(1).contiguous()
        return torch.searchsorted(below_SV, self.uniform(n)).clamp(max=CATEGORIES - 1)


def play(arm: Arm, seeds: Sequence[int], steps: int, every: int = 20) -> dict[str, Any]:
    """All seeds of an arm at once: their paths, and where they ended.

    Args:
        arm: How.
        seeds: One student each.
        steps: Of the student.
        every: Steps between two points of a path.
    """
    S, n = len(seeds), PROMPTS * GROUP
    draws, old = Draws(seeds), torch.zeros(MEMORY, S, n, dtype=torch.long)
    theta = torch.tensor(arm.starts, dtype=torch.float64).expand(S, 2).clone().requires_grad_()
    table = torch.zeros(S, CATEGORIES, dtype=torch.float64, requires_grad=True)
    move = torch.optim.SGD([theta], lr=RATE)
    learn = torch.optim.SGD([table], lr=TABLE_RATE)
    group_B = torch.arange(S * PROMPTS).repeat_interleave(GROUP)
    pairs = pair_rows(group_B, torch.arange(S * PROMPTS))
    path, accuracy = [], torch.full((), math.nan)
    began = time.perf_counter()
    for step in range(-WARMUP if arm.table != "none" else 0, steps):
        if step >= 0 and step % every == 0:
            path.append(theta.detach().clone())
        logp_SV = student(theta)
        teacher_SP = draws.categories(LOGQ_V.expand(S, CATEGORIES), PROMPTS)
        if arm.table == "none":
            _step(move, -logp_SV.gather(1, teacher_SP).mean(1).sum())
            continue
        own_SN = draws.categories(logp_SV.detach(), n)
        reward_SN = table.detach().gather(1, own_SN)  # by D as it is before its update
        if arm.table == "online" or step < 0:
            seen_SN = own_SN
            if arm.replay:
                seen_SN = _half_old(own_SN, old, step + WARMUP, draws)
                old[(step + WARMUP) % MEMORY] = own_SN
            # The sum over seeds of each one's mean: independent games that share a call.
            score_B, teacher_R = table.gather(1, seen_SN).flatten(), table.gather(1, teacher_SP).flatten()
            loss, metrics = discriminator_loss(arm.spec, score_B, teacher_R, pairs, count=n)
            accuracy = metrics["accuracy"].view(S, n).mean(1)
            _step(learn, loss)
        if step >= 0:
            advantage_B = group_zscore(reward_SN.flatten(), group_B)
            logp_B = logp_SV.gather(1, own_SN).flatten()
            _step(move, clipped(logp_B, logp_B.detach(), advantage_B)[0].sum() / n)
            with torch.no_grad():
                theta[:, 1].clamp_(min=FLOOR)
    path.append(theta.detach().clone())
    return {
        "arm": arm.name,
        "steps": steps,
        "seconds": time.perf_counter() - began,
        "path": torch.stack(path),
        "theta": theta.detach(),
        "accuracy": accuracy,
        "table": table.detach(),
    }


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _half_old(own_SN: Tensor, old: Tensor, stored: int, draws: Draws) -> Tensor:
    """Each prompt's first half of the group replaced by answers from the memory: the number of rows stays."""
    if stored == 0:
        return own_SN
    filled = min(stored, len(old))
    S, n = own_SN.shape
    pick_SN = (draws.uniform(n) * filled * n).long()
    past_SN = old[:filled].transpose(0, 1).reshape(S, -1).gather(1, pick_SN)
    first_N = torch.arange(n) % GROUP < GROUP // 2
    return torch.where(first_N, past_SN, own_SN)


def summarise(run: dict[str, Any]) -> dict[str, Any]:
    """Where an arm ended: means over seeds with 95 % intervals, and extremes."""
    theta_S2 = run["theta"]
    row: dict[str, Any] = {"arm": run["arm"], "seeds": len(theta_S2)}
    for name, value_S in (
        ("mean", theta_S2[:, 0]),
        ("sigma", theta_S2[:, 1].exp()),
        ("kl", reverse_kl(theta_S2)),
    ):
        x = t_interval(value_S)
        row |= {name: round(x.mean, 4), f"{name}_low": round(x.low, 4), f"{name}_high": round(x.high, 4)}
        row |= {f"{name}_min": round(float(value_S.min()), 4), f"{name}_max": round(float(value_S.max()), 4)}
    # Pairs of one category are ties: the accuracy of a table is ½ once p = q.
    row["accuracy_at_the_end"] = None if run["arm"] == "SeqKD" else round(float(run["accuracy"].mean()), 4)
    return row | {"seconds": round(run["seconds"], 2)}


def theory(samples: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """How far a fitted table is from centred log q − log p: exact expectations, then samples."""
    # Of the game's own start, N(2.5, 0.8), no sum in float64 sees what it does at 9: its probability there is e^−33.
    starts = {"N(2.5, 1.4)": (2.5, math.log(1.4)), "SeqKD's fit": tuple(descend(imitation, NARROW).tolist())}
    out: dict[str, Any] = {"exact": {}, "sampled": []}
    for place, theta in starts.items():
        logp_V = student(torch.tensor([theta], dtype=torch.float64))[0]
        ratio_V = LOGQ_V - logp_V
        for name, spec in (("bradley_terry", BT), ("cross_entropy", CE)):
            table_V = fit_table(spec, logp_V.exp()[:, None] * LOGQ_V.exp())
            worst = float((table_V - (ratio_V - ratio_V.mean())).abs().max())
            out["exact"][f"{name}, {place}"] = {
                "max_error": worst,
                "range": float(ratio_V.max() - ratio_V.min()),
            }
    # Samples come from the last, the widest, where every category turns up; the RMS error is over what it says.
    weight_VV = logp_V.exp()[:, None] * LOGQ_V.exp()
    for n in samples:
        errors = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.multinomial(weight_VV.flatten(), n, replacement=True, generator=generator)
            table_V = fit_table(BT, drawn.bincount(minlength=CATEGORIES**2).double().view_as(weight_VV) / n)
            error_V = table_V - ratio_V
            error_V = error_V - (logp_V.exp() * error_V).sum()
            errors.append(float((logp_V.exp() * error_V**2).sum().sqrt()))
        out["sampled"].append({"pairs": n, "rms_error": sum(errors) / len(errors), "of_seeds": errors})
    first, last = out["sampled"][0], out["sampled"][-1]
    if len(samples) > 1:
        rise = math.log(last["rms_error"] / first["rms_error"])
        out["slope"] = rise / math.log(last["pairs"] / first["pairs"])
    return out


def starting_widths(widths: Sequence[float], seeds: int, steps: int) -> list[dict[str, float]]:
    """Where GAD and the exact flow of KL(p‖q) end, by the width they start from."""
    starts = tuple((NARROW[0], math.log(w)) for w in widths for _ in range(seeds))
    ends = play(Arm("widths", starts=starts), range(len(starts)), steps)["theta"].view(len(widths), seeds, 2)
    return [
        {
            "sigma_start": width,
            "sigma_exact": math.exp(float(descend(reverse_kl, (NARROW[0], math.log(width)))[1])),
            "sigma_gad": [float(x) for x in end[:, 1].exp()],
        }
        for width, end in zip(widths, ends, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, play, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4000, help="of each student")
    parser.add_argument("--seeds", type=int, default=8, help="students per arm")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    optima = {"narrow": descend(reverse_kl, NARROW), "wide": descend(reverse_kl, (2.5, math.log(3.5)))}
    wide = tuple(descend(imitation, NARROW).tolist())
    arms = [
        Arm("GAD"),
        Arm("GAD, cross-entropy", spec=CE),
        Arm("GAD, replay", replay=True),
        Arm("frozen D", table="frozen"),
        Arm("SeqKD", table="none"),
        Arm("GAD from SeqKD's fit", starts=((wide[0], wide[1]),)),
    ]
    seeds = range(args.seeds)
    proof = theory((1000, 10_000, 100_000, 1_000_000), seeds)
    print(*proof["exact"].items(), *proof["sampled"], f"slope {proof['slope']:.3f}", sep="\n", flush=True)
    runs = [play(arm, seeds, args.steps) for arm in arms]
    rows = [summarise(run) for run in runs]
    print(*rows, sep="\n", flush=True)
    widths = starting_widths((0.5, 0.8, 1.1, 1.4, 1.6, 1.8, 2.0, math.exp(0.8), 2.6, 3.5), 2, args.steps)
    print(*widths, sep="\n", flush=True)
    more = {
        "optima": {
            name: {
                "mean": float(t[0]),
                "sigma": math.exp(float(t[1])),
                "kl": float(reverse_kl(t[None])),
            }
            for name, t in optima.items()
        },
        "seqkd_fit": {"mean": wide[0], "sigma": math.exp(wide[1])},
        "theory": proof,
        "starting_widths": widths,
    }
    paths = {
        run["arm"]: run["path"][::5].transpose(0, 1).mul(1000).round().div(1000).tolist() for run in runs
    }
    machine = hardware("cpu")
    write_results(args.out, "gad-game", rows=rows, machine=machine, **more, paths_of_mean_and_log_sigma=paths)
    if importlib.util.find_spec("matplotlib") is not None:
        from gad_game_plot import plot

        plot(runs, rows, more, machine, args.out / "gad-game.png")


if __name__ == "__main__":
    main()
