"""DPO: the loss by hand, ln 2 at the start, micro-batches that never show, and who is refused."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

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
from lightning_onpolicy.modules.outcome import Counts
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


class Said(torch.nn.Module):
    """A policy of which only the log-probabilities are given, in place of a model."""

    def __init__(self, *logp: float) -> None:
        super().__init__()
        self.logp = torch.nn.Parameter(torch.tensor(logp))

    def forward(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(logp=self.logp, entropy=torch.zeros_like(self.logp))


def test_two_rows_by_hand() -> None:
    """log π: −1, −0.5, −0.25 against −2, −0.5; log ref: −1.5, −0.5, −0.5 against −1.5, −0.25; β = 0.4.

    Δ = 0.4 · ((−1.75 + 2.5) − (−2.5 + 1.75)) = 0.6; the loss is log(1 + e^−0.6), its gradient ∓ 0.4 / (1 + e^0.6) for
    every token. Catches: means over tokens, which give Δ = 0.25.
    """
    prompt = Prompt((1,), "t1", {"chosen": "t1 t2", "rejected": "t3"}, "p")
    batch = preference_rows([prompt], TOKENIZER, "chosen", "rejected", None)
    ref_BT = torch.tensor([[0.0, -1.5, -0.5, -0.5], [0.0, -1.5, -0.25, 0.0]])
    module = PreferenceTune(toys.policy(0), beta=0.4)
    said = Said(-1.0, -0.5, -0.25, -2.0, -0.5)
    module.policy = said  # type: ignore[assignment]
    out = module.loss(batch.with_extra(logp_ref=ref_BT), Counts(tokens=5, sequences=2, compared=1))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.6)), rel=1e-6)
    share = 0.4 / (1 + math.exp(0.6))
    assert said.logp.grad is not None
    torch.testing.assert_close(said.logp.grad, share * torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0]))
    assert out.means["margin"].tolist() == pytest.approx([0.6]) and out.means["accuracy"].tolist() == [1.0]
    assert out.means["nll"].tolist() == [1.0, 0.5, 0.25], "of the preferred side"


def test_the_reference_is_where_the_policy_started() -> None:
    """Catches: a reference that follows the policy, or is trained with it."""
    module, spy = tune(), Spy()
    start = toys.policy(0, scale=2.0).state_dict()
    run = fit(module, [pairs()] * 4, spy)
    assert module.reference is not None and not any(p.requires_grad for p in module.reference.parameters())
    trained = {id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.policy.parameters()}
    batch = pairs()
    again = PreferenceTune(toys.policy(0, scale=2.0), beta=BETA)
    again.configure_model()
    assert again.reference is not None
    told, kept = (
        m.reference.logp(m.policy, batch.input_ids, batch.response_mask, 1.0)  # type: ignore[union-attr]
        for m in (again, module)
    )
    assert torch.equal(told, kept)
    moved = [
        name for name, value in module.policy.state_dict().items() if not torch.equal(value, start[name])
    ]
    assert moved
    margins = [metrics["train/margin"] for metrics in spy.metrics]
    assert margins[0] == 0 and margins == sorted(margins) and margins[-1] > 0.01


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_neither_padding_nor_order_shows(order: list[int]) -> None:
    """Columns of padding, with ids that mean something, and prompts in another order. Catches: a sum over padding."""
    batch = pairs()
    rows = [i for number in order for i, group in enumerate(batch.group.tolist()) if group == number]
    wide = padded(batch.select(rows), 5)
    assert wide.input_ids.shape[1] == batch.input_ids.shape[1] + 5
    plain, other = tune(), tune()
    seen, found = Spy(), Spy()
    fit(plain, [batch, batch], seen)
    fit(other, [wide, wide], found)
    for a, b in zip(seen.metrics, found.metrics, strict=True):
        for name in ("train/loss", "train/margin", "train/accuracy", "train/nll", "train/grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-7), name
    for name, value in plain.policy.state_dict().items():
        torch.testing.assert_close(other.policy.state_dict()[name], value, atol=2e-6, rtol=2e-5, msg=name)


def padded(batch: RolloutBatch, columns: int) -> RolloutBatch:
    """More columns on the right: masks are False there, ids are t3's."""

    def wider(value_BT: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(value_BT, (0, columns), value=fill)

    return dataclasses.replace(
        batch,
        input_ids=torch.where(wider(batch.attention_mask, False), wider(batch.input_ids, 3), torch.tensor(3)),
        attention_mask=wider(batch.attention_mask, False),
        response_mask=wider(batch.response_mask, False),
        sampler_logprobs=wider(batch.sampler_logprobs, 0.0),
    )
