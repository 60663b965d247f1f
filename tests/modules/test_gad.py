"""GAD, both players in one fit: who learns when, from which scores, and that nothing leaks between them.

Legend: ``p`` sampled rows, ``q`` the teacher's; D the discriminator. Numbers are those of the sheet's list of traps.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import toys
from duels import LIMIT, TOKENIZER, Duels, Spy, copied, duel_batch, fit, gad, moved

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.judged import PREFERRED, judged_batch, judged_items, rows_of_items
from lightning_onpolicy.modules import GAD, GADGenerator
from lightning_onpolicy.modules.gad_reward import AdversarialReward
from lightning_onpolicy.modules.gad_stages import Gate, Replay, Warmup
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.specs import LoraSpec


def test_ten_batches_are_ten_global_steps_whoever_learns() -> None:
    """Catches: two optimizers that both count, a warm-up in which nothing counts, counters that drift."""
    spy = Spy()
    module = gad(warmup=Warmup(4, 2))
    run = fit(module, Duels(10), spy)
    assert run.global_step == 10
    assert module.clock.batches == 10 and module.clock.discriminator_steps == 10
    assert module.clock.policy_steps == module.policy_version == 8
    assert [m["train/phase"] for m in spy.metrics] == [0, 0, 1, 1] + [2] * 6


def test_the_phases_teach_whom_they_should() -> None:
    module = gad(warmup=Warmup(2, 1))
    module.configure_model()
    before = copied(module)
    fit(module, [duel_batch(1)])
    assert moved(before, module) == {"discriminator"}
    before = copied(module)
    fit(module, [duel_batch(2)])  # a second fit goes on from the module's own clock
    assert moved(before, module) == {"discriminator", "policy"}
    before = copied(module)
    spy = Spy()
    fit(module, [duel_batch(3)], spy)
    assert moved(before, module) == {"discriminator", "policy", "reference"}  # anchored after the warm-up …
    assert spy.metrics[0]["train/kl_ref_k1"] == pytest.approx(0.0, abs=1e-6)  # 14: … where the policy stands
    start = gad(warmup=Warmup(1, 0), anchor="start")
    start.configure_model()
    before = copied(start)
    fit(start, [duel_batch(1), duel_batch(2)])
    assert moved(before, start) == {"discriminator", "policy"}


def test_nothing_leaks_from_one_player_to_the_other() -> None:
    """3: gradients, storage, tied embeddings. Catches: an alias of the student, a step over both."""
    module = gad()
    module.configure_model()
    own = {p.data_ptr() for p in module.policy.parameters()}
    assert not own & {p.data_ptr() for p in module.discriminator.parameters()}
    fit(module, [duel_batch(1)])
    verdict = module.judge(duel_batch(2))
    for p in module.parameters():
        p.grad = None
    counts = module._counts(verdict.rows)
    module.pair_loss(verdict.rows, counts).loss.backward()
    assert all(p.grad is None for p in module.policy.parameters())
    assert any(p.grad is not None for p in module.discriminator.parameters())
    for p in module.parameters():
        p.grad = None
    rows, _ = module.own_rows(duel_batch(2), verdict)
    graded = super(GADGenerator, module).prepare(rows)
    module.loss(graded, module._counts(graded)).loss.backward()
    assert all(p.grad is None for p in module.discriminator.parameters())


class Gradients(pl.Callback):
    """Which models have gradients when an optimizer steps."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.seen.append(graded(module)))


def graded(module: Any) -> set[str]:
    return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None}


def test_no_player_holds_gradients_through_the_others_update() -> None:
    """Catches: gradients kept until their own player's next step, 4 bytes per parameter in float32."""
    module, spy = gad(), Gradients()
    fit(module, [duel_batch(1), duel_batch(2)], spy)
    assert spy.seen == [{"discriminator"}, {"policy"}] * 2
    assert not graded(module)


def test_rewards_are_the_scores_before_the_update() -> None:
    """7: the very same rewards whether or not D learns from the batch; each is D's score of the text."""
    rewards = []
    for gate in (Gate(), Gate(high=0.0)):
        spy = Spy()
        module = gad(gate=gate)
        fit(module, [duel_batch(1)], spy)
        rewards.append(spy.batches[0].rewards)
        assert spy.metrics[0]["train/discriminator_steps"] == (1.0 if gate.high else 0.0)
    assert torch.equal(*rewards)
    fresh = gad()
    fresh.configure_model()
    batch = duel_batch(1)
    rows = judged_batch(batch, TOKENIZER, 20, 22)
    scores = fresh.discriminator.eval().scores(rows.input_ids, rows.attention_mask)[batch.on_policy]
    torch.testing.assert_close(rewards[0], scores.detach())


