"""The meta reward model: its loss, that cuts never show, that it learns, and that what it exports scores the same.

Legend: ``B`` judgements.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import ranks_meta
import torch
import toys
from launching import on_two_ranks
from torch.nn.functional import binary_cross_entropy_with_logits
from trajectories import line, lines, write

from lightning_onpolicy.cli import main
from lightning_onpolicy.datamodules.judged import PREFERRED
from lightning_onpolicy.datamodules.judging.meta import MetaReading
from lightning_onpolicy.datamodules.judging.trajectories import read_trajectories
from lightning_onpolicy.datamodules.trajectories import TrajectoryDataModule
from lightning_onpolicy.modules import GADDiscriminator, MetaRewardModel, MetaRewardScorer, ScalarModel
from lightning_onpolicy.modules.losses.rightness import rightness_loss
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.specs import LoraSpec

EXTREME = [0.0, 1e-8, 0.3, -0.3, 17.0, 20.5, 88.0, 100.0, -100.0, 1000.0, -1000.0]


def softplus(x: float) -> float:
    """In float64, by definition."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    """In float64, by definition."""
    return math.exp(-softplus(-x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight", [1.0, 2.5])
@pytest.mark.parametrize("right", [True, False])
def test_the_loss_and_its_gradient_are_right_far_out(right: bool, weight: float, dtype: torch.dtype) -> None:
    """Catches: log(sigmoid), whose gradient is NaN or 0 at ±100; a weight on the wrong class; a loss in bfloat16."""
    for x in EXTREME:
        score = torch.tensor([x], dtype=dtype, requires_grad=True)
        given = float(score.detach().double())
        loss, _ = rightness_loss(score, torch.tensor([right]), 1, positive_weight=weight)
        loss.backward()
        scale, sign = (weight, -1.0) if right else (1.0, 1.0)
        bound = 1e-12 if dtype == torch.float64 else 1e-6
        assert float(loss) == pytest.approx(scale * softplus(sign * given), rel=bound, abs=1e-37)
        expected = scale * sign * sigmoid(sign * given)
        bound = 2**-7 if dtype == torch.bfloat16 else bound  # the score's own gradient is rounded
        assert float(score.grad) == pytest.approx(expected, rel=bound, abs=1e-37)


def test_the_loss_is_torchs_and_its_metrics_are_counted() -> None:
    score = torch.tensor([3.0, -2.0, 0.5, -0.1, 9.0], dtype=torch.float64, requires_grad=True)
    right = torch.tensor([True, True, False, False, False])
    keep = torch.tensor([True, True, True, True, False])
    loss, rows = rightness_loss(score, right, 8, positive_weight=3.0, keep_B=keep)
    weight = torch.tensor(3.0, dtype=torch.float64)
    expected = (
        binary_cross_entropy_with_logits(score[:4], right[:4].double(), pos_weight=weight, reduction="sum")
        / 8
    )
    torch.testing.assert_close(loss, expected)
    (got,), (wanted,) = torch.autograd.grad(loss, score), torch.autograd.grad(expected, score)
    torch.testing.assert_close(got, wanted)
    assert {name: value.tolist() for name, value in rows.items()} == {
        "accuracy": [1, 0, 0, 1], "accuracy_right": [1, 0], "accuracy_wrong": [0, 1], "right": [1, 1, 0, 0],
        "score_right": [3.0, -2.0], "score_wrong": [0.5, -0.1],
    }  # fmt: skip
    assert not any(value.requires_grad for value in rows.values())
    nothing, _ = rightness_loss(score, right, 8, keep_B=torch.zeros(5).bool())
    assert float(nothing) == 0 and torch.autograd.grad(nothing, score)[0].tolist() == [0.0] * 5


def scalar(seed: int = 0, *, lora: LoraSpec | None = None, **config: Any) -> ScalarModel:
    policy = toys.policy(seed, max_position_embeddings=128, **config)
    return ScalarModel.copy_of(policy, std=0.02, lora=lora)


def meta(model: Any = None, lr: float = 3e-3, **settings: Any) -> MetaRewardModel:
    return MetaRewardModel(
        model or scalar(), optimizer=lambda params: torch.optim.AdamW(params, lr=lr), **settings
    )


def data(path: str, **settings: Any) -> TrajectoryDataModule:
    return TrajectoryDataModule(path, **{"val_fraction": 0.3, "prompts_per_batch": 16, **settings})


def trainer(folder: Path, epochs: int = 1, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"num_sanity_val_steps": 0, **settings},
    )


def logged(run: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items()}


def test_it_learns_what_sets_right_judgements_apart_on_items_it_never_saw(tmp_path: Path) -> None:
    """Catches: labels the wrong way round, a reply that is not read, a split that leaks nothing and yet no learning."""
    pl.seed_everything(0, verbose=False)
    run, module = trainer(tmp_path, epochs=4, num_sanity_val_steps=2), meta()
    run.fit(module, datamodule=data(write(tmp_path / "t.jsonl", lines(160, 6))))
    found = logged(run)
    assert 0.2 < found["val/right"] < 0.6, "both classes, unevenly"
    for name in ("accuracy", "accuracy_balanced", "auc", "ranking"):
        assert found[f"val/{name}"] > 0.95, (name, found)
    assert found["val/ranking_low"] > 0.9 and found["val/ranking_items"] > 10
    assert found["val/loss"] < 0.2 and found["train/score_right"] > 0 > found["train/score_wrong"]
    held = run.validate(module, datamodule=data(str(tmp_path / "t.jsonl")), verbose=False)[0]
    tested = run.test(module, datamodule=data(str(tmp_path / "t.jsonl")), verbose=False)[0]
    assert held == {name: pytest.approx(found[name]) for name in held}
    assert {name.removeprefix("test/") for name in tested} == {name.removeprefix("val/") for name in held}
    assert tested["test/ranking"] == held["val/ranking"]


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_cut_into_micro_batches_never_shows(minibatches: int, tmp_path: Path) -> None:
    """Catches: a mean per micro-batch, and a weight that divides."""
    path = write(tmp_path / "t.jsonl", lines(12, 4))
    found = []
    for budget in (1, 200, 10**6):
        module = MetaRewardModel(
            scalar(scale=2.0),
            positive_weight=2.0,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
            loop=LoopSpec(micro_batch_tokens=budget, minibatches=minibatches, max_grad_norm=None),
        )
        before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        run = trainer(tmp_path)
        run.fit(module, datamodule=data(path, prompts_per_batch=15, steps_per_epoch=2))
        moved = {name: p.detach() - before[name] for name, p in module.model.named_parameters()}
        found.append((moved, logged(run)))
    assert max(float(change.abs().max()) for change in found[0][0].values()) > 1e-2
    for moved, metrics in found[1:]:
        for name, change in moved.items():
            torch.testing.assert_close(change, found[0][0][name], rtol=1e-3, atol=2e-6)
        assert metrics == {
            name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in found[0][1].items()
        }


@pytest.mark.parametrize("lora", [None, LoraSpec(r=4)], ids=["full", "lora"])
def test_what_is_exported_scores_the_same(lora: LoraSpec | None, tmp_path: Path) -> None:
    """Catches: a scorer that reads otherwise than in training: another order, template, limit or EOS."""
    path = write(tmp_path / "t.jsonl", [*lines(40, 3), *lines(40, 1, outcome="truncated", source="cut")])
    reading = MetaReading(think_end="t3", chat_options={"unused": 1}, max_reply_tokens=7)
    module = meta(scalar(lora=lora), export=str(tmp_path / "export"), loop=LoopSpec(micro_batch_tokens=300))
    run, held = trainer(tmp_path), data(path, reading=reading)
    run.fit(module, datamodule=held)
    batch = next(iter(held.val_dataloader()))
    expected = module.score(batch)
    assert float(expected.std()) > 1e-3, "the comparison says something"

    loaded = ScalarModel.from_pretrained(str(tmp_path / "export")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.scores(batch.input_ids, batch.attention_mask), expected)
    scorer = MetaRewardScorer(str(tmp_path / "export"), micro_batch_tokens=200, device="cpu")
    assert scorer.reading == reading and MetaRewardScorer(scalar()).reading == MetaReading()
    every = read_trajectories([path])
    got = scorer.score([t.item for t in every], [t.sample for t in every])
    assert [score is None for score in got] == [t.sample.scores is None for t in every]
    wanted = held.sides["val"][: len(batch)]
    scores = scorer.score([t.item for t in wanted], [t.sample for t in wanted])
    counted = int(batch.extra["counted"].sum())
    assert counted > 8
    torch.testing.assert_close(torch.tensor(scores[:counted]), expected[:counted])
    assert scorer.score([], []) == []

    again = MetaRewardModel(str(tmp_path / "export"))  # and trains on from there
    again.configure_model()
    torch.testing.assert_close(again.model.head.weight, module.model.head.weight)


def test_a_judgement_longer_than_the_models_positions_has_no_score(tmp_path: Path) -> None:
    """Catches: the scores of positions that no training reached, which look like any other."""
    rows = [line("i0"), {**line("i1"), "text": "t1 " * 200}, line("i2"), line("i3", outcome="missing")]
    every = read_trajectories([write(tmp_path / "t.jsonl", rows)])
    scorer = MetaRewardScorer(scalar(), device="cpu")
    items, samples = [t.item for t in every], [t.sample for t in every]
    scores = scorer.score(items, samples)
    assert [score is None for score in scores] == [False, True, False, True]
    assert scores[2:3] == pytest.approx(scorer.score(items[2:3], samples[2:3]))
    assert scorer.score(items[1:2], samples[1:2]) == [None]


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)], ids=["full", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one(lora: LoraSpec | None, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", lines(20, 3))

    def run(epochs: int, checkpoint: Path | None = None) -> tuple[pl.Trainer, MetaRewardModel]:
        pl.seed_everything(0, verbose=False)
        module = meta(scalar(lora=lora, attention_dropout=0.2))
        fit = trainer(tmp_path, epochs)
        fit.fit(module, datamodule=data(path, steps_per_epoch=3), ckpt_path=checkpoint)
        return fit, module

    whole, expected = run(2)
    first, halfway = run(1)
    first.save_checkpoint(tmp_path / "c.ckpt")
    second, resumed = run(2, tmp_path / "c.ckpt")
    for (name, value), other in zip(
        resumed.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    assert any(not p.equal(q) for p, q in zip(halfway.parameters(), expected.parameters(), strict=True))
    assert logged(second) == logged(whole) and second.global_step == 6


def test_settings_and_batches_that_are_wrong(tmp_path: Path) -> None:
    for key, value in (("positive_weight", 0.0), ("head_std", -1.0)):
        with pytest.raises(ValueError, match=f"{key} must be"):
            meta(**{key: value})
    module = meta()
    with pytest.raises(
        TypeError, match="MetaRewardModel cannot train on these batches: use TrajectoryDataModule"
    ):
        module.training_step(toys.batch(), 0)
    pairs = toys.batch().with_extra(**{PREFERRED: torch.tensor([True, False] * 3)})
    with pytest.raises(TypeError, match="use TrajectoryDataModule"):
        module.validation_step(pairs, 0)
    with pytest.raises(TypeError, match="GADDiscriminator cannot train on these batches: use PairDataModule"):
        GADDiscriminator(scalar()).training_step(toys.batch(), 0)


def test_the_quickstart_trains_from_the_command_line(tmp_path: Path) -> None:
    """With a stand-in for the judge's model and its trajectories."""
    path = write(tmp_path / "t.jsonl", lines(30, 4, n=3))
    main(
        [
            "fit",
            "-c",
            "quickstart/spct_meta",
            f"--data.init_args.path={path}",
            "--model.init_args.model.path=onpolicy://quickstart/models/student",
            f"--model.init_args.export={tmp_path / 'export'}",
            f"--trainer.default_root_dir={tmp_path}",
            f"--trainer.logger.init_args.save_dir={tmp_path}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.max_steps=2",
            "--data.init_args.prompts_per_batch=4",
            "--data.init_args.reading.max_reply_tokens=64",
        ]
    )
    item = read_trajectories([path])[0]
    score = MetaRewardScorer(str(tmp_path / "export"), device="cpu").score([item.item], [item.sample])[0]
    assert score is not None and math.isfinite(score)
    header = next(iter((tmp_path / "logs").rglob("metrics.csv"))).read_text().split("\n")[0].split(",")
    assert {"train/loss", "train/accuracy", "train/right"} <= set(header)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(strategy: str, tmp_path: Path) -> None:
    """Catches: a mean over ranks of means, padding pieces that are trained on, repeats that are validated twice."""
    path = write(
        tmp_path / "t.jsonl", [*lines(20, 3), *lines(10, 3, first=20, n=9)]
    )  # pieces of unequal number
    one = ranks_meta.run("auto", path, tmp_path)
    out = tmp_path / "result.pt"
    on_two_ranks(ranks_meta, strategy, path, out)
    two = torch.load(out, weights_only=True)
    before = ranks_meta.start().state_dict()
    assert max(float((value - before[name]).abs().max()) for name, value in one["weights"].items()) > 1e-3
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-4, atol=2e-6)
    assert (
        {"val/auc", "val/ranking", "val/right", "train/loss"}
        <= two["metrics"].keys()
        == one["metrics"].keys()
    )
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
