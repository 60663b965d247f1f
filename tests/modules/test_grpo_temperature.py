"""ProRLGRPO grades at the temperature each batch was sampled with, through stages, resets and resumed runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import anchored
import pytest
import torch
import toys
from anchored import Saving
from torch import Tensor

from lightning_onpolicy.callbacks.resets import OptimizerReset, ReferenceReset
from lightning_onpolicy.callbacks.stages import StageSchedule
from lightning_onpolicy.callbacks.triggers import EveryNSteps
from lightning_onpolicy.datamodules.batch import RolloutBatch, Sampling
from lightning_onpolicy.datamodules.dynamic import DynamicSampling
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.rewards.function import FunctionReward
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.losses.rows import gather
from lightning_onpolicy.modules.losses.settings import EntropySpec, KLSpec
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.sampled import temperature_of

TAU = 0.6


def mixed(**sampling: Any) -> RolloutBatch:
    """Toy rollouts; the last two rows are somebody else's."""
    batch = toys.batch(0, groups=4, size=4)
    own = torch.arange(len(batch)) < len(batch) - 2
    how = Sampling(**sampling)
    logmu = torch.where(own[:, None], batch.sampler_logprobs, float("nan"))
    return dataclasses.replace(batch, on_policy=own, sampler_logprobs=logmu, sampling=how)


def test_tokens_are_graded_as_they_were_drawn_and_others_at_one() -> None:
    batch = mixed(temperature=TAU)
    own = batch.select(range(4))
    assert temperature_of(own) == TAU
    per_token = temperature_of(batch)
    assert isinstance(per_token, Tensor)
    sizes = batch.response_mask[:, 1:].sum(1)
    at = torch.where(batch.on_policy, TAU, 1.0)
    assert torch.equal(per_token, torch.cat([t.expand(int(n)) for t, n in zip(at, sizes, strict=True)]))
    assert temperature_of(mixed()) == 1.0
    others = batch.select([len(batch) - 1])
    assert temperature_of(others) == 1.0
    assert temperature_of(dataclasses.replace(others, sampling=None)) == 1.0


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (None, r"batch\.sampling is None"),
        (Sampling(temperature=0.0), "greedy decoding draws nothing"),
        (Sampling(top_p=0.9), "top_p"),
        (Sampling(min_new_tokens=2), "min_new_tokens"),
    ],
)
def test_a_batch_without_a_right_temperature_is_refused(sampling: Sampling | None, message: str) -> None:
    """Catches: temperature 1 taken for granted, a division by 0, log-probabilities of another distribution."""
    module = ProRLGRPO(toys.policy(0), "dapo")
    module.configure_model()
    for batch in (toys.batch(0), mixed()):
        with pytest.raises(ValueError, match=message):
            module.prepare(dataclasses.replace(batch, sampling=sampling))


