"""The monitor of an adversarial game: windows, silence, stops, probes of planted leaks, and resumes."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fits
import pytest
import ranks_adversary
import torch
from duels import gad
from launching import on_two_ranks
from lightning.pytorch.callbacks import Callback
from ranks_adversary import Game
from words import duels

from lightning_onpolicy.callbacks import AdversaryMonitor, GameRules
from lightning_onpolicy.modules.gad_stages import Warmup

HEALTHY = {
    "train/fresh/accuracy": 0.8,
    "train/fresh/flat_groups": 0.0,
    "train/fresh/score_std": 0.5,
    "train/fresh/score_gap": 1.0,
    "train/fresh/matched_accuracy": 0.75,
    "train/fresh/length_gap": 2.0,
    "train/fresh/teacher_length": 20.0,
    "train/entropy": 0.5,
}
BLIND = {"train/fresh/accuracy": 0.1, "train/fresh/matched_accuracy": 0.1}


def series(steps: int, bad: Mapping[str, float], since: int) -> dict[str, list[float]]:
    """Healthy values, and bad ones from step ``since`` (from 0) on."""
    return {k: [v if i < since else bad.get(k, v) for i in range(steps)] for k, v in HEALTHY.items()}


def run(
    folder: Path,
    monitor: AdversaryMonitor,
    module: Any,
    steps: int,
    *also: Callback,
    make: Any = fits.rollouts,
) -> tuple[int, list[str]]:
    """Steps taken, and what the monitor said."""
    trainer = fits.trainer(folder, [monitor, *also])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, fits.Batches(steps, make))
    said = [str(w.message) for w in caught if str(w.message).startswith("AdversaryMonitor")]
    return int(trainer.global_step), said


def logged(folder: Path, name: str, version: int = 0) -> list[float]:
    with (folder / "logs" / f"version_{version}" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name, "nan") not in ("", "nan")]


# -- rules, windows, silence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        ("no_signal", {"train/fresh/accuracy": 1.0, "train/fresh/matched_accuracy": 1.0, "train/fresh/score_std": 0.0}),
        ("blind", BLIND),
        ("runaway", {"train/fresh/score_gap": 50.0}),
        ("by_length", {"train/fresh/matched_accuracy": 0.1}),
        ("length", {"train/fresh/length_gap": 40.0}),
        ("entropy", {"train/entropy": 0.01}),
    ],
)  # fmt: skip
def test_a_rule_stops_a_run_that_breaks_it_and_no_other(
    tmp_path: Path, rule: str, bad: dict[str, float]
) -> None:
    """Catches: a series read under another's name, action before the window is bad, a stop in a healthy run."""
    rules = GameRules(swing=None)  # the jump of the length gap would be one
    monitor = AdversaryMonitor(rules, window=3, probe_every=0, action="stop")
    assert run(tmp_path, monitor, fits.Module(series(8, bad, 8)), 8) == (8, [])
    monitor = AdversaryMonitor(rules, window=3, probe_every=0, action="stop")
    steps, said = run(tmp_path, monitor, fits.Module(series(12, bad, 5)), 12)
    assert 6 <= steps <= 8, "the window's mean is bad before all of it is"
    assert len(said) == 1
    assert said[0].startswith(f"AdversaryMonitor: at step {steps}: {rule}: ")
    assert said[0].endswith("Training ends after this step (action=stop).")


def test_a_swing_is_logged_and_stops(tmp_path: Path) -> None:
    logs = series(12, {}, 0)
    logs["train/fresh/length_gap"] = [2.0] * 6 + [12.0, -8.0] * 3
    steps, said = run(
        tmp_path, AdversaryMonitor(window=6, probe_every=0, action="stop"), fits.Module(logs), 12
    )
    assert steps == 8 and "oscillation: " in said[0]
    swing = logged(tmp_path, "adversary/length_swing")
    assert len(swing) == 3 and swing[0] == 0.0 and swing[-1] > 0.25 >= max(swing[:-1])
    assert logged(tmp_path, "adversary/length_ratio")[0] == pytest.approx(1.1)


def test_only_full_windows_speak_and_then_are_silent_for_one(tmp_path: Path) -> None:
    """Catches: a verdict on the first step, a warning per step, a rule that speaks but once."""
    module = fits.Module(series(13, BLIND, 0))
    steps, said = run(tmp_path, AdversaryMonitor(window=4, probe_every=0), module, 13)
    assert steps == 13
    assert [s.split(":")[1] for s in said] == [" at step 4", " at step 8", " at step 12"]
    assert all(
        "blind: accuracy 0.100 is not above 0.5" in s and "stop" not in s.split("stop here")[1] for s in said
    )
    spike = series(13, {}, 0)
    spike["train/fresh/accuracy"][6] = 0.0
    assert run(tmp_path, AdversaryMonitor(window=4, probe_every=0), fits.Module(spike), 13) == (13, [])


