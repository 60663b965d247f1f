"""Resets of reference and optimizer: exact, complete, nothing else touched, and the same across a resume."""

from __future__ import annotations

import copy
import importlib.util
import types
from pathlib import Path
from typing import Any

import anchored
import pytest
import torch
import toys
from anchored import Anchored, Saving, Spy, Stream, everything
from launching import on_two_ranks
from torch import nn
from torch.utils.data import DataLoader

from lightning_onpolicy.callbacks.optimizers import forget, restore_lr, scale_lr
from lightning_onpolicy.callbacks.resets import OptimizerReset, ReferenceReset
from lightning_onpolicy.callbacks.triggers import Ceiling, EveryNSteps, Stall
from lightning_onpolicy.callbacks.weights import check_copyable, copy_weights, put_weights, take_weights
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.losses.settings import KLSpec

EXAMPLE = Path(__file__).with_name("reset_example.py")
RISING = [float(i) for i in range(40)]


def fit(callbacks: list[Any], batches: int = 6, module: Any = None, **options: Any) -> tuple[Anchored, Any]:
    module = module or Anchored()
    data = {"train_dataloaders": Stream(batches)}
    resume = {k: options.pop(k) for k in ("ckpt_path",) if k in options}
    if "val_check_interval" in options:
        data["val_dataloaders"], options["limit_val_batches"] = Stream(1), 1
    run = anchored.trainer(callbacks, **options)
    run.fit(module, **data, **resume, **({"weights_only": True} if resume else {}))
    return module, run


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- the reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [False, True])
def test_after_a_reset_kl_is_exactly_0_and_nothing_is_shared(manual: bool) -> None:
    """Catches: a reset one step late, an alias instead of a copy, buffers left behind, a policy that was touched."""
    plain: list[Any] = []
    fit([Spy(lambda t, m, i: plain.append(copy.deepcopy(m.policy.state_dict())))], 3, Anchored(manual=manual))
    seen: list[Any] = []

    def look(trainer: Any, module: Any, batch_idx: int) -> None:
        seen.append((copy.deepcopy(module.policy.state_dict()), copy.deepcopy(module.reference.state_dict())))
        if batch_idx == 2:
            with torch.no_grad():  # moves nothing in the reference
                memory = {t.untyped_storage().data_ptr() for t in module.policy.state_dict().values()}
                for tensor in module.reference.state_dict().values():
                    assert tensor.untyped_storage().data_ptr() not in memory
            assert not any(p.requires_grad for p in module.reference.parameters())

    steps = 2 if manual else 1
    reset = ReferenceReset(EveryNSteps(3 * steps))
    module = Anchored(manual=manual)
    start = copy.deepcopy(module.reference.state_dict())
    module.policy.temperature.fill_(1.25)
    plainer = Anchored(manual=manual)
    plainer.policy.temperature.fill_(1.25)
    plain.clear()
    fit([Spy(lambda t, m, i: plain.append(copy.deepcopy(m.policy.state_dict())))], 3, plainer)
    module, run = fit([reset, Spy(look)], 5, module)
    assert same(seen[1][1], start) and same(seen[2][0], seen[2][1]) and same(seen[4][1], seen[2][1])
    assert same(seen[2][0], plain[2])
    assert float(seen[2][1]["temperature"]) == 1.25
    assert module.kls[3] == 0.0
    assert all(kl > 0 for i, kl in enumerate(module.kls) if i not in (0, 3)), module.kls
    assert (reset.count, reset.last_step, module.told) == (1, 3 * steps, 1)
    assert run.callback_metrics["reset/reference"] == 1
    assert run.callback_metrics["reset/reference_step"] == 3 * steps


def test_a_stall_resets_between_validation_and_the_next_batch() -> None:
    """Catches: a reset after the next batch has been made, a sanity check that counts, one line per rank or none."""
    module = Anchored(scores=[9.0, 1.0, 1.0, 1.0, 2.0, 3.0])
    reset = ReferenceReset(Stall("score", patience=2))
    module, _ = fit([reset], 5, module, val_check_interval=1, num_sanity_val_steps=1)
    assert (reset.count, reset.last_step) == (1, 3)
    assert module.kls[3] == 0.0 and module.kls[2] > 0 and module.kls[4] > 0


