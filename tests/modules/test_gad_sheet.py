"""GAD's list of traps, where a whole fit shows them: which score, which rows, which mode, which anchor, which terms.

Legend: ``p`` sampled rows, ``q`` the teacher's; D the discriminator. Numbers are those of the sheet's list of traps.
"""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from duels import LIMIT, TOKENIZER, Duels, Spy, copied, duel_batch, fit, gad, moved
from torch import Tensor
from torch.nn.functional import softplus

from lightning_onpolicy.datamodules.batch import Group, Prompt, Sampling, collate
from lightning_onpolicy.datamodules.given import text_completion
from lightning_onpolicy.modules import GAD
from lightning_onpolicy.modules.gad_reward import AdversarialReward
from lightning_onpolicy.modules.gad_stages import Replay, Warmup
from lightning_onpolicy.modules.losses.settings import (
    AdvantageSpec,
    CorrectionSpec,
    EntropySpec,
    KLSpec,
    SurrogateSpec,
)
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.specs import LoraSpec

EOS = 22
SGD = {
    "optimizer": lambda p: torch.optim.SGD(p, lr=0.05),
    "discriminator_optimizer": lambda p: torch.optim.SGD(p, lr=5e-4),
}


@pytest.mark.parametrize("budget", [12, 4096])
@pytest.mark.parametrize("padded_with_eos", [False, True])
def test_a_score_is_that_of_prompt_and_answer_alone(budget: int, padded_with_eos: bool) -> None:
    """4. A prompt with an EOS in it, an answer of nothing, capped ones, padding that looks like EOS, other rows."""
    tokenizer = copy.deepcopy(TOKENIZER)
    if padded_with_eos:
        tokenizer.pad_token = tokenizer.eos_token
    module = gad(Policy(toys.llama(0, scale=2.0), tokenizer), loop=LoopSpec(micro_batch_tokens=budget))
    module.configure_model()
    prompt = Prompt((3, EOS, 5), "t3 <eos> t5", uid="p")
    texts = {"": "eos", "t1": "eos", "t2 t3 t4 t5 t6 t7": "length", "t8 t9 t10 t11 t12 t13 t14": "eos"}
    own = tuple(
        dataclasses.replace(text_completion(text, tokenizer, cut=finish == "length"), finish=finish)
        for text, finish in texts.items()
    )
    given = (text_completion("t1 t2", tokenizer),)
    batch = collate(
        [Group(prompt, own), Group(prompt, given, on_policy=False)],
        int(tokenizer.pad_token_id),
        sampling=Sampling(max_new_tokens=LIMIT),
        numbers=[0, 0],
    )
    module.trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    with torch.no_grad():
        found = module.judge(batch).score_B
        responses = [[EOS], [1, EOS], [2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13], [1, 2, EOS]]
        rows = [torch.tensor([[*prompt.ids, *ids]]) for ids in responses]
        discriminator = module.discriminator.eval()
        hidden = [discriminator.body(input_ids=row).last_hidden_state[:, -1] for row in rows]
        expected = discriminator.head(torch.cat(hidden))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float(expected.std()) > 0.05


def test_equal_scores_move_no_policy() -> None:
    """8. A D that says the same of everybody (or whose scores are ties) leaves the policy as it is, without a NaN."""
    for kind in ("group_zscore", "mean_centred"):  # with and without a deviation in the denominator
        spy = Spy()
        module = gad(head_std=0.0, kl=KLSpec(0.0), advantage=AdvantageSpec(kind), **SGD)  # no weight decay
        module.configure_model()
        before = copied(module)
        fit(module, [duel_batch(1, size=4)], spy)
        assert moved(before, module) == {"discriminator"}
        assert not bool(spy.batches[0].extra["advantage"].any())
        assert spy.metrics[0]["train/fresh/accuracy"] == 0.5


def test_fresh_accuracy_is_of_new_rows_before_the_update() -> None:
    """9. With a replay buffer in the lessons. Catches: the accuracy of the lesson, or of the D after its update."""
    module, spy = gad(replay=Replay(capacity=8, share=0.5)), Spy()
    found: list[float] = []
    judge = module.judge
    verdicts: list[Any] = []
    module.judge = lambda batch: verdicts.append(judge(batch)) or verdicts[-1]  # type: ignore[method-assign]
    fit(module, [duel_batch(n, groups=4) for n in (1, 2, 3)], spy)
    for number, verdict in enumerate(verdicts, 1):
        batch = duel_batch(number, groups=4)
        teacher = verdict.score_B[~batch.on_policy].repeat_interleave(2)  # two sampled rows in each group
        gap = teacher - verdict.score_B[batch.on_policy]
        found.append(float((gap > 0).float().mean()))
    assert [m["train/fresh/accuracy"] for m in spy.metrics] == pytest.approx(found)
    lessons = [m["train/discriminator/accuracy"] for m in spy.metrics]
    assert lessons[0] == found[0] and lessons[1:] != found[1:], "old rows are in the lesson, and in it alone"


