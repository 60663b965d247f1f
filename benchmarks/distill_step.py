"""Is one optimizer step of full-vocabulary distillation faster than TRL's `DistillationTrainer`, in less memory?

Both sides get the same models (a Llama with random weights, tied embeddings; the teacher has the student's shape)
and the same rollouts, and take the same step: teacher forward, student forward, reverse KL over the whole
vocabulary, token mean over the step, backward, clipping at 1, AdamW. Generation is left out on both sides: TRL
receives the finished rollouts where it would generate them. Neither checkpoints activations (TRL would by default),
both compute in the same dtype, and each runs its own default implementation of AdamW with the same hyper-parameters.
Each makes micro-batches its own way from one budget of positions: ours sorts by length, TRL splits the batch as it
was padded, prompts left and responses right; that is most of the difference where lengths are ragged, and there is
hardly any to expect where lengths are equal and the vocabulary is small.

How it is checked, timed and weighed is in `step_turns.py`.

    python benchmarks/distill_step.py --settings tiny,ragged,vocab50k --repeats 9 --threads 2
    python benchmarks/distill_step.py --device cuda

Needs `pip install trl==1.16.0`. Writes `distill-step-DEVICE.json` (every step), `.csv` (one line per setting and
side) and, where matplotlib is installed, `.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from distill_sides import BUILDERS
from step_problem import SETTINGS
from step_turns import Comparison, arguments, compare


def main() -> None:
    """Check, measure, print and write."""
    what = Comparison(Path(__file__), "distill-step", BUILDERS, SETTINGS)
    compare(what, arguments(__doc__).parse_args())


if __name__ == "__main__":
    main()