def test_the_gradient_is_that_of_the_distribution_sampled_from() -> None:
    """Own rows at the sampling temperature, supervised ones at 1, against plain logits.

    Catches: a temperature that reaches some forward passes only, or one for all rows.
    """
    batch = mixed(temperature=TAU)
    module = ProRLGRPO(
        toys.policy(0, scale=2.0),
        "dapo",
        positive_nll=1.0,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        loop=LoopSpec(minibatches=1, max_grad_norm=None, micro_batch_tokens=40),
    )
    before = {k: v.clone() for k, v in module.policy.state_dict().items()}
    anchored.trainer([]).fit(module, torch.utils.data.DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    model = toys.llama(0, scale=2.0)
    logits = model(batch.input_ids).logits[..., :24]
    at = torch.where(batch.on_policy, TAU, 1.0)[:, None, None]
    logp = (logits / at).log_softmax(-1)[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    score = torch.zeros(len(batch))
    for group in batch.group.unique():
        rows = (batch.group == group) & batch.on_policy
        reward = batch.rewards[rows]
        score[rows] = (reward - reward.mean()) / reward.std()
    score = torch.where(batch.on_policy, score, 1.0)
    mask = batch.response_mask[:, 1:]
    (-(score[:, None] * logp)[mask].sum() / mask.sum()).backward()
    for name, p in model.named_parameters():
        moved = (module.policy.state_dict()[f"model.{name}"] - before[f"model.{name}"]) / -0.5
        torch.testing.assert_close(moved, p.grad, rtol=2e-3, atol=2e-5, msg=name)


# -- staged --------------------------------------------------------------------------------------------

STAGES: list[dict[str, Any]] = [
    {"at": 0, "temperature": 1.2},
    {"at": "reset:1", "temperature": 0.7, "group_size": 3},
    {"at": 8, "temperature": 1.5, "group_size": 4},
]
TEMPERATURES = [1.2, 1.2, 0.7, 0.7, 1.5, 1.5]  # two optimizer steps per batch, a reset every four


def staged(*callbacks: Any, **options: Any) -> tuple[ProRLGRPO, list[dict[str, Any]]]:
    """The trained module, and what each batch and its grades were."""
    seen: list[dict[str, Any]] = []

    class Look(anchored.pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            batch, metrics = outputs["batch"], outputs["metrics"]
            mask = batch.response_mask
            old, ref = (gather(batch.extra[k], mask) for k in ("logp_old", "logp_ref"))
            seen.append(
                {
                    "temperature": batch.sampling.temperature,
                    "gap": float((old - gather(batch.sampler_logprobs, mask)).abs().max()),
                    "kl": float((old - ref).abs().max()),
                    "ratio": metrics["train/mismatch_ratio"],
                    "log_ratio": metrics["train/mismatch_max_log_ratio"],
                    "moved": abs(metrics["train/ratio_max"] - 1),
                    "carried": metrics["train/groups/carried"],
                }
            )

    torch.manual_seed(0)
    module = ProRLGRPO(
        toys.policy(0, scale=3.0),
        "prorl_v1",
        kl=KLSpec(0.05),
        entropy=EntropySpec(bonus=0.01),
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3),
        loop=LoopSpec(minibatches=2),
    )
    data = OnPolicyDataModule(
        train=[{"prompt": f"t{i}", "uid": f"p{i}"} for i in range(6)],
        prompts_per_batch=4,
        group_size=4,
        steps_per_epoch=6,
        sampling=Sampling(max_new_tokens=5),
        rewards={"even": FunctionReward(lambda prompt, text: float(len(text) % 2))},
        dynamic_sampling=DynamicSampling(max_rounds=3),
    )
    resets = [ReferenceReset(EveryNSteps(4)), OptimizerReset()]
    trainer = anchored.trainer([*resets, StageSchedule(STAGES), Look(), *callbacks])
    trainer.fit(module, datamodule=data, **options)
    return module, seen


def test_stages_that_change_the_temperature_stay_on_policy() -> None:
    """Catches: a temperature that the engine, the policy, its old self or the reference missed at a switch."""
    _, seen = staged()
    assert [batch["temperature"] for batch in seen] == TEMPERATURES
    for batch in seen:
        assert batch["gap"] < 1e-4
        assert batch["log_ratio"] < 1e-4
        assert batch["ratio"] == pytest.approx(1, abs=1e-4)
        assert batch["moved"] > 1e-3  # the second minibatch is past an update: the test is no tautology
    fresh = [batch["kl"] == 0 for batch in seen]
    assert fresh == [True, False] * 3  # exactly 0 at the start and after each reset


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_a_staged_run_resumes_bit_for_bit(tmp_path: Path, step: int) -> None:
    """Before a reset, at it, before a switch, at it. Catches: a first batch at the configured temperature."""
    whole, seen = staged(Saving(tmp_path / "a.ckpt", step))
    again, rest = staged(ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert rest == seen[step // 2 :]
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