def test_accumulated_batches_are_not_steps() -> None:
    """Catches: a reset in the middle of an accumulated gradient, patience that counts batches without a step."""
    module, _ = fit(
        [reset := ReferenceReset(Ceiling("kl", limit=-1.0, patience=2))], 8, accumulate_grad_batches=2
    )
    assert (reset.count, reset.last_step) == (2, 4)
    assert [i for i, kl in enumerate(module.kls) if kl == 0.0] == [0, 1, 4, 5]


@pytest.mark.parametrize("restore_policy", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_the_best_policy_is_what_it_was_at_its_step(restore_policy: bool, hook: bool) -> None:
    """Catches: the best by an alias that trains on, the newest instead of the best, a policy rolled back unasked."""
    after: dict[int, Any] = {}

    def look(trainer: Any, module: Any, batch_idx: int) -> None:
        after[batch_idx + 1] = copy.deepcopy(module.policy.state_dict())

    module = Anchored(scores=[0.0, 1.0, 7.0, 3.0, 3.0, 8.0, 3.0])
    if hook:
        module.reset_reference = lambda: copy_weights(module.policy, module.reference)  # type: ignore[attr-defined]
    reset = ReferenceReset(EveryNSteps(4), target="best", monitor="score", restore_policy=restore_policy)
    module, _ = fit([Spy(look), reset], 5, module, val_check_interval=1)
    assert (reset.count, reset.best_step, reset.best_score) == (1, 5, 8.0)
    assert same(module.reference.state_dict(), after[2])
    assert (module.kls[4] == 0.0) == restore_policy
    unreset, _ = fit([], 4)
    assert same(after[4], unreset.policy.state_dict())  # until the reset, nothing differs


def test_the_best_may_be_the_lowest() -> None:
    reset = ReferenceReset(EveryNSteps(9), target="best", monitor="score", mode="min")
    fit([reset], 5, Anchored(scores=[0.0, 4.0, 3.0, 2.0, float("nan"), 5.0]), val_check_interval=1)
    assert (reset.best_step, reset.best_score) == (3, 2.0)


def test_a_validation_of_the_same_weights_is_no_second_reading() -> None:
    """Catches: patience that runs out while gradients accumulate."""
    reset = ReferenceReset(Stall("score", patience=1))
    fit([reset], 6, Anchored(scores=RISING), val_check_interval=1, accumulate_grad_batches=2)
    assert reset.count == 0 and reset._states is not None and reset._states[0]["best"] == 3.0


def test_a_validation_outside_training_is_not_read() -> None:
    """Catches: ``trainer.validate`` that resets the reference."""
    reset = ReferenceReset(Stall("score", patience=1))
    module, run = fit([reset], 5, Anchored(scores=RISING), val_check_interval=2)
    module.scores = [-1.0] * 40
    run.validate(module, Stream(1), verbose=False)
    assert reset.count == 0 and reset._states is not None and reset._states[0]["best"] == 4.0


def test_a_rolled_back_policy_is_the_best_one(tmp_path: Path) -> None:
    path, seen = tmp_path / "a.ckpt", []
    module = Anchored(scores=[0.0, 1.0, 7.0, 3.0, 3.0])
    reset = ReferenceReset(EveryNSteps(4), target="best", monitor="score", restore_policy=True)
    look = Spy(lambda t, m, i: seen.append(copy.deepcopy(m.policy.state_dict())))
    fit([reset, look, Saving(path, 4)], 4, module, val_check_interval=1)
    assert same(seen[3], seen[1]) and not same(seen[3], seen[2])
    saved = torch.load(path, weights_only=True)
    best = saved["callbacks"][reset.state_key]["best"]
    assert best.keys() == seen[1].keys()  # what trains, and buffers; for adapters, the adapters
    assert same(best, seen[1])


# -- the optimizer ------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "8bit": lambda p: __import__("bitsandbytes").optim.AdamW8bit(p, lr=0.05, min_8bit_size=16),
}


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_an_optimizer_forgets_everything_and_weights_stay(kind: str, manual: bool) -> None:
    """The next step equals the first step of a new optimizer from the same weights.

    Catches: moments or ``step`` left, an update lost, weights moved by the reset.
    """
    before: list[Any] = []

    def look(trainer: Any, module: Any, batch_idx: int) -> None:
        before.append((copy.deepcopy(module.policy.state_dict()), len(everything(trainer.optimizers[0]))))

    steps = 2 if manual else 1
    make = OPTIMIZERS[kind]
    reset = OptimizerReset(EveryNSteps(3 * steps))
    module, run = fit([reset, Spy(look)], 4, Anchored(make, manual=manual))
    assert [state == 0 for _, state in before] == [False, False, True, False]
    assert run.global_step == 4 * steps and reset.count == 1
    if kind != "sgd":
        assert {int(s["step"]) for s in run.optimizers[0].state.values()} == {steps}

    unreset, _ = fit([], 3, Anchored(make, manual=manual))
    assert same(unreset.policy.state_dict(), before[2][0])
    fresh = Anchored(make, manual=manual)
    fresh.policy.load_state_dict(before[2][0])
    loader = Stream(4)
    loader.done = 3  # the fourth batch
    anchored.trainer([]).fit(fresh, loader)
    assert same(fresh.policy.state_dict(), module.policy.state_dict())