@pytest.mark.parametrize("kind", ["bradley_terry", "cross_entropy"])
@pytest.mark.parametrize("budget", [1, 24, 60])
def test_no_micro_batch_shows_in_either_player(budget: int, kind: str) -> None:
    """10. In every phase and term: groups with one and two teacher answers, penalties, bounds, ragged rows."""

    def play(tokens: int) -> tuple[GAD, Spy]:
        loop, spy = LoopSpec(micro_batch_tokens=tokens, max_grad_norm=None), Spy()
        module = gad(
            warmup=Warmup(2, 1),
            pairs={"kind": kind, "smoothing": 0.1, "score_penalty": 0.05},
            r1=0.01,
            reward=AdversarialReward(bound=5.0, debias=True),
            advantage=AdvantageSpec("mean_centred"),
            entropy=EntropySpec(bonus=0.01),
            loop=loop,
            discriminator_loop=loop,
            **SGD,
        )
        fit(module, [duel_batch(n, groups=3, answers=2) for n in range(4)], spy)
        return module, spy

    (module, cut), (oracle, whole) = play(budget), play(100_000)
    start = gad()
    start.configure_model()
    for name, value in oracle.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, atol=2e-6, rtol=2e-5, msg=name)
    for player in ("policy", "discriminator"):
        change = getattr(oracle, player).state_dict(), getattr(start, player).state_dict()
        assert (
            max(float((a - b).abs().max()) for a, b in zip(*(x.values() for x in change), strict=True)) > 1e-3
        )
    for one, other in zip(cut.metrics, whole.metrics, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=2e-6)


def test_a_teachers_answer_read_once_counts_as_in_separate_pairs() -> None:
    """10. Catches: a teacher's row forwarded once per opponent, or whose gradient is that of one pair."""
    module = gad()
    module.configure_model()
    module.trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    batch = duel_batch(2, groups=2, size=4)
    with torch.no_grad():
        rows = module.judge(batch).rows
    read: list[int] = []
    handle = module.discriminator.body.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    once = gradients(module, module.pair_loss(rows, module._counts(rows)).loss)
    handle.remove()
    assert sum(read) == 2 * (4 + 1)

    def score(i: int) -> Tensor:
        return module.discriminator.scores(rows.input_ids[i : i + 1], rows.attention_mask[i : i + 1])[0]

    teacher = {int(rows.group[i]): i for i in range(8, 10)}
    pairs = [softplus(score(i) - score(teacher[int(rows.group[i])])) for i in range(8)]
    separate = gradients(module, torch.stack(pairs).mean())
    assert float(once.norm()) > 0.1
    torch.testing.assert_close(once, separate, atol=1e-5, rtol=1e-4)


