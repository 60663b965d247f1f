"""Precisions, strategies and optimizers that a configuration may name: those that work, and those that are refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from fits import trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from workspace import Remember, onpolicy, workspace

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.specs import LoraSpec

BF16 = 2.0**-8  # relative spacing of bfloat16


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)]
)
def test_half_precision_trains_with_the_ratio_of_its_rounding(
    precision: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Sampling runs in the precision of training, so the ratio leaves 1 by rounding alone."""
    student = toys.policy(0, scale=3.0)
    module = OnPolicyDistill(
        student, toys.policy(1, scale=3.0), optimizer=lambda params: torch.optim.SGD(params, lr=1.0)
    )
    before = {k: v.clone() for k, v in student.state_dict().items()}
    rows = [{"prompt": f"t{i} t{i + 1}"} for i in range(4)]
    data = OnPolicyDataModule(
        train=rows, prompts_per_batch=4, group_size=2, steps_per_epoch=1, sampling=Sampling(max_new_tokens=8)
    )
    run = trainer(tmp_path, [], precision=precision)
    run.fit(module, datamodule=data)
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert run.global_step == 1
    assert any(not torch.equal(v, before[k].to(v.dtype)) for k, v in student.state_dict().items())
    metrics = run.callback_metrics
    assert float(metrics["train/mismatch_max_log_ratio"]) < 2 * BF16
    assert abs(float(metrics["train/mismatch_ratio"]) - 1) < BF16
    assert bool(torch.isfinite(metrics["train/loss"]))


def test_what_half_precision_would_swallow_is_said(tmp_path: Path) -> None:
    """Catches: adapters that Lightning casts to bfloat16, in which small steps round away; whole weights likewise."""
    rows = [{"prompt": "t1 t2"}]
    data = OnPolicyDataModule(
        train=rows, prompts_per_batch=1, group_size=1, sampling=Sampling(max_new_tokens=2)
    )
    adapted = Policy(toys.llama(0), toys.tokenizer(), lora=LoraSpec(r=2))
    for student, refused in ((adapted, True), (toys.policy(0), False)):
        module = OnPolicyDistill(student, toys.policy(1))
        run = trainer(tmp_path, [], precision="bf16-true", limit_train_batches=1)
        if refused:
            with pytest.raises(
                ValueError, match=r"has cast the adapters.*precision to 32-true or bf16-mixed"
            ):
                run.fit(module, datamodule=data)
        else:
            with pytest.warns(UserWarning, match="train in half precision.*bf16-mixed"):
                run.fit(module, datamodule=data)


def test_adapters_over_weights_in_half_precision_take_small_steps(tmp_path: Path) -> None:
    """Catches: bfloat16 adapters, in which a step of less than 1/256 of a weight rounds away."""
    student = Policy(toys.llama(0, scale=3.0).to(torch.bfloat16), toys.tokenizer(), lora=LoraSpec(r=2))
    module = OnPolicyDistill(
        student, toys.policy(1, scale=3.0), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-6)
    )
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    rows = [{"prompt": f"t{i} t{i + 1}"} for i in range(4)]
    data = OnPolicyDataModule(
        train=rows, prompts_per_batch=4, group_size=2, steps_per_epoch=2, sampling=Sampling(max_new_tokens=8)
    )
    run = trainer(tmp_path, [])
    run.fit(module, datamodule=data)
    for name, p in student.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
        moved = (p != before[name]).float().mean()
        assert moved == 0 if not p.requires_grad else moved > 0.9, (name, moved)
    assert float(run.callback_metrics["train/mismatch_max_log_ratio"]) < 2 * BF16


@pytest.mark.parametrize(
    ("strategy", "precision", "named"),
    [
        (FSDPStrategy(), "32-true", "ModelParallelStrategy"),
        (object.__new__(DeepSpeedStrategy), "32-true", "DeepSpeed"),  # making one needs the package
        (SingleDeviceStrategy(), "16-mixed", "bf16-mixed"),
    ],
    ids=["fsdp1", "deepspeed", "16-mixed"],
)
def test_what_would_be_silently_wrong_is_refused_in_one_sentence(
    strategy: Any, precision: str, named: str
) -> None:
    module = OnPolicyDistill(toys.policy(0), toys.policy(1))
    module.trainer = SimpleNamespace(strategy=strategy, precision=precision)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=named) as refused:
        module.setup("fit")
    assert "\n" not in str(refused.value)
    module.setup("validate")  # evaluating takes no optimizer step


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_what_works_is_not_refused(precision: str) -> None:
    for strategy in (SingleDeviceStrategy(), DDPStrategy()):
        parallel.refuse_unfit(SimpleNamespace(strategy=strategy, precision=precision))


@pytest.mark.parametrize(("replicas", "warned"), [(1, True), (2, True), (4, False)])
def test_ranks_that_repeat_each_others_work_are_warned_of(replicas: int, warned: bool) -> None:
    """Catches: Lightning's default, tensor parallelism within a node, which trains alike at a fraction of the speed."""
    strategy = object.__new__(type("Split", (ModelParallelStrategy,), {"distributed_sampler_kwargs": None}))
    type(strategy).distributed_sampler_kwargs = {"num_replicas": replicas}  # as it reports once it is set up
    run = SimpleNamespace(strategy=strategy, precision="bf16-mixed", world_size=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parallel.refuse_unfit(run)
    said = [str(w.message) for w in caught]
    assert any("data_parallel_size=4, tensor_parallel_size=1" in text for text in said) is warned, said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run.yaml`` and what it names."""
    return workspace(tmp_path_factory.mktemp("precision")).parent


@pytest.mark.parametrize(
    "name",
    [
        "torch.optim.AdamW",
        "torch.optim.SGD",
        "bitsandbytes.optim.AdamW8bit",
        "bitsandbytes.optim.PagedAdamW8bit",
    ],
)
def test_optimizers_are_named_in_configurations(name: str, place: Path, tmp_path: Path) -> None:
    flags = [f"--model.init_args.optimizer={name}", "--model.init_args.optimizer.init_args.lr=0.01"]
    if name.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        flags.append("--model.init_args.optimizer.init_args.min_8bit_size=1024")
    warm_up = {"start_factor": 0.5, "total_iters": 4}
    schedule = json.dumps({"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": warm_up})
    flags += [f"--model.init_args.scheduler={schedule}", f"--trainer.default_root_dir={tmp_path}"]
    assert onpolicy("fit", "-c", place / "run.yaml", *flags) == 0
    module = Remember.module()
    optimizer = module.optimizers().optimizer
    package, _, kind = name.rpartition(".")
    assert type(optimizer).__name__ == kind
    assert type(optimizer).__module__.startswith(package)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.75), "two of four steps of warm-up"
    fresh = module.student.load().state_dict()
    moved = [not torch.equal(v, fresh[k]) for k, v in module.policy.state_dict().items()]
    assert all(moved)
    if name.endswith("8bit"):
        assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())