def test_paged_state_is_zeroed_in_its_own_memory() -> None:
    """Catches: new paged buffers at every reset, which bitsandbytes never frees. (On CPU the mark is set by hand.)"""
    import bitsandbytes

    def steps(make_paged: bool) -> tuple[torch.Tensor, Any]:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(64, 64))
        optimizer = bitsandbytes.optim.AdamW8bit([p], lr=0.1)
        for i in range(5):
            if i == 3:
                held = dict(optimizer.state[p])
                if make_paged:
                    held["state1"].is_paged = True
                forget(optimizer)
                assert (len(optimizer.state) == 1) == make_paged
                if make_paged:
                    assert all(optimizer.state[p][k] is v for k, v in held.items() if k != "step")
                    assert optimizer.state[p]["step"] == 0 and held["qmap1"].any()
            p.grad = torch.randn(64, 64)
            optimizer.step()
        return p.detach(), optimizer.state[p]

    one, state = steps(False)
    other, paged = steps(True)
    assert torch.equal(one, other)
    assert state["step"] == paged["step"] == 2 and torch.equal(state["state1"], paged["state1"])


def schedule(optimizer: Any) -> Any:
    """Warm-up, then a recursive decay: the next rate is computed from the present one."""
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=2)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], milestones=[2])


def rates(callbacks: list[Any], batches: int, **options: Any) -> tuple[list[float], list[float]]:
    """Learning rate that each step used, and that of the group between steps."""
    used: list[float] = []
    between: list[float] = []

    def make(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.1)
        step = optimizer._optimizer_step_code  # called in the step, after the update and before post-hooks

        def spy() -> None:
            used.append(float(optimizer.param_groups[0]["lr"]))
            step()

        optimizer._optimizer_step_code = spy  # type: ignore[method-assign]
        return optimizer

    look = Spy(lambda t, m, i: between.append(float(t.optimizers[0].param_groups[0]["lr"])))
    fit([*callbacks, look], batches, Anchored(make, schedule), **options)
    return used, between


def test_a_schedule_is_kept_or_rewound() -> None:
    plain, plain_between = rates([], 10)
    kept, kept_between = rates([OptimizerReset(EveryNSteps(4))], 10)
    assert kept == plain and kept_between == plain_between and plain[0] == pytest.approx(0.05)
    rewound, _ = rates([OptimizerReset(EveryNSteps(4), schedule="rewind")], 10)
    assert rewound == [*plain[:4], *plain[:4], *plain[:2]]


def test_warm_up_after_a_reset_is_a_factor_that_the_schedule_never_sees() -> None:
    """Catches: a factor that a recursive schedule carries on, one that starts before the reset or never ends."""
    plain, between = rates([], 9)
    warm, warm_between = rates([OptimizerReset(EveryNSteps(5), warmup_steps=3)], 9)
    factors = [1, 1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1]
    assert warm == pytest.approx([x * f for x, f in zip(plain, factors, strict=True)])
    assert warm_between == between


def test_factors_of_several_callbacks_multiply_and_leave_the_rate_exactly() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scale_lr(optimizer, 0.5)
    scale_lr(optimizer, 0.3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.015)
    restore_lr(optimizer)
    restore_lr(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1 and "unscaled_lr" not in optimizer.param_groups[0]


class Two(Anchored):
    """Two optimizers, stepped in turn by hand."""

    def configure_optimizers(self) -> Any:
        first, *_, last = self.policy
        self.order = (first, last)
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in self.order], []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss, kl = self.losses(batch)
            self.manual_backward(loss + kl)
            optimizer.step()


