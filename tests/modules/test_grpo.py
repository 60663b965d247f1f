"""ProRLGRPO in the shared loop: what it computes, what it leaves out, its reference, and that rewards rise.

Legend: ``B`` sequences, ``T`` positions.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import toys
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_onpolicy.datamodules.batch import RolloutBatch, Sampling
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.rewards.function import FunctionReward
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.losses.settings import (
    AdvantageSpec,
    CorrectionSpec,
    EntropySpec,
    KLSpec,
    SurrogateSpec,
)
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.references import AdapterCopy, PolicyCopy
from lightning_onpolicy.modules.specs import LoraSpec

NAN = float("nan")
FREE = LoopSpec(minibatches=1, max_grad_norm=None)
EVERYTHING: dict[str, Any] = {
    "advantage": AdvantageSpec("reinforce_pp_baseline", whiten="token"),
    "surrogate": SurrogateSpec("clip", low=0.02, high=0.04, dual=3.0),
    "kl": KLSpec(0.1, gradient="reverse", clamp=10.0, importance=True),
    "correction": CorrectionSpec("tis", high=1.5),
    "entropy": EntropySpec(bonus=0.01, covariance="kl_cov", share=0.1),
    "positive_nll": 0.1,
}


def grpo(policy: Any = None, **settings: Any) -> ProRLGRPO:
    base: dict[str, Any] = {"recipe": "dapo", "loop": FREE, "optimizer": lambda p: torch.optim.SGD(p, lr=0.5)}
    return ProRLGRPO(policy or toys.policy(0, scale=2.0), **{**base, **settings})


def trainer(**settings: Any) -> pl.Trainer:
    base: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**base, **settings})


def fit(module: pl.LightningModule, batches: list[RolloutBatch], **settings: Any) -> dict[str, float]:
    run = trainer(**settings)
    run.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    return {k: float(v) for k, v in run.callback_metrics.items()}


def sampled(seed: int = 0, **settings: Any) -> RolloutBatch:
    """Toy rollouts whose sampler is the policy that :func:`grpo` starts from, up to noise."""
    batch = toys.batch(seed, **{"groups": 4, "size": 4, **settings})
    policy = toys.policy(0, scale=2.0)
    with torch.no_grad():
        stats = policy(batch.input_ids, batch.response_mask)
    logmu = torch.zeros_like(batch.sampler_logprobs)
    logmu[:, 1:] = logmu[:, 1:].masked_scatter(batch.response_mask[:, 1:], stats.logp)
    return dataclasses.replace(batch, sampler_logprobs=logmu)


def weights(module: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.policy.state_dict().items()}


def adapted() -> Policy:
    """A policy with adapters that do something."""
    policy = Policy(toys.llama(0, tie=False, scale=2.0), toys.tokenizer(), lora=LoraSpec(r=2))
    torch.manual_seed(3)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return policy


def test_one_update_is_the_policy_gradient_of_plain_logits() -> None:
    """SGD's move is −lr · ∇[−Σ A log p / N] with hand-made z-scores. Catches: a shift, a sign, another denominator."""
    batch = sampled()
    module = grpo()
    before = weights(module)
    metrics = fit(module, [batch])
    model = toys.llama(0, scale=2.0)
    logp = model(batch.input_ids).logits[..., :24].log_softmax(-1)
    logp = logp[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    reward = batch.rewards.view(4, 4)
    z = ((reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True)).view(-1)
    mask = batch.response_mask[:, 1:]
    oracle = -(z[:, None] * logp)[mask].sum() / mask.sum()
    oracle.backward()
    moved = {k: (v - before[k]) / -0.5 for k, v in weights(module).items()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(moved[f"model.{name}"], p.grad, rtol=2e-3, atol=2e-5, msg=name)
    assert metrics["train/ratio"] == metrics["train/ratio_max"] == 1
    assert metrics["train/mismatch_max_log_ratio"] < 1e-5


def test_the_cut_into_micro_batches_never_shows() -> None:
    """With every term on, over two updates of two minibatches. Catches: a count, mean or share of a micro-batch."""
    results = []
    for budget in (12, 40, 100_000):
        loop = LoopSpec(updates=2, minibatches=2, micro_batch_tokens=budget, max_grad_norm=None)
        module = grpo(loop=loop, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **EVERYTHING)
        results.append((fit(module, [sampled(3), sampled(4)]), weights(module)))
    assert results[0][0]["train/clip_high"] > 0
    assert results[0][0]["train/kl_ref_k3"] > 0
    for metrics, state in results[1:]:
        for name, value in state.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-4, atol=1e-5)
        for name, number in metrics.items():
            assert number == pytest.approx(results[0][0][name], rel=1e-3, abs=1e-5), name


def test_old_log_probabilities_are_computed_only_when_something_needs_them() -> None:
    """Catches: a forward pass too many with one update; the current policy as its own old one with several."""
    seen: list[RolloutBatch] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            seen.append(outputs["batch"])

    for settings in (
        {},
        {"correction": CorrectionSpec("icepop")},
        {"loop": LoopSpec(minibatches=2)},
        {"loop": LoopSpec(minibatches=1, updates=2)},
        {"entropy": EntropySpec(covariance="clip_cov")},
        {"kl": KLSpec(0.1, place="reward")},
    ):
        fit(grpo(**settings), [sampled()], callbacks=[Spy()])
    assert ["logp_old" in batch.extra for batch in seen] == [False, False, True, True, True, True]
    torch.testing.assert_close(seen[2].extra["logp_old"], sampled().sampler_logprobs, rtol=0, atol=1e-4)
    assert ["logp_ref" in batch.extra for batch in seen] == [False] * 5 + [True]


def test_corrections_weigh_the_policy_against_the_sampler() -> None:
    """A sampler half as sure of every token: w = 2. Catches: log μ never reaching the loss."""
    batch = sampled()
    shifted = torch.where(batch.response_mask, batch.sampler_logprobs - math.log(2), 0.0)
    stale = dataclasses.replace(batch, sampler_logprobs=shifted)
    start, moved = weights(grpo()), {}
    for name, spec in {
        "plain": CorrectionSpec(),
        "tis": CorrectionSpec("tis", high=1.5),
        "icepop": CorrectionSpec("icepop", high=1.5),
    }.items():
        module = grpo(correction=spec)
        metrics = fit(module, [stale])
        moved[name] = {k: v - start[k] for k, v in weights(module).items()}
        assert metrics.get(f"train/weight_{'truncated' if name == 'tis' else 'masked'}", 1.0) == 1
    for name, value in moved["plain"].items():
        torch.testing.assert_close(moved["tis"][name], 1.5 * value, rtol=1e-3, atol=1e-5)
        assert torch.equal(moved["icepop"][name], torch.zeros_like(value))
    assert max(float(v.abs().max()) for v in moved["plain"].values()) > 1e-2


def test_several_updates_move_the_ratio_and_meet_the_clip() -> None:
    metrics = fit(grpo(loop=LoopSpec(minibatches=1, updates=4, max_grad_norm=None)), [sampled()])
    assert metrics["train/ratio_max"] > 1.28
    assert metrics["train/clip_high"] > 0


def test_rows_that_could_not_be_scored_teach_nothing() -> None:
    """Catches: NaN as 0, NaN in the loss; constant groups and pass rate in the metrics."""
    batch = sampled()
    reward = torch.tensor([1.0, 0, NAN, 1] + [1.0] * 4 + [0.0] * 4 + [NAN] * 4)
    dirty = dataclasses.replace(batch, rewards=reward)
    module = grpo()
    metrics = fit(module, [dirty])
    assert metrics["train/constant_groups"] == pytest.approx(2 / 3)
    assert metrics["train/solved_groups"] == pytest.approx(1 / 3)
    assert metrics["train/pass_rate"] == pytest.approx(6 / 11)
    assert metrics["train/scored"] == pytest.approx(11 / 16)
    rows = [0, 1, 3]
    other = grpo()
    fit(other, [dataclasses.replace(batch, rewards=reward).select(rows)])
    scale = int(batch.response_mask.sum()) / int(batch.select(rows).response_mask.sum())
    start = weights(grpo())
    for name, value in weights(module).items():
        moved = (value - start[name]) * scale
        torch.testing.assert_close(weights(other)[name] - start[name], moved, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="not one response of the batch has a reward"):
        fit(grpo(), [dataclasses.replace(batch, rewards=torch.full((16,), NAN))])


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_a_copy_that_a_reset_moves(lora: bool) -> None:
    """KL 0, drift, KL > 0, reset, KL exactly 0. Catches: shared storage, adapters off for a copy of adapters."""
    policy = adapted() if lora else toys.policy(0, scale=2.0)
    module = grpo(policy, kl=KLSpec(0.1), optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
    module.configure_model()
    assert isinstance(module.reference, AdapterCopy if lora else PolicyCopy)
    trained = {k for k, p in module.policy.named_parameters() if p.requires_grad}
    assert trained <= set(module.reference.state_dict())
    assert not any(p.requires_grad for p in module.reference.parameters())
    if lora:
        assert set(module.reference.state_dict()) == trained
    batch = sampled()

    def distance() -> float:
        assert module.reference is not None
        own = module.policy(batch.input_ids, batch.response_mask).logp
        ref = module.reference.logp(module.policy, batch.input_ids, batch.response_mask, 1.0)
        return float((own - ref).detach().abs().max())

    start = weights(module)
    assert distance() == 0
    assert fit(module, [batch])["train/kl_ref_k3"] == pytest.approx(0, abs=1e-9)
    assert distance() > 1e-3
    moved = weights(module)
    module.reset_reference()
    assert distance() == 0
    for name, value in moved.items():
        assert torch.equal(weights(module)[name], value), name
    with torch.no_grad():
        for p in module.policy.parameters():
            if p.requires_grad:
                p.add_(0.01)
    assert distance() > 1e-4, "storage is shared"
    module.policy.load_state_dict(moved)
    module.reset_reference({k: v for k, v in start.items() if not lora or k in trained})
    before = distance()
    module.policy.load_state_dict(start)
    assert before > 1e-3
    assert distance() == 0


def test_an_adapter_reference_gives_the_policy_its_own_back_bit_for_bit() -> None:
    """Also its mode, also after an exception. Catches: adapters left lent, a policy left in eval mode."""
    module = grpo(adapted(), kl=KLSpec(0.1))
    module.configure_model()
    fit(module, [sampled()])
    before = weights(module)
    module.policy.train()
    assert module.reference is not None
    with pytest.raises(IndexError):
        module.reference.logp(module.policy, torch.full((1, 3), 99), torch.ones(1, 3, dtype=torch.bool), 1.0)
    assert module.policy.training
    for name, value in weights(module).items():
        assert torch.equal(value, before[name])
    assert isinstance(module.reference, AdapterCopy)
    with pytest.raises(KeyError, match="lacks"):
        module.reset_reference({})


def test_without_a_kl_there_is_no_reference() -> None:
    module = grpo()
    module.configure_model()
    assert module.reference is None
    assert all(name.startswith("policy.") for name in module.state_dict())
    with pytest.raises(ValueError, match=r"kl\.coef is 0"):
        module.reset_reference()


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, lora: bool) -> None:
    """Reference and entropy coefficient included. Catches: a reference reloaded from the base, a controller at 0."""

    def module() -> ProRLGRPO:
        policy = adapted() if lora else toys.policy(0, scale=2.0)
        return grpo(
            policy,
            kl=KLSpec(0.5),
            entropy=EntropySpec(target=9.0, step=0.01),
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        )

    class ResetAt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                module.reset_reference()

    batches = [sampled(i) for i in range(4)]
    whole = module()
    fit(whole, batches, callbacks=[ResetAt()])
    first = module()
    run = trainer(callbacks=[ResetAt()], max_epochs=1)
    run.fit(first, train_dataloaders=DataLoader(batches[:3], batch_size=None))
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert any(name.startswith("reference.") for name in saved["state_dict"])
    assert any(saved["optimizer_states"])
    second = module()
    run = trainer(max_epochs=2)
    run.fit(second, train_dataloaders=DataLoader(batches[3:], batch_size=None), ckpt_path=tmp_path / "a.ckpt")
    assert second.entropy_control.state_dict() == whole.entropy_control.state_dict()
    assert second.entropy_control.coef == pytest.approx(0.04)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_rows_of_others_have_a_supervised_loss_alone() -> None:
    """Hybrid RL and supervision. Catches: an advantage or a KL on rows the policy did not sample."""
    batch = sampled()
    own = torch.tensor([True] * 12 + [False] * 4)
    mixed = dataclasses.replace(
        batch,
        on_policy=own,
        sampler_logprobs=torch.where(own[:, None], batch.sampler_logprobs, NAN),
        rewards=torch.where(own, torch.zeros(16), 1.0),
    )
    module = grpo(positive_nll=1.0, kl=KLSpec(1.0), correction=CorrectionSpec("icepop"))
    start = weights(module)
    fit(module, [mixed])
    model = toys.llama(0, scale=2.0)
    logp = model(batch.input_ids).logits[..., :24].log_softmax(-1)
    logp = logp[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    mask = batch.response_mask[:, 1:]
    (-(logp * mask)[12:].sum() / mask.sum()).backward()
    for name, p in model.named_parameters():
        moved = (weights(module)[f"model.{name}"] - start[f"model.{name}"]) / -0.5
        torch.testing.assert_close(moved, p.grad, rtol=2e-3, atol=2e-5, msg=name)
    with pytest.raises(ValueError, match="set positive_nll"):
        fit(grpo(), [mixed])


@pytest.mark.parametrize("right", [True, False])
def test_a_shaped_reward_does_not_say_what_is_correct(right: bool) -> None:
    """Equal shaped rewards have no advantage: what moves the policy is the likelihood of correct responses."""
    batch = sampled()
    task = torch.full((16,), float(right))
    shaped = dataclasses.replace(batch, rewards=torch.full((16,), 0.5), reward_parts={"task": task})
    module = grpo(positive_nll=1.0, kl=KLSpec(0.0))
    start = weights(module)
    metrics = fit(module, [shaped])
    assert metrics["train/pass_rate"] == float(right)
    assert any(not torch.equal(value, start[name]) for name, value in weights(module).items()) is right


def test_groups_of_one_are_refused_and_a_batch_that_teaches_nothing_is_said(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Catches: a whole run of loss 0 that ends with exit code 0 and an export."""
    with pytest.raises(
        ValueError, match=r"every group of the batch has one response.*group_size to 2 or more"
    ):
        fit(grpo(), [toys.batch(0, groups=4, size=1)])
    same = dataclasses.replace(sampled(), rewards=torch.ones(16))
    module = grpo(kl=KLSpec(0.1))
    fit(module, [same, same])
    said = [str(w.message) for w in recwarn if "nothing is learnt" in str(w.message)]
    assert len(said) == 1 and "step 0" in said[0]


def test_one_reward_may_say_what_is_correct() -> None:
    """Catches: the format's point that makes a wrong response a right one, and an example to imitate."""
    batch = sampled()
    accuracy = torch.tensor([0.0, 1.0]).repeat(8)
    formed = dataclasses.replace(batch, rewards=accuracy + 1.0, reward_parts={"accuracy": accuracy})
    rates = [fit(grpo(correct=name), [formed])["train/pass_rate"] for name in (None, "accuracy")]
    assert rates == [1.0, 0.5]
    with pytest.raises(
        ValueError, match=r"correct names 'right'; the rewards of the batch are \['accuracy'\]"
    ):
        fit(grpo(correct="right"), [formed])


def test_settings_come_from_the_recipe_unless_given() -> None:
    module = ProRLGRPO(toys.policy(0), "prorl_v1", surrogate=SurrogateSpec("cispo"))
    assert module.kl == KLSpec(1e-4, gradient="forward")
    assert module.objective.surrogate == SurrogateSpec("cispo")
    assert (module.loop.minibatches, module.reduction) == (4, "token_mean")
    assert ProRLGRPO(toys.policy(0), "dapo", loop=LoopSpec(micro_batch_tokens=8)).loop.minibatches == 16
    module.configure_model()
    assert module.configure_optimizers().param_groups[0]["lr"] == 2e-6
    constant = ProRLGRPO(toys.policy(0), "dr_grpo")
    assert (constant.reduction, constant.reduction_length) == ("constant", 3000)
    again = ProRLGRPO(toys.policy(0), "dr_grpo", reduction="token_mean")
    assert again.reduction_length is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "ppo"}, "recipe must be one of"),
        ({"reduction": "constant"}, "reduction_length"),
        ({"reduction_length": 5}, "reduction_length"),
        ({"positive_nll": -1.0}, "positive_nll"),
    ],
)
def test_settings_out_of_range_are_refused_by_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo(**settings)