def test_two_rules_have_their_own_silence(tmp_path: Path) -> None:
    logs = series(9, BLIND, 0)
    logs["train/fresh/score_gap"] = [1.0] * 5 + [99.0] * 4
    _, said = run(tmp_path, AdversaryMonitor(window=4, probe_every=0), fits.Module(logs), 9)
    assert [("blind" in s, "runaway" in s) for s in said] == [(True, False), (False, True), (True, False)]


def test_the_warm_up_does_not_count(tmp_path: Path) -> None:
    """Catches: an accuracy of 1 or ½ of the warm-up in the window of the main stage."""
    logs = {**series(8, {}, 0), "train/phase": [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]}
    logs["train/fresh/accuracy"][:4] = [0.0] * 4
    monitor = AdversaryMonitor(window=4, probe_every=0)
    assert run(tmp_path, monitor, fits.Module(logs), 8) == (8, [])
    assert len(logged(tmp_path, "adversary/entropy_share")) == 1


def test_what_a_module_does_not_report_is_named_once(tmp_path: Path) -> None:
    """Catches: a crash in a foreign project, a monitor that watches nothing in silence, a warning per step."""
    _, said = run(tmp_path, AdversaryMonitor(window=3), fits.Module(), 7, make=fits.plain_batch)
    assert "Module does not report 'train/fresh/accuracy': rule 'blind' is not watched." in "\n".join(said)
    assert len(said) == len(set(said)) == 13
    assert sum("artefacts are not probed" in s for s in said) == 1
    logs = series(7, {}, 0)
    del logs["train/fresh/score_gap"]
    rules = AdversaryMonitor(GameRules(score_gap=None), window=3, probe_every=0)
    assert run(tmp_path, rules, fits.Module(logs), 7) == (7, []), "what nobody watches need not be there"


class Sometimes(fits.Module):
    """Has no entropy in the first and every second step, as when the policy waits."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        out = super().training_step(batch, batch_idx)
        out["metrics"] = {**HEALTHY, "train/entropy": 0.5 / 2**batch_idx}
        if batch_idx % 2 == 0:
            del out["metrics"]["train/entropy"]
        return out


def test_a_step_without_a_value_is_no_missing_metric(tmp_path: Path) -> None:
    """Catches: a warning where only this step has none; the last value counted again."""
    _, said = run(tmp_path, AdversaryMonitor(window=3, probe_every=0), Sometimes(), 8)
    assert said == []
    assert logged(tmp_path, "adversary/entropy_share") == pytest.approx([1.0, 1.0, 0.25]), "6, 7, 8"


# -- probes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_leak_in_a_run_is_logged_and_acted_on(tmp_path: Path, action: Any) -> None:
    """Catches: probes never asked, asked of too few steps, results not logged."""
    monitor = AdversaryMonitor(window=3, probe_every=6, probe_prompts=50, action=action)
    steps, said = run(tmp_path, monitor, Game(HEALTHY, "white"), 14)
    assert steps == (6 if action == "stop" else 14)
    assert [s.split(":")[2] for s in said] == [" probe/white"] * (1 if action == "stop" else 2)
    assert "50 prompts" in said[0], "the newest, of six steps of ten"
    assert logged(tmp_path, "adversary/probe/white")[0] == 1.0
    low, mean, high = (logged(tmp_path, f"adversary/probe/length{end}")[0] for end in ("_low", "", "_high"))
    assert low < mean < high and low < 0.5 + 0.3
    none = AdversaryMonitor(window=3, probe_every=0, action=action)
    assert run(tmp_path, none, Game(HEALTHY, "white"), 14) == (14, [])


def test_too_few_prompts_are_said_to_be(tmp_path: Path) -> None:
    monitor = AdversaryMonitor(GameRules(), window=3, probe_every=1)
    _, said = run(tmp_path, monitor, Game(HEALTHY, "white", prompts=1), 3)
    assert said == [
        "AdversaryMonitor: fewer than 5 prompts with answers of both sides: artefacts are not probed."
    ]


@pytest.mark.parametrize(("taught", "leaky"), [((2, 6), False), ((9, 14), True)])
def test_a_real_game_is_probed_as_its_discriminator_reads_it(
    tmp_path: Path, taught: tuple[int, int], leaky: bool
) -> None:
    """Catches: probes in the warm-up, of the policy's ids, of the sampled rows alone; metrics GAD does not have."""
    rules = GameRules(low=None, matched=None, length=None, swing=None)
    monitor = AdversaryMonitor(rules, window=6, probe_every=6, action="stop")
    module = gad(warmup=Warmup(3, 2))

    def make(number: int) -> Any:
        return duels(number, groups=10, taught=taught if number >= 3 else (20, 23))

    steps, said = run(tmp_path, monitor, module, 9 + 3, make=make)
    assert (steps, len(said)) == ((9, 1) if leaky else (12, 0)), said
    accuracy = logged(tmp_path, "adversary/probe/length")
    assert len(accuracy) == 1, "six steps after the warm-up"
    if leaky:
        assert (
            "probe/length: length alone tells teacher from student in 1.000" in said[0]
            and "60 prompts" in said[0]
        )
    else:
        assert abs(accuracy[0] - 0.5) < 0.15
    for name in ("end", "white", "tokens"):
        assert logged(tmp_path, f"adversary/probe/{name}") == [0.5]