def test_only_the_chosen_optimizer_forgets() -> None:
    seen: list[tuple[int, int]] = []
    look = Spy(lambda t, m, i: seen.append(tuple(len(o.state) for o in t.optimizers)))
    fit([OptimizerReset(EveryNSteps(4), optimizers=[1], warmup_steps=1), look], 3, Two(manual=True))
    assert seen == [(2, 2), (2, 0), (2, 2)]


# -- across a resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 4, 5, 6, 7, 8, 9, 10])
@pytest.mark.parametrize("target", ["current", "best"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, target: Any, step: int) -> None:
    """Checkpoints before, at and after resets, in the middle of patience, of a gap and of a warm-up.

    Every second batch is followed by a validation, and the checkpoint then comes after it: lightning 2.6 does not make
    up for a validation that was due when a checkpoint was written.

    Catches: state that is not saved, a reset done twice or not at all, a fresh patience, best weights that are lost.
    """

    def callbacks() -> list[Any]:
        best = {"target": "best", "monitor": "score", "restore_policy": True} if target == "best" else {}
        triggers = [Stall("score", patience=2, smoothing=0.2), Ceiling("spike", 0.5, min_gap=2)]
        return [ReferenceReset(triggers, **best), OptimizerReset(schedule="rewind", warmup_steps=3)]

    def module() -> Anchored:
        return Anchored(schedule=schedule, scores=[0, 0, 5, 0, 9, 0, 6, 0, 5, 0, 4, 0, 4], spikes=(4, 5))

    first, fired = callbacks(), []
    saving = Saving(tmp_path / "a.ckpt", step, "step" if step % 2 else "validation")
    look = Spy(lambda t, m, i: fired.append(first[0].last_step))
    whole, run = fit([*first, look, saving], 12, module(), val_check_interval=2)
    assert set(fired) == {None, 5, 10}, (
        fired
    )  # KL was too large after a batch, the score stalled at a validation
    second = callbacks()
    resumed, rerun = fit(second, 12, module(), val_check_interval=2, ckpt_path=tmp_path / "a.ckpt")
    assert rerun.global_step == run.global_step == 12
    for a, b in zip(first, second, strict=True):
        assert (a.count, a.last_step, a._states) == (b.count, b.last_step, b._states)
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(everything(run.optimizers[0]), everything(rerun.optimizers[0]))
    assert run.optimizers[0].param_groups[0]["lr"] == rerun.optimizers[0].param_groups[0]["lr"]
    assert resumed.kls == whole.kls[step:]


def test_a_changed_trigger_starts_anew_and_the_count_goes_on(tmp_path: Path) -> None:
    fit([ReferenceReset(EveryNSteps(2)), Saving(tmp_path / "a.ckpt", 5)], 6)
    reset = ReferenceReset(EveryNSteps(3))
    with pytest.warns(UserWarning, match="its triggers are not those of the checkpoint"):
        fit([reset], 9, ckpt_path=tmp_path / "a.ckpt")
    assert (reset.count, reset.last_step) == (3, 8)  # 2 and 4; then 3 after the checkpoint at 5


# -- errors -------------------------------------------------------------------------------------------


def trained_copy(module: Any) -> None:
    module.reference.requires_grad_(True)


def alias(module: Any) -> None:
    module.reference = module.policy


def other_names(module: Any) -> None:
    module.reference.extra = nn.Linear(2, 2).requires_grad_(False)


def other_shape(module: Any) -> None:
    module.reference[3] = nn.Linear(8, 5).requires_grad_(False)


def other_dtype(module: Any) -> None:
    module.reference[3].bfloat16()


def no_module(module: Any) -> None:
    del module.reference
    module.reference = lambda x: x


def nothing(module: Any) -> None:
    del module.reference


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (trained_copy, r"reference would train .*0\.bias.*requires_grad_\(False\)"),
        (alias, "reference shares memory with policy"),
        (other_names, r"only in reference \['extra\.bias', 'extra\.weight'\]"),
        (other_shape, r"3\.(weight is \(4, 8\)|bias is \(4,\)) float32 in policy and \(5"),
        (other_dtype, r"3\.(weight|bias) is .* float32 in policy and .* bfloat16"),
        (no_module, "not an nn.Module.*frozen copy"),
        (nothing, "reference='reference'.*policy"),
    ],
)
def test_what_cannot_be_copied_is_refused_before_training(spoil: Any, message: str) -> None:
    """Catches: an error hours later, at the first reset."""
    module = Anchored()
    spoil(module)
    with pytest.raises((ValueError, TypeError, AttributeError), match=message):
        fit([ReferenceReset(EveryNSteps(100))], 1, module)
    assert module.kls == []


