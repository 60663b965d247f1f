"""Stages: in order, on time, before the next batch is sampled, and the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anchored
import fits
import pytest
import torch
import toys
from anchored import Anchored, Saving
from hypothesis import given
from hypothesis import strategies as st

from lightning_onpolicy.callbacks.resets import OptimizerReset, ReferenceReset
from lightning_onpolicy.callbacks.stages import Stage, StageSchedule, reached
from lightning_onpolicy.callbacks.triggers import EveryNSteps
from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule


class Dial(anchored.Stream):
    """Batches whose scale can be adjusted: a loader of somebody else's project."""

    scale = 1.0

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self.given.append(self.scale)
            yield batch * self.scale

    def check(self, settings: Any) -> None:
        if set(settings) - {"scale"}:
            raise ValueError(f"there is no setting {sorted(set(settings) - {'scale'})[0]!r}.")

    def adjust(self, settings: Any) -> None:
        self.scale = settings["scale"]

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.given: list[float] = []


STAGES: list[dict[str, Any]] = [
    {"at": 0, "scale": 2.0},
    {"at": "reset:2", "scale": 3.0, "lr": 0.01},
    {"at": 6, "lr": 0.02},
    {"at": 8, "scale": 5.0},
]


def run(stages: list[dict[str, Any]], batches: int, *more: Any, **options: Any) -> tuple[Dial, list[float]]:
    """What batches were made with, and the learning rate of each step."""
    used: list[float] = []
    loader, schedule = Dial(batches), StageSchedule(stages)

    def make(params: Any) -> Any:
        optimizer = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.4}], lr=0.1)
        optimizer._optimizer_step_code = lambda: used.append([g["lr"] for g in optimizer.param_groups])
        return optimizer

    module = Anchored(make, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), **options)
    resume = more[-1] if isinstance(more[-1], dict) else {}
    anchored.trainer([schedule, *(m for m in more if m is not resume)]).fit(module, loader, **resume)
    return loader, used


def test_stages_begin_at_steps_and_at_resets_before_the_next_batch() -> None:
    """Catches: a batch made with the old settings, a schedule that carries a stage's factor on."""
    loader, used = run(STAGES, 10, ReferenceReset(EveryNSteps(2)))
    assert loader.given == [2, 2, 2, 2, 3, 3, 3, 3, 5, 5]
    base = [0.1] * 4 + [0.01] * 2 + [0.02] * 4
    assert [a for a, _ in used] == pytest.approx([lr * 0.5**i for i, lr in enumerate(base)])
    assert [b for _, b in used] == pytest.approx([4 * a for a, _ in used])  # groups keep their ratio


def test_stages_and_a_warm_up_share_the_learning_rate() -> None:
    reset = OptimizerReset(EveryNSteps(2), warmup_steps=2)
    _, used = run([{"at": 0, "lr": 0.3}], 4, reset)
    assert [a for a, _ in used] == pytest.approx([0.3, 0.15, 0.3 / 4 / 2, 0.3 / 8])


@pytest.mark.parametrize("step", range(1, 10))
def test_a_resumed_run_makes_its_first_batch_in_the_right_stage(tmp_path: Path, step: int) -> None:
    """Catches: settings applied after the first batch, resets counted from zero, a base rate already scaled."""
    loader, used = run(STAGES, 10, ReferenceReset(EveryNSteps(2)), Saving(tmp_path / "a.ckpt", step))
    resume = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True}
    resumed, used_again = run(STAGES, 10, ReferenceReset(EveryNSteps(2)), resume)
    assert resumed.given == loader.given[step:]
    assert used_again == used[step:]


def test_switches_are_announced_once_each(caplog: Any) -> None:
    with caplog.at_level("INFO"):
        run(STAGES, 10, ReferenceReset(EveryNSteps(2)))
    lines = [r.message for r in caplog.records if "StageSchedule" in r.message]
    assert lines == [
        "StageSchedule: stage 1 of 4 from step 0: scale=2.0.",
        "StageSchedule: stage 2 of 4 from step 4: scale=3.0, lr=0.01.",
        "StageSchedule: stage 3 of 4 from step 6: lr=0.02.",
        "StageSchedule: stage 4 of 4 from step 8: scale=5.0.",
    ]


