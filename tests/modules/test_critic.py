"""PPO in ProRLGRPO: what the critic learns, what flows to whom, and that cuts, padding and resumption never show.

Legend: ``B`` sequences, ``T`` positions. ``R(t)`` is the reward to go of a token.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import ranks_ppo
import torch
import toys
from launching import on_two_ranks
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_onpolicy.callbacks.resets import OptimizerReset
from lightning_onpolicy.callbacks.triggers import EveryNSteps
from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, Sampling, collate
from lightning_onpolicy.modules.critic import CriticSpec
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.losses.critic import gae
from lightning_onpolicy.modules.losses.settings import AdvantageSpec, KLSpec, SurrogateSpec
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.policy import LoraSpec, ModelSpec
from lightning_onpolicy.modules.scalar import ScalarModel

NAN = float("nan")
EVERYTHING: dict[str, Any] = {
    "advantage": AdvantageSpec("gae", gamma=0.95, lam=0.9, whiten="token"),
    "critic": CriticSpec(clip=0.02, updates=3, minibatches=2, bootstrap="value"),
    "kl": KLSpec(0.1, place="reward"),
}


def ppo(policy: Any = None, **settings: Any) -> ProRLGRPO:
    base: dict[str, Any] = {
        "recipe": "dapo",
        "advantage": AdvantageSpec("gae"),
        "loop": LoopSpec(minibatches=1, max_grad_norm=None),
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.5),
        "critic_optimizer": lambda p: torch.optim.SGD(p, lr=0.005),
    }
    return ProRLGRPO(policy or toys.policy(0, scale=2.0), **{**base, **settings})


def adamw(lr: float) -> Any:
    return lambda params: torch.optim.AdamW(params, lr=lr)


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


def rollouts(seed: int = 0, **settings: Any) -> RolloutBatch:
    """Toy rollouts of which every third was cut."""
    batch = toys.batch(seed, **{"groups": 4, "size": 4, **settings})
    return dataclasses.replace(batch, finished=torch.arange(len(batch)) % 3 != 0)


def state(module: Any, player: str) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in getattr(module, player).state_dict().items()}


def prepared(module: ProRLGRPO, batch: RolloutBatch) -> RolloutBatch:
    """The batch as the losses see it."""
    seen: list[RolloutBatch] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            seen.append(outputs["batch"])

    fit(module, [batch], callbacks=[Spy()])
    return seen[0]


def warm(module: ProRLGRPO, scale: float = 0.3) -> ProRLGRPO:
    """The module with a critic whose values differ, and a reference that is not the policy."""
    module.configure_model()
    assert module.critic is not None
    torch.manual_seed(9)
    with torch.no_grad():
        module.critic.head.weight.normal_(std=scale)
        if module.reference is not None:
            for p in module.reference.parameters():
                p.add_(0.02 * torch.randn_like(p))
    return module


# -- the policy's side --------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [False, True])
def test_with_gamma_lambda_one_and_a_critic_of_zeros_it_is_reinforce_with_the_reward_to_go(kl: bool) -> None:
    """SGD's move is −lr · ∇[−Σ R(t) log p / N], the KL taken off token by token. Catches: an outcome on all tokens."""
    batch = rollouts()
    module = ppo(kl=KLSpec(0.3, place="reward") if kl else KLSpec())
    warm(module, scale=0.0)
    before = state(module, "policy")
    reward_BT = torch.zeros(batch.input_ids.shape)
    if kl:
        assert module.reference is not None
        with torch.no_grad():
            logp, ref = (
                m(batch.input_ids, batch.response_mask).logp for m in (module.policy, module.reference)
            )
        reward_BT[batch.response_mask] = -0.3 * (logp - ref)
    reward_BT[torch.arange(len(batch)), batch.lengths - 1] += batch.rewards
    to_go_BT = reward_BT.flip(1).cumsum(1).flip(1)
    seen = prepared(module, batch)
    mask = batch.response_mask
    torch.testing.assert_close(seen.extra["advantage"][mask], to_go_BT[mask], atol=1e-4, rtol=1e-4)
    if kl:
        spans = [seen.extra["advantage"][b][mask[b]] for b in range(len(batch)) if mask[b].sum() > 1]
        assert min(float(x.max() - x.min()) for x in spans) > 1e-3, "tokens of a row differ"

    model = toys.llama(0, scale=2.0)
    logp_BT = model(batch.input_ids).logits[..., :24].log_softmax(-1)
    logp_BT = logp_BT[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    (-(to_go_BT[:, 1:] * logp_BT)[mask[:, 1:]].sum() / mask.sum()).backward()
    for name, p in model.named_parameters():
        moved = (state(module, "policy")[f"model.{name}"] - before[f"model.{name}"]) / -0.5
        torch.testing.assert_close(moved, p.grad, rtol=2e-3, atol=5e-5, msg=name)


@pytest.mark.parametrize("bootstrap", ["zero", "value"])
def test_values_and_what_follows_a_cut_are_the_critics(bootstrap: Any) -> None:
    """Row by row, alone. Catches: a bootstrap of finished rows, the value before the last token as the one after."""
    batch = rollouts()
    module = warm(
        ppo(advantage=AdvantageSpec("gae", gamma=0.9, lam=0.8), critic=CriticSpec(bootstrap=bootstrap))
    )
    critic = module.critic
    assert critic is not None
    advantage, returns = [], []
    for b in range(len(batch)):
        one = batch.select([b])
        with torch.no_grad():
            value = critic.values(one.input_ids, one.response_mask)
            after = critic.scores(one.input_ids, one.attention_mask)
        reward = torch.zeros(1, len(value))
        reward[0, -1] = one.rewards
        cut = bootstrap == "value" and not bool(one.finished)
        a, r = gae(
            reward, value[None], torch.ones(1, len(value), dtype=torch.bool), after * cut, gamma=0.9, lam=0.8
        )
        advantage.append(a[0])
        returns.append(r[0])
    seen = prepared(module, batch)
    mask = batch.response_mask
    torch.testing.assert_close(seen.extra["advantage"][mask], torch.cat(advantage), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.extra["return"][mask], torch.cat(returns), atol=1e-5, rtol=1e-4)
    assert not seen.extra["advantage"][~mask].any()


def test_values_are_graded_without_the_critics_dropout() -> None:
    """The baseline is one number per state; updates have dropout. Catches: a critic that grades in train mode."""
    batch = rollouts()
    module = warm(ppo(toys.policy(0, scale=2.0, attention_dropout=0.5), critic=CriticSpec(warmup=1)))
    assert module.critic is not None
    module.critic.eval()
    with torch.no_grad():
        value = module.critic.values(batch.input_ids, batch.response_mask)
    module.critic.train()
    seen = prepared(module, batch)
    torch.testing.assert_close(seen.extra["value"][batch.response_mask], value)
    assert all(m.training for m in module.critic.modules())


def test_whitened_advantages_have_mean_0_and_deviation_1_over_scored_tokens() -> None:
    batch = rollouts()
    batch = dataclasses.replace(batch, rewards=torch.where(torch.arange(16) == 5, NAN, batch.rewards))
    seen = prepared(warm(ppo(advantage=AdvantageSpec("gae", whiten="token", eps=0.0))), batch)
    plain = prepared(warm(ppo()), batch)
    scored = batch.response_mask & ~batch.rewards.isnan()[:, None]
    white, raw = (x.extra["advantage"][scored] for x in (seen, plain))
    torch.testing.assert_close(white, (raw - raw.mean()) / raw.std(correction=0), atol=1e-5, rtol=1e-4)
    assert not seen.extra["advantage"][5].any()
    torch.testing.assert_close(seen.extra["return"], plain.extra["return"])


# -- the critic's side --------------------------------------------------------------------------------


def told(firsts: list[int], rewards: list[float]) -> RolloutBatch:
    """One prompt; the reward is decided by a response's first token, and two further tokens say nothing."""
    completions = tuple(
        Completion(torch.tensor([first, 5, 22]), torch.full((3,), -1.0), "eos", 0, text="")
        for first in firsts
    )
    prompt = Prompt((3, 4), text="", uid="p")
    return collate(
        [Group(prompt, completions)], pad_id=20, rewards=[rewards], sampling=Sampling(max_new_tokens=3)
    )


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_the_critic_learns_the_mean_reward_and_what_a_token_decides(lam: float) -> None:
    """0.75 before the first token, then 1 or 0. Catches: values off by a token, returns that are advantages."""
    batch = told([7, 7, 7, 8], [1.0, 1.0, 1.0, 0.0])
    curve: list[dict[str, float]] = []

    class Curve(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            curve.append(outputs["metrics"])

    module = ppo(
        toys.policy(0),
        advantage=AdvantageSpec("gae", lam=lam),
        critic=CriticSpec(warmup=1000, updates=2),
        critic_optimizer=adamw(5e-3),
    )
    fit(module, [batch] * 100, callbacks=[Curve()])
    assert module.critic is not None
    with torch.no_grad():
        value = module.critic.values(batch.input_ids, batch.response_mask).view(4, 3)
    torch.testing.assert_close(value[:, 0], torch.full((4,), 0.75), atol=0.02, rtol=0)
    torch.testing.assert_close(
        value[:, 1:], torch.tensor([1.0, 1, 1, 0])[:, None].expand(4, 2), atol=0.02, rtol=0
    )
    assert curve[0]["train/critic_value"] == 0
    assert curve[0]["train/critic_explained_variance"] == pytest.approx(0, abs=1e-6)
    if lam == 1.0:
        assert curve[0]["train/critic_return"] == pytest.approx(0.75)
        # Of the returns' variance 3/16, the third of tokens that come first leave theirs.
        assert curve[-1]["train/critic_explained_variance"] == pytest.approx(2 / 3, abs=0.02)
    assert curve[-1]["train/critic_value"] == pytest.approx(0.75, abs=0.02)
    assert curve[-1]["train/critic_loss"] < 0.5 * curve[0]["train/critic_loss"]
    assert "train/loss" not in curve[-1], "the policy has not begun"


def test_a_bandits_value_is_its_mean_reward_and_equal_returns_explain_nothing() -> None:
    batch = told([7, 7, 7, 7], [1.0, 0.0, 0.0, 0.0])
    module = ppo(toys.policy(0), critic=CriticSpec(warmup=1000), critic_optimizer=adamw(5e-3))
    fit(module, [batch] * 80)
    assert module.critic is not None
    with torch.no_grad():
        value = module.critic.values(batch.input_ids, batch.response_mask)
    torch.testing.assert_close(value, torch.full((12,), 0.25), atol=0.02, rtol=0)
    metrics = fit(ppo(), [told([7, 8], [0.5, 0.5])])
    assert "train/critic_explained_variance" not in metrics
    assert metrics["train/critic_return"] == 0.5


def test_clip_and_rows_without_a_reward_cut_the_value_loss() -> None:
    """Catches: an unscored or foreign row that holds its values in place while others move."""
    batch = rollouts()
    own = torch.arange(16) != 3
    rewards = torch.where(torch.arange(16) % 5 == 0, NAN, batch.rewards)
    dirty = dataclasses.replace(
        batch,
        on_policy=own,
        rewards=rewards,
        sampler_logprobs=torch.where(own[:, None], batch.sampler_logprobs, NAN),
    )
    kept = (own & ~rewards.isnan()).nonzero()[:, 0]
    scale = int(batch.response_mask.sum()) / int(batch.response_mask[kept].sum())
    settings: dict[str, Any] = {"critic": CriticSpec(updates=3, clip=None, warmup=9), "positive_nll": 0.1}
    first = warm(ppo(critic_optimizer=lambda p: torch.optim.SGD(p, lr=0.005 * scale), **settings))
    other = warm(ppo(critic_optimizer=lambda p: torch.optim.SGD(p, lr=0.005), **settings))
    start = state(first, "critic")
    metrics = fit(first, [dirty])
    fit(other, [batch.select(kept)])
    assert metrics["train/critic_value_clipped"] == 0
    for name, value in state(other, "critic").items():
        torch.testing.assert_close(state(first, "critic")[name], value, rtol=1e-3, atol=1e-5)
    assert float((state(first, "critic")["head.weight"] - start["head.weight"]).norm()) > 1e-2
    clipped = fit(warm(ppo(critic=CriticSpec(updates=8, clip=0.01))), [batch])
    assert clipped["train/critic_value_clipped"] > 0.1


# -- two players --------------------------------------------------------------------------------------


def test_no_gradient_crosses_and_no_storage_is_shared() -> None:
    """Bit for bit: neither player's move depends on the other's learning rate. Catches: one optimizer over both."""

    def run(lr: float, critic_lr: float) -> dict[str, dict[str, Tensor]]:
        module = warm(
            ppo(
                optimizer=lambda p: torch.optim.SGD(p, lr=lr),
                critic_optimizer=lambda p: torch.optim.SGD(p, lr=critic_lr),
                kl=KLSpec(0.1, gradient="forward"),
            )
        )
        fit(module, [rollouts()])
        assert module.critic is not None
        shared = {
            t.untyped_storage().data_ptr() for t in module.policy.state_dict(keep_vars=True).values()
        } & {t.untyped_storage().data_ptr() for t in module.critic.state_dict(keep_vars=True).values()}
        assert not shared
        return {player: state(module, player) for player in ("policy", "critic")}

    both, policy, critic, none = run(0.5, 0.05), run(0.5, 0.0), run(0.0, 0.05), run(0.0, 0.0)
    for name, value in both["policy"].items():
        assert torch.equal(policy["policy"][name], value)
    for name, value in both["critic"].items():
        assert torch.equal(critic["critic"][name], value)
    for player in ("policy", "critic"):
        assert any(not torch.equal(v, none[player][k]) for k, v in both[player].items())


def test_in_the_warm_up_the_critic_alone_learns_and_nothing_counts() -> None:
    module = ppo(critic=CriticSpec(warmup=2, updates=3), loop=LoopSpec(minibatches=2, max_grad_norm=None))
    module.configure_model()
    start, steps, seen = {p: state(module, p) for p in ("policy", "critic")}, [], []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            steps.append(trainer.global_step)
            seen.append({p: state(module, p) for p in ("policy", "critic")})

    fit(module, [rollouts(i) for i in range(3)], callbacks=[Spy()])
    assert steps == [0, 0, 2]
    for i, still in enumerate((True, True, False)):
        same = all(torch.equal(v, start["policy"][k]) for k, v in seen[i]["policy"].items())
        assert same is still
        assert any(not torch.equal(v, start["critic"][k]) for k, v in seen[i]["critic"].items())


def test_steps_are_counted_per_player() -> None:
    module = ppo(
        critic=CriticSpec(updates=3, minibatches=4),
        loop=LoopSpec(minibatches=1, updates=2),
        optimizer=adamw(1e-3),
        critic_optimizer=adamw(1e-3),
        critic_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    )
    run = trainer()
    run.fit(module, train_dataloaders=DataLoader([rollouts(i) for i in range(2)], batch_size=None))
    assert run.global_step == 2 * 2
    counts = [{float(s["step"]) for s in o.state_dict()["state"].values()} for o in run.optimizers]
    assert counts == [{4}, {24}]
    assert [g["lr"] for o in run.optimizers for g in o.param_groups] == pytest.approx([1e-3, 1e-3 / 25])


@pytest.mark.parametrize("chosen", [[0], [1], None])
def test_an_optimizer_reset_meets_the_player_it_names(chosen: list[int] | None) -> None:
    module = ppo(optimizer=adamw(1e-3), critic_optimizer=adamw(1e-3))
    left: list[list[bool]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            left.append([bool(o.state) for o in trainer.optimizers])

    reset = OptimizerReset(trigger=EveryNSteps(2), optimizers=chosen)
    fit(module, [rollouts(i) for i in range(2)], callbacks=[reset, Look()])
    assert left == [[True, True], [i not in (chosen or [0, 1]) for i in range(2)]]


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("cut", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(cut: int, lora: LoraSpec | None, tmp_path: Path) -> None:
    """In the warm-up and after it. Catches: a warm-up that begins again, a critic made anew from the trained policy."""

    def module() -> ProRLGRPO:
        torch.manual_seed(2)  # of the adapters
        return ppo(
            **{
                **EVERYTHING,
                "critic": CriticSpec(warmup=2, bootstrap="value", lora=lora),
                "optimizer": adamw(1e-3),
                "critic_optimizer": adamw(3e-3),
            }
        )

    batches = [rollouts(i) for i in range(4)]
    whole = module()
    fit(whole, batches)
    run = trainer()
    run.fit(module(), train_dataloaders=DataLoader(batches[:cut], batch_size=None))
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert len(saved["optimizer_states"]) == 2
    assert ("critic.body.embed_tokens.weight" in saved["state_dict"]) == (lora is None)
    second = module()
    run = trainer(max_epochs=2)
    run.fit(
        second, train_dataloaders=DataLoader(batches[cut:], batch_size=None), ckpt_path=tmp_path / "a.ckpt"
    )
    assert run.global_step == 2
    assert second.critic_batches == whole.critic_batches == 4
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_the_cut_into_micro_batches_and_padding_never_show() -> None:
    """With every setting on. Catches: whitening per piece, a bootstrap at the padding, counts of a micro-batch."""
    results = []
    for budget, pad in ((12, 0), (40, 0), (100_000, 9)):
        loop = LoopSpec(updates=2, minibatches=2, micro_batch_tokens=budget, max_grad_norm=None)
        module = warm(ppo(loop=loop, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **EVERYTHING))
        batches = [wider(rollouts(i), pad) for i in (3, 4)]
        results.append((fit(module, batches), state(module, "policy"), state(module, "critic")))
    assert results[0][0]["train/critic_value_clipped"] > 0
    assert results[0][0]["train/clip_high"] > 0
    for metrics, *players in results[1:]:
        for mine, first in zip(players, results[0][1:], strict=True):
            for name, value in mine.items():
                torch.testing.assert_close(value, first[name], rtol=1e-4, atol=1e-5)
        for name, number in metrics.items():
            assert number == pytest.approx(results[0][0][name], rel=1e-3, abs=1e-5), name


def wider(batch: RolloutBatch, pad: int) -> RolloutBatch:
    """The batch with more padding on the right, NaN where values have no meaning."""

    def grow(x: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, pad), value=fill)

    return dataclasses.replace(
        batch,
        input_ids=grow(batch.input_ids, 20),
        attention_mask=grow(batch.attention_mask, 0),
        response_mask=grow(batch.response_mask, 0),
        sampler_logprobs=grow(batch.sampler_logprobs, NAN),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "lora"), [("ddp", "full"), ("fsdp2", "full"), ("fsdp2", "lora")])
def test_two_ranks_equal_one_process(tmp_path: Path, strategy: str, lora: str) -> None:
    """Catches: whitening or explained variance per rank, a critic not sharded, ranks that differ in passes."""
    one = ranks_ppo.run("auto", lora == "lora")
    out = tmp_path / "result.pt"
    on_two_ranks(ranks_ppo, strategy, lora, out)
    two = torch.load(out, weights_only=True)
    for player in ("policy", "critic"):
        moved = 0.0
        for name, value in one[player].items():
            torch.testing.assert_close(
                two[player][name], value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
            moved = max(moved, float((value - one["start"][player][name]).abs().max()))
        assert moved > 1e-3, "the test's steps must move the weights by far more than the tolerance"
    assert one["metrics"]["train/critic_explained_variance"] != 0
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# -- settings -----------------------------------------------------------------------------------------


def test_the_critic_is_there_for_gae_alone() -> None:
    plain = ppo(advantage=AdvantageSpec(), critic_optimizer=None)
    plain.configure_model()
    assert plain.critic is None
    assert isinstance(plain.configure_optimizers(), torch.optim.Optimizer)
    assert all(name.startswith("policy.") for name in plain.state_dict())
    module = ppo(critic_optimizer=None)
    module.configure_model()
    assert isinstance(module.critic, ScalarModel)
    policy, critic = module.configure_optimizers()
    assert critic["optimizer"].param_groups[0]["lr"] == 1e-5
    own = {id(p) for p in module.critic.parameters()}
    assert {id(p) for g in critic["optimizer"].param_groups for p in g["params"]} == own
    assert not own & {id(p) for g in policy["optimizer"].param_groups for p in g["params"]}


def test_a_plain_dict_says_the_same_as_a_spec() -> None:
    """What a checkpoint's hyperparameters hold makes the module again."""
    module = ppo(critic=CriticSpec(clip=None, warmup=3, lora=LoraSpec(r=4)), critic_optimizer=None)
    stored = dict(module.hparams)
    again = ppo(advantage=stored["advantage"], critic=stored["critic"], critic_optimizer=None)
    assert again.critic_spec == module.critic_spec
    assert again.advantage == module.advantage


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"advantage": AdvantageSpec(), "critic": CriticSpec(), "critic_optimizer": None},
            "critic must be left",
        ),
        ({"advantage": AdvantageSpec()}, "critic_optimizer has no effect"),
        (
            {"advantage": AdvantageSpec(), "critic_optimizer": None, "critic_scheduler": lambda o: o},
            "critic_scheduler has no effect",
        ),
        ({"surrogate": SurrogateSpec("gmpo")}, r"surrogate\.kind"),
    ],
)
def test_settings_without_effect_are_refused_by_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ppo(**settings)


def test_a_critic_of_its_own_needs_the_policys_vocabulary(tmp_path: Path) -> None:
    path = toys.save_model(tmp_path / "a", seed=4, hidden=16)
    module = ppo(critic=CriticSpec(model=ModelSpec(path)))
    module.configure_model()
    assert module.critic is not None
    assert module.critic.head.weight.shape == (1, 16)
    assert fit(module, [rollouts()])["train/critic_grad_norm"] > 0
    toys.tokenizer(words=19).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text("{}")
    other = ppo(critic=CriticSpec(model=ModelSpec(path, tokenizer=str(tmp_path / "b"))))
    with pytest.raises(ValueError, match="another vocabulary"):
        other.configure_model()