def test_a_module_without_a_reference_is_refused_before_it_trains() -> None:
    """Catches: `kl.coef: 0` in a recipe with resets, which ends at the first one, after days."""
    module = ProRLGRPO(toys.policy(0), "prorl_v1", kl=KLSpec(0.0))
    with pytest.raises(ValueError, match=r"keeps no reference \(kl.coef is 0\).*Set kl.coef > 0, or remove"):
        anchored.trainer([ReferenceReset(EveryNSteps(100))]).fit(
            module, DataLoader([toys.batch(0)], batch_size=None)
        )
    assert module.policy_version == 0


def test_a_frozen_base_may_be_shared() -> None:
    """Catches: a second base in memory for a reference that differs in its adapters alone."""
    policy = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    reference = nn.Sequential(policy[0], copy.deepcopy(policy[1]).requires_grad_(False))
    check_copyable(policy, reference, ("policy", "reference"))
    with torch.no_grad():
        policy[1].weight.add_(1)
    copy_weights(policy, reference)
    assert same(policy.state_dict(), reference.state_dict()) and reference[0] is policy[0]
    assert take_weights(policy).keys() == {"1.weight", "1.bias"}
    with pytest.raises(ValueError, match=r"1\.weight is \(2, 2\) in them and \(3, 2\)"):
        put_weights(take_weights(policy), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)))