# -- resumes, ranks, settings ---------------------------------------------------------------------------------------


class SaveAfter(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def plain(state: Any) -> Any:
    """With tensors as lists, so that == compares."""
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, Mapping):
        return {k: plain(v) for k, v in state.items()}
    return [plain(v) for v in state] if isinstance(state, Sequence) and not isinstance(state, str) else state


def test_a_run_resumed_within_a_window_says_and_logs_what_a_whole_one_does(tmp_path: Path) -> None:
    """Catches: windows, silence, entropy at the start, or answers that begin anew."""

    def make() -> tuple[AdversaryMonitor, Game]:
        entropy = [0.5 - 0.03 * i for i in range(14)]
        values = {**HEALTHY, **BLIND, "train/entropy": entropy}
        return AdversaryMonitor(window=4, probe_every=5, probe_prompts=30), Game(values, "white")

    monitor, module = make()
    steps, whole = run(tmp_path / "whole", monitor, module, 14, SaveAfter(tmp_path / "a.ckpt", 6))
    state = monitor.state_dict()
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["AdversaryMonitor"]["by_rank"][
        "0"
    ]
    assert (
        saved["steps"] == 6
        and saved["silent"] == {"blind": 2, "probe/white": 3}
        and len(saved["items"]) == 30
    )
    again, module = make()
    trainer = fits.trainer(tmp_path / "rest", [again])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, fits.Batches(14), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    rest = [str(w.message) for w in caught if str(w.message).startswith("AdversaryMonitor")]
    assert (steps, trainer.global_step) == (14, 14)
    assert rest == [s for s in whole if int(s.split()[3].rstrip(":")) > 6] and len(rest) >= 3
    assert plain(again.state_dict()) == plain(state)
    for name in ("adversary/entropy_share", "adversary/probe/length", "adversary/probe/white_low"):
        values = logged(tmp_path / "rest", name)
        assert values and values == logged(tmp_path / "whole", name)[-len(values) :], name


@pytest.mark.slow
def test_two_ranks_end_together_though_one_breaks_the_rule(tmp_path: Path) -> None:
    """Rank 1's game is blind, and each rank has prompts of its own.

    Catches: a rank that trains on alone and waits for ever, a message lost on rank 1, a probe of one rank's answers.
    """
    on_two_ranks(ranks_adversary, tmp_path / "out.pt")
    one, other = (torch.load(tmp_path / f"out.pt.{rank}", weights_only=True) for rank in range(2))
    for action, steps in (("stop", 4), ("warn", 6)):
        mine, yours = one[action], other[action]
        assert mine["steps"] == yours["steps"] == steps
        assert len(mine["said"]) == 1 and yours["said"] == []
        assert "at step 4: blind: accuracy 0.100" in mine["said"][0]
        assert mine["white"] == yours["white"] == pytest.approx(0.75, abs=0.15), "of both ranks' answers"
        assert plain(mine["state"]) == plain(yours["state"])
        by_rank = mine["state"]["by_rank"]
        assert [by_rank[rank]["silent"] for rank in "01"] == [{"blind": 4 - (steps - 4)}] * 2
        assert [len(by_rank[rank]["items"]) for rank in "01"] == [15, 15], "half of thirty"
        assert by_rank["0"]["items"][0]["prompt"] != by_rank["1"]["items"][0]["prompt"]
        assert [by_rank[rank]["series"]["fresh/accuracy"][0] for rank in "01"] == [0.8, 0.1]


def test_settings_are_checked() -> None:
    settings: list[tuple[str, Any]] = [
        ("action", "raise"), ("window", 2), ("probe_every", -1), ("probe_prompts", 4)
    ]  # fmt: skip
    for key, value in settings:
        with pytest.raises(ValueError, match=key):
            AdversaryMonitor(**{key: value})