def test_both_sides_are_read_alike() -> None:
    """5: canonical ids, the same EOS, the same cut. Catches: an artefact that gives the author away."""
    batch = duel_batch(1)
    rows = judged_batch(batch, TOKENIZER, 20, 22)
    assert rows.extra[PREFERRED].tolist() == (~batch.on_policy).tolist()
    for i, text in enumerate(batch.texts):
        ids = rows.input_ids[i][rows.response_mask[i]].tolist()
        whole = TOKENIZER.encode(text, add_special_tokens=False) + [22] * bool(batch.finished[i])
        assert ids == (whole or [22])[:LIMIT]
        assert bool(rows.finished[i]) == (ids[-1] == 22 and bool(batch.finished[i]))
    again = rows_of_items(judged_items(rows), 20)

    def rows_of(batch: RolloutBatch) -> list[tuple[int, tuple[int, ...]]]:
        ids = [
            tuple(row[mask].tolist()) for row, mask in zip(batch.input_ids, batch.response_mask, strict=True)
        ]
        return sorted(zip(batch.group.tolist(), ids, strict=True))

    assert rows_of(again) == rows_of(rows)


@pytest.mark.parametrize("budget", [16, 40, 4096])
def test_the_cut_into_micro_batches_never_shows(budget: int) -> None:
    """10: both players' weights are the same for any budget, ragged rows and several teacher answers included."""
    loop = LoopSpec(micro_batch_tokens=budget, max_grad_norm=None)
    sgd = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "discriminator_optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
    }
    module = gad(loop=loop, discriminator_loop=loop, **sgd)
    whole = LoopSpec(micro_batch_tokens=100_000, max_grad_norm=None)
    oracle = gad(loop=whole, discriminator_loop=whole, **sgd)
    for one in (module, oracle):
        fit(one, [duel_batch(1)])
    for name, value in oracle.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, atol=2e-6, rtol=2e-5, msg=name)


def test_replay_is_the_discriminators_alone() -> None:
    """9: policy rows and advantages bit-identical with and without; D's rows constant; fresh rows unmutated."""
    seen = []
    for replay in (None, Replay(capacity=8, share=0.5)):
        spy = Spy()
        module = gad(replay=replay, gate=Gate(high=1.0))
        lessons: list[RolloutBatch] = []
        lesson = module.lesson
        module.lesson = lambda verdict, f=lesson, out=lessons: out.append(f(verdict)) or out[-1]  # type: ignore[method-assign]
        batches = [duel_batch(n, groups=4) for n in (1, 2)]
        before = [b.input_ids.clone() for b in batches]
        fit(module, batches, spy)
        assert all(torch.equal(x, b.input_ids) for x, b in zip(before, batches, strict=True))
        assert [len(x) for x in lessons] == [len(b) for b in batches]
        seen.append((spy.batches[0], lessons))
    (plain, alone), (mixed, replayed) = seen
    assert torch.equal(plain.input_ids, mixed.input_ids)
    assert torch.equal(plain.extra["advantage"], mixed.extra["advantage"])
    assert sorted(map(str, judged_items(alone[0]))) == sorted(map(str, judged_items(replayed[0])))
    old = {str(item) for item in judged_items(alone[0])}
    assert sum(str(item) in old for item in judged_items(replayed[1])) == 2  # half of four groups


