"""A reward model by itself: validation to the pair, micro-batches that never show, resuming, its scores as a reward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import toys
from duels import TOKENIZER, Spy, duel_batch, fit

from lightning_onpolicy.datamodules import PairDataModule
from lightning_onpolicy.datamodules.given import group_of
from lightning_onpolicy.datamodules.preferences import PreferenceLoader
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.modules import GADDiscriminator, ScalarModel, ScalarReward
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.policy import Policy, recompute_activations
from lightning_onpolicy.modules.specs import LoraSpec


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged random answers, one or two on each side."""
    g = torch.Generator().manual_seed(seed)

    def text() -> str:
        words = torch.randint(0, toys.WORDS, (int(torch.randint(1, 6, (), generator=g)),), generator=g)
        return " ".join(f"t{n}" for n in words.tolist())

    return [
        {
            "prompt": text(),
            "uid": f"p{i}",
            "chosen": [text() for _ in range(1 + i % 2)],
            "rejected": [text() for _ in range(1 + i // 2 % 2)],
        }
        for i in range(count)
    ]


def model(lora: bool = False) -> ScalarModel:
    policy = Policy(toys.llama(0, tie=False, scale=2.0), TOKENIZER)
    torch.manual_seed(3)  # of the adapters
    return ScalarModel.copy_of(policy, lora=LoraSpec(r=2) if lora else None, std=0.2)


def loader(steps: int = 3) -> PreferenceLoader:
    return PreferenceLoader(PromptStream(rows(9), TOKENIZER), TOKENIZER, prompts_per_batch=4, steps=steps)


def quiet(**options: Any) -> pl.Trainer:
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    return pl.Trainer(**settings, enable_progress_bar=False, enable_model_summary=False, **options)


def test_validation_is_exact_however_it_is_cut() -> None:
    """Catches: a last batch filled up with the first prompts, a mean of means, a pass that starts elsewhere."""
    held_out = rows(7)
    judge = model().eval()
    reward = ScalarReward(judge)
    right = []
    for row in held_out:
        group = group_of(row, *row["chosen"], *row["rejected"])
        scores = torch.tensor(reward.score([group])[0])
        chosen, rejected = scores[: len(row["chosen"])], scores[len(row["chosen"]) :]
        right.append(float((chosen[:, None] > rejected[None]).double().mean()))
    judge.requires_grad_(True)
    expected = sum(right) / len(right)
    assert 0 < expected < 1
    for size in (1, 3, 7, 50):
        module = GADDiscriminator(judge, loop=LoopSpec(micro_batch_tokens=20))
        data = PairDataModule(val=held_out, prompts_per_batch=size)
        trainer = quiet()
        for _ in range(2):
            (found,) = trainer.validate(module, datamodule=data, verbose=False)
            assert found["val/accuracy"] == pytest.approx(expected), size


@pytest.mark.parametrize("budget", [1, 30, 60])
def test_no_micro_batch_shows(budget: int) -> None:
    """Groups of several answers on either side, a penalty, smoothing."""
    found = []
    for tokens in (budget, 100_000):
        module = GADDiscriminator(
            model(),
            pairs={"smoothing": 0.1, "score_penalty": 0.05},
            r1=0.01,
            optimizer=lambda p: torch.optim.SGD(p, lr=2e-3),
            loop=LoopSpec(micro_batch_tokens=tokens, max_grad_norm=None),
        )
        spy = Spy()
        fit(module, loader(), spy)
        found.append((module.state_dict(), spy.metrics))
    (cut, seen), (whole, expected) = found
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=2e-6, rtol=2e-5, msg=name)
    assert float((whole["model.head.weight"] - model().head.weight.detach()).abs().max()) > 1e-3
    for one, other in zip(seen, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=2e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_a_gradient_penalty_does_not_see_checkpointing(lora: bool) -> None:
    """Catches: a backward pass that computes attention again by another kernel."""
    weights = []
    for checkpointing in (False, True):
        judge = model(lora)
        if checkpointing:
            recompute_activations(judge.body)
        module = GADDiscriminator(judge, r1=0.1, optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))
        fit(module, loader(2))
        weights.append(module.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    """Catches: a dry run over a trained model, a folder of somebody's that loses its place, an error after hours."""
    target = tmp_path / "judge"

    def train(seed: int, **options: Any) -> None:
        judge = model()
        torch.nn.init.constant_(judge.head.weight, float(seed))
        module = GADDiscriminator(judge, export=str(target), optimizer=lambda p: torch.optim.SGD(p, lr=1e-9))
        quiet(max_epochs=1, **options).fit(module, loader(1))

    for seed, options, expected in ((1, {}, 1.0), (2, {"fast_dev_run": 1}, 1.0), (3, {}, 3.0)):
        train(seed, **options)
        assert float(ScalarModel.from_pretrained(str(target)).head.weight[0, 0]) == pytest.approx(expected)
    target = tmp_path / "papers"
    target.mkdir()
    (target / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not an earlier export"):
        train(4)
    assert [p.name for p in target.iterdir()] == ["notes.txt"]


def test_a_reward_asks_with_the_system_message_of_its_prompts() -> None:
    """Catches: a model trained behind a system message that scores without one."""
    judge = model().eval()
    (prompt,) = PromptStream([{"prompt": "t3 t4"}], TOKENIZER, system="t9", shuffle=False).take(1)
    group = replace(group_of({"prompt": "t3 t4"}, "t1 t2", "t5"), prompt=prompt)
    plain = group_of({"prompt": "t3 t4"}, "t1 t2", "t5")
    reward = ScalarReward(judge)
    assert reward.score([group]) == ScalarReward(judge, system="t9").score([plain]) != reward.score([plain])
    with pytest.raises(ValueError, match="parts of a chat"):
        ScalarReward(judge, chat=False, system="t9")


@pytest.mark.parametrize("lora", [False, True])
def test_it_resumes_bit_for_bit(lora: bool, tmp_path: Path) -> None:
    def make() -> GADDiscriminator:
        return GADDiscriminator(
            model(lora),
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
            scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        )

    whole, resumed, spy, after = make(), make(), Spy(tmp_path / "a.ckpt", 1), Spy()
    first = fit(whole, loader(4), spy)
    second = fit(resumed, loader(4), after, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert first.global_step == second.global_step == 4
    assert spy.metrics[2:] == after.metrics
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert second.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.9**4)


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(TypeError, match="use PairDataModule"):
        fit(GADDiscriminator(model()), [duel_batch(1)])
    with pytest.raises(ValueError, match=r"r1.* must be >= 0"):
        GADDiscriminator(model(), r1=-1.0)


def test_a_reward_reads_answers_as_training_does() -> None:
    """Same ids, same EOS, same cut; any budget, any company. Catches: an EOS after what was cut, another order."""
    judge = model().eval()
    groups = [
        group_of({"prompt": "t3 t4"}, "t1 t2", "t5", ""),
        group_of({"prompt": "t6"}, "t7 t8 t9 t10"),
    ]
    cut = replace(groups[0].completions[0], finish="length")
    groups[0] = replace(groups[0], completions=(cut, *groups[0].completions[1:]))
    asked = {"t3 t4": [0, 3, 4, 1], "t6": [0, 6, 1]}  # as the template has them
    answers = [[[1, 2], [5, 22], [22]], [[7, 8, 9]]]  # at most three tokens
    for budget in (1, 100):
        reward = ScalarReward(judge, max_response_tokens=3, micro_batch_tokens=budget)
        for group, found, expected in zip(groups, reward.score(groups), answers, strict=True):
            for score, ids in zip(found, expected, strict=True):
                row = torch.tensor([[*asked[group.prompt.text], *ids]])
                with torch.no_grad():
                    alone = judge.head(judge.body(input_ids=row).last_hidden_state[:, -1])
                assert score == pytest.approx(float(alone), abs=1e-5)
    assert reward.score([]) == []
    assert not any(p.requires_grad for p in judge.parameters())
