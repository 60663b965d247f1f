"""The distribution a policy gradient is about: the one its tokens were drawn from.

A batch says how it was sampled (``batch.sampling``), so a temperature that changes from stage to stage is followed and
nowhere said twice. Legend: ``N`` trained tokens in row-major order of ``response_mask[:, 1:]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.losses.rows import spread


def temperature_of(batch: RolloutBatch) -> float | Tensor:
    """The temperature at which the batch's tokens are graded, ``[N]`` where rows differ.

    It is the sampling temperature, and 1 on rows the policy did not sample: their likelihood is the model's own.

    Raises:
        ValueError: If rows the policy sampled were drawn greedily, from a truncated distribution, or nobody knows how.
    """
    own_B = batch.on_policy
    if not bool(own_B.any()):
        return 1.0
    how = batch.sampling
    if how is None:
        raise ValueError(
            "batch.sampling is None, so nobody knows at which temperature the policy sampled its rows, and a policy "
            "gradient at another would be wrong: say it, e.g. collate(…, sampling=Sampling(temperature=1.0))."
        )
    if how.temperature == 0:
        raise ValueError(
            "sampling.temperature is 0: greedy decoding draws nothing, so there is no distribution whose policy "
            "gradient could be taken, and all completions of a prompt are one. Set it above 0."
        )
    if how.truncates:
        raise ValueError(
            "top_p, top_k, min_p and min_new_tokens take tokens out of the sampler's distribution, which the "
            "policy's log-probabilities do not: leave them at their defaults."
        )
    if how.temperature == 1 or bool(own_B.all()):
        return how.temperature
    return torch.where(spread(own_B, batch.response_mask), how.temperature, 1.0)