def bandit(prompt: Any, text: str) -> float:
    """The share of words that are t3."""
    words = text.split()
    return sum(word == "t3" for word in words) / max(1, len(words))


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "prorl_v1", "loop": LoopSpec(minibatches=2)},
        {"recipe": "prorl_v2", "loop": LoopSpec(updates=2, minibatches=2)},
        {"recipe": "dr_grpo", "reduction_length": 4},
        {"recipe": "grpo", "surrogate": SurrogateSpec("gspo"), "loop": LoopSpec(minibatches=2)},
        {"recipe": "dapo", "surrogate": SurrogateSpec("cispo"), "advantage": AdvantageSpec("leave_one_out")},
    ],
    ids=["prorl_v1", "prorl_v2", "dr_grpo", "gspo", "cispo_rloo"],
)
def test_the_reward_of_a_bandit_rises_within_seconds(settings: dict[str, Any]) -> None:
    """From chance (about 1/24) to more than half. Catches: pieces right alone, wrong together."""
    pl.seed_everything(0, verbose=False)
    module = ProRLGRPO(toys.policy(0), **{"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), **settings})
    data = OnPolicyDataModule(
        train=[{"prompt": f"t{i}", "uid": f"p{i}"} for i in range(4)],
        prompts_per_batch=4,
        group_size=16,
        steps_per_epoch=20,
        sampling=Sampling(max_new_tokens=4),
        rewards={"share": FunctionReward(bandit)},
    )
    rewards: list[float] = []

    class Curve(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            rewards.append(outputs["metrics"]["train/reward"])

    trainer(callbacks=[Curve()], num_sanity_val_steps=0).fit(module, datamodule=data)
    assert rewards[0] < 0.15
    assert sum(rewards[-3:]) / 3 > 0.5