def test_tied_and_compiled_modules_are_copied_by_name() -> None:
    """Catches: a tied weight without a partner, names that ``torch.compile`` has prefixed."""

    class Tied(nn.Module):
        def __init__(self, tie: bool) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            if tie:
                self.head.weight = self.embed.weight

    policy, reference = Tied(True), Tied(False).requires_grad_(False)
    check_copyable(policy, reference, ("policy", "reference"))
    copy_weights(torch.compile(policy), reference)
    assert torch.equal(reference.head.weight, policy.embed.weight)
    assert torch.equal(reference.embed.weight, policy.embed.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReferenceReset([]), "no trigger"),
        (lambda: ReferenceReset(EveryNSteps(1), target="last"), "target"),  # type: ignore[arg-type]
        (lambda: ReferenceReset(EveryNSteps(1), target="best"), "needs a monitor"),
        (lambda: ReferenceReset(EveryNSteps(1), monitor="x"), "monitor"),
        (lambda: ReferenceReset(EveryNSteps(1), restore_policy=True), "restore_policy"),
        (lambda: OptimizerReset([]), "empty list"),
        (lambda: OptimizerReset(EveryNSteps(1), schedule="drop"), "schedule"),  # type: ignore[arg-type]
        (lambda: OptimizerReset(EveryNSteps(1), warmup_steps=-1), "warmup_steps"),
    ],
)
def test_settings_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (OptimizerReset(), "no ReferenceReset to follow"),
        (OptimizerReset(EveryNSteps(1), optimizers=[1]), r"optimizers is \[1\]; the run has 1"),
        (OptimizerReset(EveryNSteps(1), schedule="rewind"), "optimizer 0 has no schedule to rewind"),
        (ReferenceReset(Stall("score")), "Stall.*reads after validation, and this run has none"),
        (ReferenceReset(EveryNSteps(1), target="best", monitor="score"), "'score' after validation"),
    ],
)
def test_what_would_have_no_effect_is_refused_before_training(callback: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit([callback], 1)


def test_adagrad_is_refused() -> None:
    with pytest.raises(ValueError, match="Adagrad"):
        fit([OptimizerReset(EveryNSteps(1))], 1, Anchored(lambda p: torch.optim.Adagrad(p)))


def test_a_metric_that_is_not_logged_is_named() -> None:
    with pytest.raises(ValueError, match=r"'train/kl' after each step.*Anchored has not logged it.*'kl'"):
        fit([ReferenceReset(Ceiling("train/kl", 1.0))], 1)


def test_no_best_yet_is_an_error_that_says_so() -> None:
    reset = ReferenceReset(EveryNSteps(1), target="best", monitor="score")
    with pytest.raises(RuntimeError, match="at step 1 there are no best weights yet"):
        fit([reset], 2, Anchored(scores=RISING), val_check_interval=2)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_with_flat_copies_are_refused(name: str) -> None:
    """By the name of a base class, so that other namespaces' strategies are known too."""
    from lightning_onpolicy.callbacks.triggered import refuse_partitioned

    strategy = type("Mine", (type(name, (), {}),), {})()
    with pytest.raises(ValueError, match=f"ReferenceReset does not work under {name}"):
        refuse_partitioned(types.SimpleNamespace(strategy=strategy), "ReferenceReset")  # type: ignore[arg-type]


# -- elsewhere ----------------------------------------------------------------------------------------


def example(namespace: str) -> Any:
    """The example as a module, in either namespace of Lightning."""
    spec = importlib.util.spec_from_file_location(f"example_{namespace.replace('.', '_')}", EXAMPLE)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    source = EXAMPLE.read_text().replace("lightning.pytorch", namespace)
    exec(compile(source, str(EXAMPLE), "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_the_example_learns_past_where_its_anchor_holds_it(namespace: str) -> None:
    """Catches: callbacks that need modules of ours, or one of Lightning's two names."""
    if importlib.util.find_spec(namespace.split(".")[0]) is None:
        pytest.skip("pytorch_lightning is not installed")
    project = example(namespace)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    _, run, (reference, optimizer) = project.main(**quiet)
    assert reference.count == optimizer.count >= 3
    project.ReferenceReset.fire = project.OptimizerReset.fire = lambda *_: None
    try:
        _, held, _ = project.main(**quiet)
    finally:
        del project.ReferenceReset.fire, project.OptimizerReset.fire
    assert float(run.callback_metrics["val_loss"]) < 0.7 * float(held.callback_metrics["val_loss"])


def test_the_example_imports_two_callbacks_and_a_trigger_of_ours_and_nothing_else() -> None:
    lines = [line for line in EXAMPLE.read_text().splitlines() if "lightning_onpolicy" in line]
    assert lines == ["from lightning_onpolicy.callbacks import OptimizerReset, ReferenceReset, Stall"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_decide_alike_copy_shards_and_resume(tmp_path: Path, strategy: str) -> None:
    """Ranks log different scores and KL, of which rank 0's count.

    Catches: ranks that decide alone, gathered copies written in place of shards, optimizer state that torch's
    distributed checkpoint filled, best weights that only one rank has.
    """
    on_two_ranks(anchored, strategy, tmp_path / "out.pt", timeout_s=280)
    one, other = (torch.load(tmp_path / f"out.pt.{rank}", weights_only=True) for rank in range(2))
    for key, mine in one.items():
        yours = other[key]
        assert mine["sharded"] == (strategy == "fsdp2")
        for part in ("count", "states", "seen"):
            assert mine[part] == yours[part], (key, part)
        assert same(mine["policy"], yours["policy"]) and same(mine["reference"], yours["reference"])
    for target in ("current", "best"):
        whole = one[target]
        assert whole["count"] == (
            3,
            3,
            8,
        )  # at 4 and 8 rank 0's score had stalled, at 5 its metric had a spike
        assert [i for i, x in enumerate(whole["kls"]) if x == 0] == [0, 4, 5, 8]
        assert [i for i, x in enumerate(other[target]["kls"]) if x == 0] == [0, 4, 5, 8]
        assert [x["state"] for x in whole["seen"]] == [6, 6, 6, 6, 0, 6, 6, 6, 6, 6]
        assert [x["told"] for x in whole["seen"]] == [x["count"] for x in whole["seen"]]
        assert (whole["best"] is None) == (target == "current")
        for step in (3, 4, 5, 6):
            resumed = one[f"{target}-{step}"]
            for part in ("count", "states"):
                assert resumed[part] == whole[part], (target, step, part)
            for part in ("policy", "reference", "optimizer", *(["best"] if target == "best" else [])):
                assert same(resumed[part], whole[part]), (target, step, part)
            assert resumed["kls"] == whole["kls"][step:], (target, step)
