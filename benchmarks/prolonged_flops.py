"""What a run costs, by formula: 2 floating-point operations per parameter and token forward, 6 forward and backward.

| symbol | here |
|---|---|
| N, N_t | parameters of the policy and of the teacher; a tied head counts once, where it multiplies |
| S | tokens of all sampled responses with their prompts, dropped groups included |
| K | tokens of the responses that are trained on, with their prompts |

    RL            2 N S (sampling) + 2 N K (probabilities before the updates) + 2 N K (reference, if β > 0) + 6 N K
    distillation  2 N S (sampling) + 2 N_t K (teacher) + 6 N K

Departures from what is executed: attention over the context is left out (:func:`attention_share`), as are padding,
rewards and validation; dropped groups are taken to be as long as those kept, because nothing else is logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from prolonged_arms import ARMS, BETA, GROUP, PROMPTS


def batch_flops(
    parameters: int, sampled: float, kept: float, tokens: float, reference: bool, teacher: int | None = None
) -> float:
    """Of one batch.

    Args:
        parameters: N.
        sampled: Responses that were sampled.
        kept: Responses that were trained on.
        tokens: Mean length of a response with its prompt.
        reference: Whether a reference grades them.
        teacher: N_t; then this is a batch of distillation, one optimizer step, and needs no earlier probabilities.
    """
    graded = 2.0 * teacher if teacher is not None else 2.0 * parameters * (2 if reference else 1)
    return tokens * (2.0 * parameters * sampled + (graded + 6.0 * parameters) * kept)


def cumulative(record: Mapping[str, Any], teacher: int | None = None) -> list[tuple[int, float]]:
    """(batches, FLOPs so far) at the end of each window of a record.

    Args:
        record: Of a run.
        teacher: Parameters of the teacher, for distillation.
    """
    windows: Sequence[Mapping[str, float]] = record["windows"]
    model = record["model"]
    reference = beta(record["arm"]) > 0
    costs = []
    for w in windows:
        kept = (PROMPTS - w.get("missing", 0.0)) * GROUP
        sampled = w.get("sampled_groups", PROMPTS) * GROUP
        tokens = model["prompt_tokens"] + w["length"]
        one = batch_flops(model["parameters"], sampled, kept, tokens, reference, teacher)
        costs.append(one * w["batches"])
    return list(zip((int(w["batch"]) for w in windows), accumulate(costs), strict=True))


def beta(name: str) -> float:
    """KL coefficient of an arm."""
    return float(ARMS[name].flags.get("model.init_args.kl", {"coef": BETA})["coef"])


def attention_share(layers: int, width: int, tokens: float, parameters: int) -> float:
    """What attention's scores and sums would add to a forward pass, relative to 2 N per token.

    Per token and layer, 2 · width operations per position for the scores and as many for the sum, over half the
    context on average.
    """
    return layers * 4 * width * (tokens / 2) / (2 * parameters)
