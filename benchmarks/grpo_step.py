"""Is one step of GRPO with KL to a reference faster than TRL's `GRPOTrainer`, in less memory?

Both sides get the same model and reference (Llamas with random weights, tied embeddings), prompts, lengths, rewards,
group size (8) and micro-batches' budget of positions, and take the same step in float32: z-scores within groups, ratio
clipped at 0.2, 0.04 · k3 to the reference, token mean over the step, clipping at 1, AdamW. Three lanes:

- `update`: one optimizer step on given rollouts, which TRL receives through its `rollout_func`: advantages, reference
  forward pass, forward and backward pass, update. No side computes old log-probabilities, for there is one step.
- `two-updates`: two optimizer steps on them, for which both compute the old log-probabilities.
- `whole`: sampling, a reward, and one update, each with its own sampler: ours `TransformersEngine`, TRL
  `model.generate`. The two sample different tokens, and in the ragged setting end at random (a quarter of the longest
  response on average), so there is no common loss to check; `speedup_per_token` is by the tokens each sampled.

Neither checkpoints activations (TRL would by default). Ours makes micro-batches by length, TRL as the batch was
padded. How a lane is checked, timed and weighed is in `step_turns.py`.

    python benchmarks/grpo_step.py --lanes update --settings tiny,ragged,vocab50k --repeats 3 --threads 2
    python benchmarks/grpo_step.py --lanes whole --settings tiny,ragged
    python benchmarks/grpo_step.py --device cuda

Needs `pip install trl==1.16.0`. Writes `grpo-step-DEVICE.json` (every step), `.csv` (one line per setting and side)
and, where matplotlib is installed, `.png`; the other two lanes have their names in the files'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from grpo_sides import GROUPED, LANES, builders
from step_turns import Comparison, arguments, compare


def comparison(name: str) -> Comparison:
    """What a lane compares."""
    result = "grpo-step" if name == "update" else f"grpo-step-{name}"
    options = ("--lanes", name)
    lane = LANES[name]
    return Comparison(Path(__file__), result, builders(lane), GROUPED, options, agree=not lane.samples)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``lanes`` becomes a list."""
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)  # of three lanes
    parser.add_argument(
        "--lanes", default=",".join(LANES), help=f"comma-separated, of {', '.join(LANES)}; default: all"
    )
    args = parser.parse_args(argv)
    args.lanes = args.lanes.split(",")
    unknown = sorted(set(args.lanes) - set(LANES))
    if unknown:
        parser.error(f"--lanes has {', '.join(unknown)}; there are {', '.join(LANES)}.")
    return args


def main() -> None:
    """Measure lane by lane."""
    args = parse()
    for name in args.lanes:
        compare(comparison(name), args)


if __name__ == "__main__":
    main()