def test_groups_without_a_teachers_answer_do_not_count() -> None:
    """10. Catches: a divisor that counts rows with nothing to be compared with."""
    module = gad(pairs={"score_penalty": 0.1}, r1=0.01)
    module.configure_model()
    module.trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    batch = duel_batch(2, groups=3)
    lonely = batch.select((batch.on_policy | (batch.group != 1)).nonzero()[:, 0])
    paired = batch.select((batch.group != 1).nonzero()[:, 0])
    found = []
    for one in (lonely, paired):
        with torch.no_grad():
            rows = module.judge(one).rows
        found.append(gradients(module, module.pair_loss(rows, module._counts(rows)).loss))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def gradients(module: GAD, loss: Tensor) -> Tensor:
    parameters = [p for p in module.discriminator.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def test_dropout_is_off_in_scoring_and_on_in_updates() -> None:
    """13. Catches: rewards with dropout's noise, a D that stays in eval mode after its first verdict."""
    module, spy = gad(toys.policy(0, scale=2.0, attention_dropout=0.5)), Spy()
    modes: list[tuple[bool, bool]] = []
    module.configure_model()
    score = module.discriminator.scores

    def recorded(*args: Tensor) -> Tensor:
        inner = {m.training for m in module.discriminator.modules()}
        assert len(inner) == 1
        modes.append((inner.pop(), torch.is_grad_enabled()))
        return score(*args)

    module.discriminator.scores = recorded  # type: ignore[method-assign]
    fit(module, [duel_batch(1), duel_batch(2)], spy)
    assert modes == [(False, False), (True, True)] * 2
    assert module.discriminator.training
    with torch.no_grad():
        one, two = module.judge(duel_batch(3)), module.judge(duel_batch(3))
        losses = [module.pair_loss(one.rows, module._counts(one.rows)).loss for _ in range(2)]
    assert torch.equal(one.score_B, two.score_B)
    assert not torch.equal(*losses), "the dropout of this model does something"


@pytest.mark.parametrize("lora", [False, True])
def test_the_anchor_is_where_the_game_begins(lora: bool) -> None:
    """14. KL exactly 0 in the first batch of the main stage, and not after; else the distance the warm-up went."""
    found = {}
    for anchor in ("post_warmup", "start"):
        policy = Policy(toys.llama(0, tie=False, scale=2.0), TOKENIZER, lora=LoraSpec(r=2)) if lora else None
        spy = Spy()
        fit(gad(policy, warmup=Warmup(2, 1), anchor=anchor), Duels(4), spy)
        assert all("train/kl_ref_k3" not in m for m in spy.metrics[:2])
        found[anchor] = [m["train/kl_ref_k3"] for m in spy.metrics[2:]]
    assert found["post_warmup"][0] == 0.0 < found["post_warmup"][1]
    assert found["start"][0] > 1e-6


def test_the_first_update_of_a_batch_has_a_ratio_of_one() -> None:
    """15. At the temperature it was drawn at, 0.8. Catches: one of the two log-probabilities at 1, or a stale one."""
    module = gad(loop=LoopSpec(updates=2))
    ratios: list[Tensor] = []
    loss = module.loss

    def recorded(micro: Any, counts: Any) -> Any:
        out = loss(micro, counts)
        ratios.append(out.means["ratio"])
        with torch.no_grad():
            stats = module.policy(micro.input_ids, micro.response_mask, outputs=("logp",), temperature=1.0)
        old = micro.extra["logp_old"][:, 1:][micro.response_mask[:, 1:]]
        assert float((stats.logp - old).abs().max()) > 0.05, "at 1 the log-probabilities are others"
        return out

    module.loss = recorded  # type: ignore[method-assign]
    fit(module, [duel_batch(n, size=4, temperature=0.8) for n in (1, 2)])
    assert len(ratios) == 4
    for first, second in (ratios[:2], ratios[2:]):
        assert torch.equal(first, torch.ones_like(first))
        assert float((second - 1).abs().max()) > 1e-4


TERMS: dict[str, tuple[dict[str, Any], str]] = {
    "kl": ({"kl": KLSpec(0.5)}, "kl_ref_k3"),
    "kl in the reward": ({"kl": KLSpec(0.5, place="reward")}, "kl_ref_k3"),
    "entropy bonus": ({"entropy": EntropySpec(bonus=0.1)}, "entropy_coef"),
    "covariance": ({"entropy": EntropySpec(covariance="kl_cov", share=0.5)}, "covariance_picked"),
    "correction": ({"correction": CorrectionSpec("tis")}, "weight_truncated"),
    "positive_nll": ({"positive_nll": 0.5}, "positive_nll"),
    "clip": ({"surrogate": SurrogateSpec("clip", low=1e-4, high=1e-4)}, "clip_high"),
    "score_penalty": ({"pairs": {"score_penalty": 0.1}}, "discriminator/score_penalty"),
    "r1": ({"r1": 0.1}, "discriminator/gradient_norm"),
    "bound": ({"reward": AdversarialReward(bound=0.05)}, "reward_clamped"),
    "debias": ({"reward": AdversarialReward(debias=True)}, "length_slope"),
    "task": ({"reward": AdversarialReward(task=2.0)}, "reward/task"),
}


@pytest.mark.parametrize("term", TERMS)
def test_every_term_that_is_on_is_logged_and_acts(term: str) -> None:
    """16. Each by itself against none: other weights, and its metric."""
    settings, name = TERMS[term]

    def play(**settings: Any) -> tuple[GAD, list[dict[str, float]]]:
        base = {"loop": LoopSpec(updates=2, max_grad_norm=None), "kl": KLSpec(0.0), **SGD}
        module, spy = gad(**{**base, **settings}), Spy()
        batches = [duel_batch(n, size=4) for n in (1, 2)]
        right = [
            torch.where(b.on_policy, torch.arange(len(b)).remainder(2).float(), torch.nan) for b in batches
        ]
        fit(module, [dataclasses.replace(b, rewards=r) for b, r in zip(batches, right, strict=True)], spy)
        return module, spy.metrics

    (plain, before), (module, after) = play(), play(**settings)
    assert f"train/{name}" in after[-1]
    assert moved(copied(plain), module) & {"policy", "discriminator"}
    if term in ("clip", "entropy bonus"):  # a run without it has the metric too
        assert after[-1][f"train/{name}"] != before[-1][f"train/{name}"]
    elif term != "task":  # a verifier's own score is shown whatever it counts for
        assert f"train/{name}" not in before[-1]


def test_the_gradient_norm_is_of_the_teachers_rows_that_are_compared() -> None:
    """16. Catches: sampled rows, which have no penalty, that make it small; a weight in it."""
    spy = Spy()
    module = gad(r1=0.1)
    module.configure_model()
    batch = duel_batch(1, groups=2, size=4, answers=2)
    module.trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    with torch.no_grad():
        rows = module.judge(batch).rows
    norms = []
    for i in (~batch.on_policy).nonzero()[:, 0].tolist():
        ids = rows.input_ids[i][rows.attention_mask[i]]
        body = module.discriminator.body
        embedded = body.get_input_embeddings()(ids)[None].detach().requires_grad_()
        hidden = body(inputs_embeds=embedded).last_hidden_state[0, -1]
        (gradient,) = torch.autograd.grad(module.discriminator.head(hidden[None]).sum(), embedded)
        norms.append(float(gradient.norm()))
    fit(module, [batch], spy)
    assert spy.metrics[0]["train/discriminator/gradient_norm"] == pytest.approx(sum(norms) / 3, rel=1e-4)
