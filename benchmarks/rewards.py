"""How many answers do the verifiers score per second, and what does one stuck answer cost?

Code: programs of a mix (right, with imports, wrong, crashing, a function), five tests each by standard input or by
function calls, every one in a sandbox. Maths: formulas, which all go to math-verify (`formulas`), and a mix of which
strings decide three in four (`math`). Choices, numbers with units, and instructions (four per prompt): short answers.
Each lane runs with 1 and with 2 workers, warm; then once more with one answer in it that never ends, which costs its
deadline (for the last three, which cannot hang, a megabyte). The share of time lost is 1 − t / t_stuck. A worker that
is stuck leaves the others to the rest, so with two of them less is lost.

    python benchmarks/rewards.py --tiers bubblewrap
    python benchmarks/rewards.py --code 200 --tiers subprocess --text 0
    python benchmarks/rewards.py --code 0 --verifiers math,formulas,choice,numeric,instructions --tag text

Writes `benchmarks/results/rewards.json` (every run) and `.csv` (one line per verifier, tier and number of workers).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import hardware, write_results

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt
from lightning_onpolicy.datamodules.rewards import (
    ChoiceReward,
    CodeReward,
    InstructionReward,
    MathReward,
    NumericReward,
)
from lightning_onpolicy.datamodules.rewards.sandbox import find
from lightning_onpolicy.datamodules.rewards.tiers import Tier, Wall

PROGRAMS = {
    "right": "n = int(input())\nprint(sum(i * i for i in range(n)))",
    "imports": "import collections, math\nn = int(input())\nprint(int(math.fsum(i * i for i in range(n))))",
    "wrong": "n = int(input())\nprint(n * n)",
    "crashes": "n = int(input())\nprint(1 // (n - n))",
    "function": "def squares(n):\n    return sum(i * i for i in range(n))",
}
STUCK = "while True: pass"
SIZES = (3, 10, 100, 1000, 10_000)
STDIO = [{"stdin": str(n), "stdout": str(sum(i * i for i in range(n)))} for n in SIZES]
CALLS = [{"function": "squares", "args": [n], "expected": sum(i * i for i in range(n))} for n in SIZES]


class Verifier(Protocol):
    """What is measured."""

    pool: Any

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]: ...
    def close(self) -> None: ...


# Labels, a verifier for a number of workers, and its answers without or with a stuck one.
Lane = tuple[dict[str, Any], Callable[..., Verifier], Callable[[bool], list[Group]]]


def group(row: dict[str, Any], *texts: str) -> Group:
    """Some answers to one prompt."""
    completions = tuple(Completion(torch.tensor([1]), torch.zeros(1), "eos", text=t) for t in texts)
    return Group(Prompt((1,), "", row), completions)


def code_answers(count: int, stuck: bool) -> list[Group]:
    """``count`` programs; with ``stuck``, the first one never ends."""
    names = list(PROGRAMS)
    groups = []
    for number in range(count):
        name = names[number % len(names)]
        source = STUCK if stuck and number == 0 else PROGRAMS[name]
        tests = CALLS if name == "function" else STDIO
        groups.append(group({"tests": tests}, f"```python\n{source}\n```"))
    return groups


def text_answers(kind: str, count: int, stuck: bool) -> list[Group]:
    """``count`` short answers, none equal to another; with ``stuck``, the first one is the worst of its kind."""
    groups = [group(*ANSWERS[kind](number)) for number in range(count)]
    if stuck:
        worst = "\\boxed{9^{9^{9^{9}}}}" if kind in ("math", "formulas") else "[*a, " * 200_000
        groups[0] = group(dict(groups[0].prompt.row) | {"answer": groups[-1].prompt.row.get("answer")}, worst)
    return groups


def formula(n: int) -> tuple[dict[str, Any], str]:
    """A reference and an answer that only algebra can compare; every other one is right."""
    golds = (f"\\frac{{{2 * n + 1}}}{{4}}\\pi", f"(x+{n + 1})^2", f"{n + 2}\\sqrt{{2}}", f"({n}, {n + 1}]")
    right = (
        f"{(2 * n + 1) / 4}\\pi",
        f"x^2+{2 * n + 2}x+{(n + 1) ** 2}",
        f"\\sqrt{{{2 * (n + 2) ** 2}}}",
        f"({n}, {n}+1]",
    )
    wrong = (f"{n / 4}\\pi", f"x^2+{n}", f"\\sqrt{{{n + 1}}}", f"[{n}, {n + 1}]")
    return {"answer": golds[n % 4]}, f"Some steps, so it is \\boxed{{{(right, wrong)[n // 4 % 2][n % 4]}}}."


def mixed(n: int) -> tuple[dict[str, Any], str]:
    """A formula one time in four; else an integer, right or wrong or none."""
    if n % 4 == 3:
        return formula(n // 4)
    return {"answer": str(n)}, (f"So \\boxed{{{n}}}", f"The answer is {n}.", f"\\boxed{{{n + 1}}}", "Hm.")[
        n // 4 % 4
    ]


INSTRUCTIONS = {
    "instruction_id_list": [
        "length_constraints:number_words",
        "keywords:forbidden_words",
        "length_constraints:number_sentences",
        "detectable_format:number_bullet_lists",
    ],
    "kwargs": [
        {"num_words": 50, "relation": "at least"},
        {"forbidden_words": ["rain", "snow"]},
        {"num_sentences": 9, "relation": "less than"},
        {"num_bullets": 2},
    ],
}
ANSWERS: dict[str, Callable[[int], tuple[dict[str, Any], str]]] = {
    "math": mixed,
    "formulas": formula,
    "choice": lambda n: ({"answer": "ABCD"[n % 4]}, f"Of the {n}, the answer is ({'ABCD'[n // 2 % 4]})."),
    "numeric": lambda n: ({"answer": f"{n + 1} m/s"}, f"It moves at {(n + 1) * (3.6, 3)[n % 2]:.6g} km/h"),
    "instructions": lambda n: (
        INSTRUCTIONS,
        f"* Sun {n} shines on it. Or not.\n* " + "So it goes on. " * (n % 9 + 9),
    ),
}
VERIFIERS: dict[str, Callable[..., Verifier]] = {
    "math": MathReward,
    "formulas": MathReward,
    "choice": ChoiceReward,
    "numeric": NumericReward,
    "instructions": InstructionReward,
}


def text_lanes(args: argparse.Namespace) -> Iterator[Lane]:
    """One lane per verifier of text."""
    for kind in args.verifiers.split(",") if args.text else ():
        yield (
            {"verifier": kind, "tier": ""},
            VERIFIERS[kind],
            functools.partial(text_answers, kind, args.text),
        )


def measure(
    make: Callable[..., Verifier], answers: Callable[[bool], list[Group]], workers: int, repeats: int
) -> dict[str, Any]:
    """Seconds for all answers, without and with a stuck one, from warm workers."""
    verifier = make(workers=workers)
    verifier.pool.start()
    verifier.score(answers(False)[: 4 * workers])
    runs: dict[str, list[float]] = {"plain": [], "stuck": []}
    for _ in range(repeats):
        for lane in runs:
            groups = answers(lane == "stuck")
            start = time.perf_counter()
            verifier.score(groups)
            runs[lane].append(time.perf_counter() - start)
    verifier.close()
    plain, stuck = (statistics.median(seconds) for seconds in runs.values())
    return {
        "workers": workers,
        "items": len(groups),
        "items_per_s": round(len(groups) / plain, 1),
        "seconds": round(plain, 2),
        "seconds_with_one_stuck": round(stuck, 2),
        "share_lost_to_one_stuck": round(max(0.0, 1 - plain / stuck), 3),
        "runs": runs,
    }


def code_lanes(args: argparse.Namespace) -> Iterator[Lane]:
    """One lane per tier that works here."""
    for name in args.tiers.split(","):
        if isinstance(find(Tier.of(name, "--tiers")), Wall):
            make = functools.partial(
                CodeReward, tier=name, deadline_s=args.deadline_s, total_s=args.deadline_s
            )
            yield {"verifier": "code", "tier": name}, make, functools.partial(code_answers, args.code)
        else:
            print(f"tier {name}: not on this machine")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--code", type=int, default=1000, help="programs per run; 0: none")
    parser.add_argument("--text", type=int, default=10_000, help="answers per run of the others; 0: none")
    parser.add_argument(
        "--verifiers", default="math", help=f"which others, comma-separated, of {', '.join(VERIFIERS)}"
    )
    parser.add_argument(
        "--tiers", default=",".join(t.label for t in Tier), help="sandbox tiers, comma-separated"
    )
    parser.add_argument("--workers", default="1,2", help="numbers of workers, comma-separated")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--deadline-s", type=float, default=5.0, help="seconds a test may take")
    parser.add_argument("--device", default="cpu", help="only names the hardware: verifiers run on the CPU")
    parser.add_argument("--tag", default="", help="goes into the names of the result files")
    args = parser.parse_args()
    rows = []
    for labels, make, answers in [*(code_lanes(args) if args.code else ()), *text_lanes(args)]:
        for workers in map(int, args.workers.split(",")):
            rows.append(labels | measure(make, answers, workers, args.repeats))
            print({key: value for key, value in rows[-1].items() if key != "runs"}, flush=True)
    name = "-".join(filter(None, ["rewards", args.tag]))
    write_results(
        Path(__file__).parent / "results",
        name,
        rows=[{key: value for key, value in row.items() if key != "runs"} for row in rows],
        machine=hardware(args.device),
        runs=[row["runs"] for row in rows],
    )


if __name__ == "__main__":
    main()