def test_the_stage_is_logged_with_the_rate_it_gives(tmp_path: Path) -> None:
    stages = StageSchedule([{"at": 2, "lr": 0.05}])
    trainer = fits.trainer(tmp_path, [stages])
    trainer.fit(fits.Module(), fits.Batches(3, fits.plain_batch))
    assert trainer.logged_metrics["stage"] == 1
    assert float(trainer.logged_metrics["stage/lr"]) == pytest.approx(0.05)


@given(
    st.lists(st.one_of(st.integers(0, 9), st.integers(1, 4).map("reset:{}".format)), max_size=5), st.data()
)
def test_the_stage_follows_from_step_and_resets_alone(ats: list[Any], data: Any) -> None:
    """Walking step by step arrives where a resumed run starts; stages begin in order and never end early."""
    stages = [Stage.of(i, {"at": at}) for i, at in enumerate(ats)]
    walked, resets = 0, 0
    for step in range(12):
        resets += data.draw(st.integers(0, 1))
        due = reached(stages, step, resets)
        assert due >= walked
        for stage in stages[:due]:
            assert step >= stage.step and resets >= stage.resets
        if due < len(stages):
            assert step < stages[due].step or resets < stages[due].resets
        walked = due


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "no stages"),
        ([{"lr": 1.0}], r"stages\[0\]\.at must be .* got None"),
        ([{"at": 0}, {"at": "resets:2"}], r"stages\[1\]\.at .* got 'resets:2'"),
        ([{"at": "reset:0"}], "got 'reset:0'"),
        ([{"at": -1}], "got -1"),
        ([{"at": True}], "got True"),
        ([{"at": 5}, {"at": 3}], r"out of order: their step are \[5, 3\]"),
        ([{"at": "reset:2"}, {"at": 9}, {"at": "reset:1"}], "out of order: their resets"),
        ([{"at": 0, "lr": 0.0}], r"stages\[0\]\.lr"),
    ],
)
def test_malformed_stages_are_refused(stages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageSchedule(stages)


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        (
            [{"at": 0, "scale": 1.0}, {"at": 90, "sclae": 1.0}],
            {},
            r"stages\[1\]: there is no setting 'sclae'",
        ),
        ([{"at": "reset:1", "lr": 1.0}], {}, "no ReferenceReset"),
        ([{"at": 0, "lr": 1.0}], {"optimizer": 1}, r"optimizer is 1; the run has 1"),
    ],
)
def test_what_cannot_be_changed_is_refused_before_training(stages: Any, options: Any, message: str) -> None:
    """Catches: a typo that is found after two days, at its stage."""
    with pytest.raises(ValueError, match=message):
        anchored.trainer([StageSchedule(stages, **options)]).fit(Anchored(), Dial(2))
    with pytest.raises(ValueError, match=r"sets \['scale'\], which Stream cannot adjust"):
        anchored.trainer([StageSchedule([{"at": 0, "scale": 1.0}])]).fit(Anchored(), anchored.Stream(2))


def test_a_loader_made_anew_is_adjusted_again() -> None:
    """Catches: a stage lost to ``reload_dataloaders_every_n_epochs``."""
    made: list[Dial] = []

    class Data(anchored.pl.LightningDataModule):
        def train_dataloader(self) -> Dial:
            made.append(Dial(2))
            return made[-1]

    trainer = anchored.trainer(
        [StageSchedule([{"at": 1, "scale": 4.0}])], max_epochs=2, reload_dataloaders_every_n_epochs=1
    )
    trainer.fit(Anchored(), datamodule=Data())
    assert [loader.given for loader in made] == [[1.0, 4.0], [4.0, 4.0]]


# -- with rollouts ------------------------------------------------------------------------------------

PROMPTS = [{"prompt": f"t{i}", "uid": f"p{i}"} for i in range(5)]


class Mix:
    """A source of two parts that can be reweighed."""

    name = "mix"

    def __init__(self) -> None:
        self.weights = {"a": 1.0, "b": 0.0}

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return {
            "prompt": f"t{index}",
            "uid": f"{index}",
            "source": max(self.weights, key=self.weights.__getitem__),
        }

    def check_mix(self, weights: Any) -> None:
        if set(weights) - {"a", "b"}:
            raise ValueError(f"mix names {sorted(set(weights) - {'a', 'b'})}.")

    def reweigh(self, weights: Any) -> None:
        self.weights |= weights