@pytest.mark.parametrize("lora", [False, True])
def test_everything_resumes_bit_for_bit(tmp_path: Path, lora: bool) -> None:
    """12: both models, optimizers, reference, clock and replay, from inside the warm-up across the switch."""

    def make() -> GAD:
        policy = Policy(toys.llama(0, tie=False, scale=2.0), TOKENIZER, lora=LoraSpec(r=2)) if lora else None
        return gad(
            policy,
            warmup=Warmup(2, 1),
            replay=Replay(8, 0.5),
            discriminator_lora=LoraSpec(r=2) if lora else None,
        )

    whole, spy = make(), Spy(tmp_path / "a.ckpt", 0)
    first = fit(whole, Duels(5), spy)
    resumed, after = make(), Spy()
    second = fit(resumed, Duels(5), after, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert first.global_step == second.global_step == 5
    assert whole.clock == resumed.clock
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for a, b in zip(first.optimizers, second.optimizers, strict=True):
        for key, state in a.state_dict()["state"].items():
            for name, value in state.items():
                assert torch.equal(value, b.state_dict()["state"][key][name]), (key, name)
    shared = ("reward", "fresh/accuracy", "discriminator/loss")
    for x, y in zip(spy.metrics[1:], after.metrics, strict=True):
        assert [x.get(f"train/{k}") for k in shared] == [y.get(f"train/{k}") for k in shared]


def test_two_adapters_share_one_frozen_base() -> None:
    policy = Policy(toys.llama(0, tie=False, scale=2.0), TOKENIZER, lora=LoraSpec(r=2))
    module = gad(policy, discriminator_lora=LoraSpec(r=3))
    module.configure_model()
    frozen = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    body = dict(module.discriminator.body.named_parameters())
    assert {p.data_ptr() for p in body.values() if not p.requires_grad} <= frozen
    trained = {name for name, p in module.discriminator.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name or name.startswith("head.") for name in trained)
    assert not any(".lora_A.default.weight" in n and p.shape[0] == 2 for n, p in body.items())
    before = copied(module)
    fit(module, [duel_batch(1)])
    assert {n for n, v in before.items() if not torch.equal(v, module.state_dict()[n])} <= {
        n for n in before if ".lora_" in n or n.startswith("discriminator.head.")
    }
    assert moved(before, module) >= {"policy", "discriminator"}


def test_a_gate_lets_the_loser_catch_up() -> None:
    """D waits while it wins, the generator while D is blind; somebody always learns, and global_step moves."""
    module = gad(gate=Gate(high=0.01, window=1))
    run = fit(module, Duels(4))
    assert module.clock.discriminator_steps < 4 and run.global_step == 4
    module = gad(gate=Gate(low=0.999, high=1.0, window=1), head_std=0.0)  # all scores 0: accuracy ½
    run = fit(module, [duel_batch(1)])
    assert module.clock.policy_steps == 0 and module.clock.discriminator_steps == 1 and run.global_step == 1
    module = gad(generator_every=3)
    fit(module, Duels(7))
    assert module.clock.policy_steps == 2 and module.clock.discriminator_steps == 7


def test_every_enabled_term_is_logged() -> None:
    """16"""
    spy = Spy()
    pairs = {"kind": "cross_entropy", "smoothing": 0.1, "score_penalty": 0.01}
    module = gad(pairs=pairs, r1=0.1, reward=AdversarialReward(bound=0.05, debias=True))
    fit(module, Duels(2), spy)
    named = {
        "discriminator/loss", "discriminator/accuracy", "discriminator/score_penalty", "discriminator/grad_norm",
        "discriminator/gradient_norm", "reward_clamped", "length_slope", "fresh/accuracy", "fresh/score_gap",
        "fresh/length_gap", "kl_ref_k1", "entropy", "reward", "reward/discriminator",
    }  # fmt: skip
    assert not {f"train/{n}" for n in named} - set(spy.metrics[-1])


def test_verifiers_and_scores_add_up() -> None:
    spy = Spy()
    batch = duel_batch(1)
    task = torch.where(batch.on_policy, torch.arange(len(batch)).float(), torch.nan)
    task[0] = torch.nan  # could not be verified: no reward, whatever D says
    module = gad(reward=AdversarialReward(weight=2.0, task=3.0, clip=7.0))
    fit(module, [dataclasses.replace(batch, rewards=task)], spy)
    out = spy.batches[0]
    expected = (2 * out.reward_parts["discriminator"] + 3 * task[batch.on_policy]).clamp(-7, 7)
    torch.testing.assert_close(out.rewards, expected, equal_nan=True)
    assert bool(out.rewards[0].isnan()) and not bool(out.extra["advantage"][0].any())
    assert torch.equal(out.reward_parts["task"][1:], task[batch.on_policy][1:])


def test_a_bound_needs_the_teacher() -> None:
    """Catches: rewards that are all NaN, and an error that blames the verifier."""
    batch = duel_batch(1)
    alone = batch.select(batch.on_policy.nonzero()[:, 0])
    module = GADGenerator(toys.policy(0), ScalarModel.copy_of(toys.policy(0)), AdversarialReward(bound=0.1))
    with pytest.raises(ValueError, match=r"set data\.beside to true"):
        fit(module, [alone])


def test_a_frozen_judge_stays_as_it_is(tmp_path: Path) -> None:
    """GADGenerator by itself, from what a trained discriminator was saved as."""
    judge = ScalarModel.copy_of(toys.policy(3, scale=2.0), std=0.2)
    judge.save_pretrained(tmp_path / "judge")
    module = GADGenerator(
        toys.policy(0, scale=2.0),
        str(tmp_path / "judge"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    spy = Spy()
    fit(module, [duel_batch(1)], spy)
    for name, value in judge.state_dict().items():
        assert torch.equal(value, module.discriminator.state_dict()[name]), name
    assert not any(k.startswith("discriminator.") for k in module.state_dict())
    rows = judged_batch(duel_batch(1), TOKENIZER, 20, 22)
    scores = judge.eval().scores(rows.input_ids, rows.attention_mask)[~rows.extra[PREFERRED]]
    torch.testing.assert_close(spy.batches[0].rewards, scores.detach())


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="discriminator is missing"):
        fit(GADGenerator(toys.policy(0)), [duel_batch(1)])
    batch = duel_batch(1)
    with pytest.raises(ValueError, match=r"data\.beside"):
        fit(gad(), [batch.select(batch.on_policy.nonzero()[:, 0])])
    with pytest.raises(ValueError, match=r"warmup\.discriminator_batches"):
        Warmup(1, 2)
    with pytest.raises(ValueError, match=r"gate\.low"):
        Gate(high=0.4, low=0.6)
    with pytest.raises(ValueError, match="generator_every"):
        gad(generator_every=0)
    with pytest.raises(ValueError, match=r"reward\.weight"):
        AdversarialReward(weight=0.0)
