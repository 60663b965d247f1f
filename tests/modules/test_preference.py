"""DPO: the loss by hand, ln 2 at the start, micro-batches that never show, and who is refused."""

from __future__ import annotations

import math

import pytest
import torch
import toys
from duels import TOKENIZER, Spy, duel_batch, fit
from torch.nn.functional import logsigmoid

from lightning_onpolicy.datamodules.batch import Prompt, RolloutBatch
from lightning_onpolicy.datamodules.judged import PREFERRED
from lightning_onpolicy.datamodules.preferences import preference_rows
from lightning_onpolicy.modules import PreferenceTune
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.policy import Policy

ROWS = [
    {"chosen": "t1 t2", "rejected": "t3"},
    {"chosen": ["t4", "t5 t6 t7"], "rejected": "t8 t9"},
    {"chosen": "t10", "rejected": ["t11 t12 t13", "t14"]},
]
BETA = 0.3


def pairs() -> RolloutBatch:
    prompts = [Prompt((i, i + 1), f"t{i} t{i + 1}", row, f"p{i}") for i, row in enumerate(ROWS)]
    return preference_rows(prompts, TOKENIZER, "chosen", "rejected", None)


def tune(smoothing: float = 0.0, budget: int = 4096) -> PreferenceTune:
    return PreferenceTune(
        toys.policy(0, scale=2.0),
        beta=BETA,
        smoothing=smoothing,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2),
        loop=LoopSpec(micro_batch_tokens=budget, max_grad_norm=None),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_dpos(smoothing: float) -> None:
    """2305.18290, eq. 7, and its conservative form; each pair of a prompt, each losing row once. Catches: a mean over
    tokens in place of a row's sum, sides or policy and reference swapped, a prompt token in it."""
    batch, spy = pairs(), Spy()
    module = tune(smoothing)
    fit(module, [batch, batch], spy)
    assert spy.metrics[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert spy.metrics[0]["train/accuracy"] == 0.5 and spy.metrics[0]["train/margin"] == 0.0

    reference = tune()
    reference.configure_model()
    stepped = tune(smoothing)
    fit(stepped, [batch])  # what the second batch met

    def logp(policy: Policy, i: int) -> torch.Tensor:
        ids, mask = batch.input_ids[i : i + 1], batch.response_mask[i : i + 1]
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[..., : len(TOKENIZER)].log_softmax(-1)
        return torch.as_tensor(sum(logits[0, t - 1, ids[0, t]] for t in mask[0].nonzero()[:, 0].tolist()))

    reward = [BETA * (logp(stepped.policy, i) - logp(reference.policy, i)) for i in range(len(batch))]
    preferred, group = batch.extra[PREFERRED].tolist(), batch.group.tolist()
    rows = []
    for loser in [i for i, good in enumerate(preferred) if not good]:
        winners = [i for i, good in enumerate(preferred) if good and group[i] == group[loser]]
        gaps = torch.stack([reward[i] - reward[loser] for i in winners])
        rows.append((-(1 - smoothing) * logsigmoid(gaps) - smoothing * logsigmoid(-gaps)).mean())
    expected = float(torch.stack(rows).mean())
    assert expected < math.log(2) - 0.01
    assert spy.metrics[1]["train/loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("budget", [1, 20, 30])
def test_no_micro_batch_shows(budget: int) -> None:
    """Catches: a group that is parted, a mean per micro-batch."""
    cut, whole = tune(budget=budget), tune()
    for module in (cut, whole):
        fit(module, [pairs(), pairs()])
    start = tune()
    start.configure_model()
    for name, value in whole.policy.state_dict().items():
        torch.testing.assert_close(cut.policy.state_dict()[name], value, atol=2e-6, rtol=2e-5, msg=name)
    moved = [a - b for a, b in zip(whole.policy.parameters(), start.policy.parameters(), strict=True)]
    assert max(float(x.detach().abs().max()) for x in moved) > 1e-3


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="use PreferenceDataModule"):
        fit(tune(), [duel_batch(1)])
    with pytest.raises(ValueError, match="beta must be > 0"):
        PreferenceTune(toys.policy(0), beta=0.0)
    with pytest.raises(ValueError, match=r"smoothing in \[0, 0\.5\)"):
        PreferenceTune(toys.policy(0), smoothing=0.5)