def rollouts(
    stages: list[dict[str, Any]], source: Any = PROMPTS, callbacks: Any = (), **options: Any
) -> list[Any]:
    """(Response length, group size, temperature, source) of each batch."""
    seen: list[Any] = []
    data = OnPolicyDataModule(
        train=source,
        prompts_per_batch=2,
        group_size=2,
        steps_per_epoch=6,
        sampling=Sampling(max_new_tokens=2, min_new_tokens=2),
        **options.pop("data", {}),
    )

    class Reader(anchored.pl.LightningModule):
        """Has a policy to sample from, and trains something else."""

        def __init__(self) -> None:
            super().__init__()
            self.policy, self.weight = toys.policy(0, scale=3.0), torch.nn.Parameter(torch.ones(()))
            self.tokenizer = self.policy.tokenizer

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            longest, size = int(batch.response_lengths.max()), len(batch) // 2
            seen.append((longest, size, batch.sampling.temperature, batch.prompts[0].source))
            return self.weight**2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.weight], lr=0.1)

    trainer = anchored.trainer([StageSchedule(stages), *callbacks])
    module = Reader()
    trainer.fit(module, datamodule=data, **options)
    return seen


GROWING = [
    {"at": 1, "min_new_tokens": 4, "max_new_tokens": 4},
    {"at": 3, "group_size": 3, "temperature": 0.5},
    {"at": 4, "mix": {"a": 0.0, "b": 1.0}},
]


def test_rollouts_follow_their_stages_and_so_do_resumed_ones(tmp_path: Path) -> None:
    """Catches: settings that reach a maker which no longer samples, or reach it after the first resumed batch."""
    expected = [(2, 2, 1.0, "a"), *[(4, 2, 1.0, "a")] * 2, (4, 3, 0.5, "a"), *[(4, 3, 0.5, "b")] * 2]
    assert rollouts(GROWING, Mix(), [Saving(tmp_path / "a.ckpt", 4)]) == expected
    resumed = rollouts(GROWING, Mix(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert resumed == expected[4:]


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"max_tokens": 4}, {}, r"stages\[0\]: there is no setting 'max_tokens'; known are .*max_new_tokens"),
        ({"temperature": -1.0}, {}, "temperature must be >= 0"),
        ({"group_size": 0}, {}, "group_size must be an integer >= 1"),
        ({"mix": {"a": 1.0}}, {}, "'mix' needs a source that mixes several; list does not"),
        ({"group_size": 4}, {"on_policy_fraction": 0.5, "off_policy": "dataset"}, "on_policy_fraction < 1"),
    ],
)
def test_rollout_settings_are_checked_before_anything_is_sampled(
    settings: Any, data: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rollouts([{"at": 50, **settings}], data=data)


def test_a_stage_is_checked_behind_the_ones_before_it() -> None:
    """Catches: two stages that are fine alone and fail together, when the second one comes."""
    together = [{"at": 50, "min_new_tokens": 4, "max_new_tokens": 4}, {"at": 60, "max_new_tokens": 3}]
    with pytest.raises(ValueError, match=r"stages\[1\]: .*min_new_tokens"):
        rollouts(together)


def test_a_generated_mix_is_reweighed_and_its_other_tasks_keep_theirs() -> None:
    """Catches: weights that change rows of the same weights, a task of weight 0 that still appears."""
    from lightning_onpolicy.datamodules.gym import GymSource

    pytest.importorskip("reasoning_gym", reason="the gym extra is not installed")
    tasks: dict[str, Any] = {
        "chain_sum": {"weight": 1.0},
        "leg_counting": {"weight": 1.0},
        "basic_arithmetic": {},
    }
    source = GymSource(tasks, size=30)
    before = [source[i] for i in range(30)]
    source.reweigh({"chain_sum": 1.0})
    assert [source[i] for i in range(30)] == before
    source.reweigh({"leg_counting": 0.0, "chain_sum": 2.0})
    after = [source[i]["source"] for i in range(30)]
    assert abs(after.count("chain_sum") - 20) <= 1 and set(after) == {"chain_sum", "basic_arithmetic"}
    for weights, message in (({"none": 1.0}, "'none'"), ({"chain_sum": -1.0}, "mix.chain_sum")):
        with pytest.raises(ValueError, match=message):
            source.reweigh(weights)
    with pytest.raises(ValueError, match="mix leaves no task"):
        source.reweigh({"chain_sum": 0.0, "basic_arithmetic": 0.0})
