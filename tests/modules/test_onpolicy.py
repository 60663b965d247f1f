"""The shared loop: partition invariance, clipping, counting, checkpoints, refusals."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import toys
from torch.utils.data import DataLoader

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.microbatch import (
    cut_groups,
    cut_micro_batches,
    split_groups,
    split_minibatches,
)
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.policy import LoraSpec, Policy
from lightning_onpolicy.modules.supervised import SupervisedFineTune


def trainer(**kwargs: Any) -> pl.Trainer:
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**settings, **kwargs})


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)


def fit(module: pl.LightningModule, batches: list[RolloutBatch], **kwargs: Any) -> pl.Trainer:
    run = trainer(**kwargs)
    run.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    return run


def distill(**kwargs: Any) -> OnPolicyDistill:
    return OnPolicyDistill(
        toys.policy(0, scale=2.0), toys.policy(1, hidden=48, scale=2.0), optimizer=sgd, **kwargs
    )


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.policy.state_dict().items()}


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_the_cut_into_micro_batches_never_shows(reduction: Any) -> None:
    """Catches: dividing by a micro-batch's own count, dropping or repeating rows."""
    results = []
    for budget in (8, 30, 100_000):
        module = distill(reduction=reduction, loop=LoopSpec(micro_batch_tokens=budget, max_grad_norm=None))
        if reduction == "sum":
            module.optimizer_callable = lambda p: torch.optim.SGD(p, lr=0.01)
        run = fit(module, [toys.batch(3, groups=6, size=2)])
        results.append((weights(module), float(run.callback_metrics["train/loss"])))
    for state, loss in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, results[0][0][name], rtol=1e-5, atol=2e-6)


def test_minibatches_and_updates_are_optimizer_steps_that_count() -> None:
    module = distill(loop=LoopSpec(updates=2, minibatches=3))
    run = fit(module, [toys.batch(i) for i in range(2)])
    assert run.global_step == 2 * 2 * 3


def test_clipping_is_by_the_global_norm() -> None:
    start = weights(distill_built := distill())
    batch = [toys.batch(0)]
    free = distill(loop=LoopSpec(max_grad_norm=None))
    norm = float(fit(free, batch).callback_metrics["train/grad_norm"])
    clipped = distill(loop=LoopSpec(max_grad_norm=norm / 4))
    assert float(fit(clipped, batch).callback_metrics["train/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for name, value in weights(clipped).items():
        full = weights(free)[name] - start[name]
        torch.testing.assert_close(value - start[name], full / 4, rtol=1e-3, atol=1e-6)
    assert distill_built.loop.max_grad_norm == 1.0


def test_a_schedule_steps_once_per_optimizer_step() -> None:
    module = distill(loop=LoopSpec(minibatches=2))
    module.scheduler_callable = lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5)
    run = fit(module, [toys.batch(i) for i in range(3)])
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 0.5**6)


def test_nothing_to_train_on_is_an_error_and_moves_nothing() -> None:
    import dataclasses

    module = distill()
    before = weights(module)
    empty = toys.batch(0)
    empty = dataclasses.replace(empty, response_mask=torch.zeros_like(empty.response_mask))
    with pytest.raises(ValueError, match="no trainable token"):
        fit(module, [empty])
    for name, value in weights(module).items():
        assert torch.equal(value, before[name])


def test_a_gradient_that_is_not_finite_is_an_error_before_the_step() -> None:
    module = distill()
    before = weights(module)
    with torch.no_grad():
        module.policy.model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="gradient norm is nan at step 0"):
        fit(module, [toys.batch(0)])
    for name, value in weights(module).items():
        if "norm.weight" not in name:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("setting", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_automatic_optimisation_settings_are_refused(setting: dict[str, Any]) -> None:
    """Lightning itself refuses; this pins that it goes on doing so."""
    with pytest.raises(Exception, match=r"not supported for manual optimization"):
        fit(distill(), [toys.batch(0)], **setting)


def test_foreign_batches_are_refused_by_type() -> None:
    with pytest.raises(TypeError, match="trains on RolloutBatch, got Tensor"):
        fit(distill(), [torch.zeros(2)])  # type: ignore[list-item]


def test_the_teacher_is_not_in_the_checkpoint_and_a_misfit_is_an_error(tmp_path: Any) -> None:
    module = distill()
    run = fit(module, [toys.batch(0)])
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all(name.startswith("policy.") for name in saved)
    other = distill()
    other.load_state_dict(saved)
    for name, value in weights(module).items():
        assert torch.equal(value, weights(other)[name])
    broken = dict(saved)
    broken.pop(next(iter(broken)))
    with pytest.raises(RuntimeError, match="does not fit OnPolicyDistill: missing"):
        other.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="unexpected"):
        other.load_state_dict({**saved, "policy.other": torch.zeros(1)})


def test_adapters_train_alone_and_are_all_that_is_saved(tmp_path: Any) -> None:
    student = Policy(toys.llama(0, tie=False), toys.tokenizer(), lora=LoraSpec(r=2))
    base = {k: v.clone() for k, v in student.state_dict().items() if "lora" not in k}
    module = OnPolicyDistill(student, "base", optimizer=sgd)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    fit(module, [toys.batch(0)])
    assert all("lora" in name for name in module.state_dict())
    for name, value in student.state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, base[name]), name


def test_supervised_loss_is_the_negative_log_likelihood() -> None:
    module = SupervisedFineTune(toys.policy(0, scale=2.0), optimizer=sgd)
    batch = toys.batch(0)
    model = toys.llama(0, scale=2.0)
    logp = model(batch.input_ids).logits[..., :24].log_softmax(-1)
    mask = batch.response_mask[:, 1:]
    expected = -logp[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0][mask].mean()
    run = fit(module, [batch])
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_cut_micro_batches_covers_every_row_once_within_the_budget() -> None:
    lengths = [3, 0, 17, 5, 5, 9, 1, 40]
    pieces = cut_micro_batches(lengths, 20)
    assert sorted(i for piece in pieces for i in piece) == [0, 2, 3, 4, 5, 6, 7]
    for piece in pieces:
        assert len(piece) == 1 or len(piece) * max(lengths[i] for i in piece) <= 20
    assert cut_micro_batches([], 5) == []
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        cut_micro_batches([1], 0)
    assert split_minibatches(3, 4) == [[0], [1], [2], []]


def test_whole_groups_are_never_parted() -> None:
    lengths, groups = [5, 9, 2, 7, 3, 9, 0, 4], [0, 1, 0, 1, 2, 3, 3, 2]
    for budget in (1, 18, 20, 40, 1000):
        pieces = cut_groups(lengths, groups, budget)
        assert sorted(i for piece in pieces for i in piece) == [0, 1, 2, 3, 4, 5, 7]  # one row has no token
        homes = [{groups[i] for i in piece} for piece in pieces]
        assert sum(map(len, homes)) == len(set(groups))
        for piece, home in zip(pieces, homes, strict=True):
            assert len(home) == 1 or len(piece) * max(lengths[i] for i in piece) <= budget
    assert cut_groups([], [], 5) == []
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        cut_groups([1], [0], 0)
    assert split_groups([7, 7, 5, 7, 5, 2], 2) == [[0, 1, 3, 5], [2, 4]]
    assert split_groups([7, 7, 5, 7, 5, 2], 4)[2:] == [[5], []]
