"""The prolonged comparison: what its arms change, what it counts, how it compares, and that runs are made once."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lightning_onpolicy.cli import main as onpolicy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script, which is not part of the package."""
    spec = importlib.util.spec_from_file_location("prolonged", ROOT / "benchmarks" / "prolonged.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def part(bench: ModuleType):
    """A module beside the script, as the script imported it."""
    return lambda name: sys.modules[f"prolonged_{name}"]


def parsed(capsys, command: list[str]) -> dict[str, Any]:
    """The configuration that a command would run."""
    with pytest.raises(SystemExit) as stop:
        onpolicy([*command, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def differences(a: Any, b: Any, path: str = "") -> set[str]:
    """Where two configurations differ; lists are compared whole."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return set() if a == b else {path}
    return set().union(
        *(differences(a.get(k), b.get(k), f"{path}.{k}".strip(".")) for k in a.keys() | b.keys())
    )


CHANGED = {
    "grpo": {"trainer.callbacks"},
    "symmetric-clip": {"model.init_args.surrogate.init_args.high", "model.init_args.surrogate.high"},
    "no-dynamic-sampling": {"data.init_args.dynamic_sampling"},
    "no-kl": {"trainer.callbacks", "model.init_args.kl.coef", "model.init_args.kl.gradient"},
    "hot": {"model.init_args.temperature", "data.init_args.sampling.temperature"},
    "tiny-kl": {"model.init_args.kl.coef"},
    "reference-only": {"trainer.callbacks"},
    "optimizer-only": {"trainer.callbacks"},
}


def test_every_rewarded_arm_changes_what_it_is_named_after_and_nothing_else(capsys, part, tmp_path) -> None:
    arms = part("arms")
    base = parsed(capsys, arms.command("prorl", 1, 120, tmp_path))
    assert base["data"]["init_args"]["eval_sampling"]["temperature"] == 1.0
    assert base["trainer"]["max_epochs"] * base["data"]["init_args"]["steps_per_epoch"] == 120
    assert CHANGED.keys() == {n for n, arm in arms.ARMS.items() if not arm.needs_teacher} - {"prorl"}
    for name, expected in CHANGED.items():
        found = differences(base, parsed(capsys, arms.command(name, 1, 120, tmp_path)))
        assert found and found <= expected, name


def test_resets_are_where_the_arm_says(part, tmp_path) -> None:
    arms = part("arms")

    def names(arm: str) -> set[str]:
        (flag,) = [f for f in arms.command(arm, 1, 40, tmp_path) if f.startswith("--trainer.callbacks=")]
        callbacks = json.loads(flag.partition("=")[2])
        return {c["class_path"] for c in callbacks} & {"ReferenceReset", "OptimizerReset"}

    assert names("prorl") == {"ReferenceReset", "OptimizerReset"}
    assert names("reference-only") == {"ReferenceReset"}
    assert names("optimizer-only") == names("no-kl") == {"OptimizerReset"}
    assert names("grpo") == set()


def test_distillation_learns_from_the_given_teacher(capsys, part, tmp_path) -> None:
    arms = part("arms")
    config = parsed(capsys, arms.command("opd", 2, arms.DISTILL_STEPS, tmp_path, tmp_path / "export"))
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["teacher"]["path"] == str(tmp_path / "export")
    assert model["scheduler"]["init_args"]["total_steps"] == data["steps_per_epoch"] == arms.DISTILL_STEPS
    assert data["prompts_per_batch"] * data["group_size"] == arms.PROMPTS * arms.GROUP


def test_wrong_lengths_and_missing_teachers_are_refused(part, tmp_path) -> None:
    arms = part("arms")
    with pytest.raises(ValueError, match="multiples of 40"):
        arms.command("prorl", 1, 50, tmp_path)
    with pytest.raises(ValueError, match="teacher is needed"):
        arms.command("opd", 1, arms.DISTILL_STEPS, tmp_path)
    with pytest.raises(ValueError, match="of no use"):
        arms.command("prorl", 1, 40, tmp_path, tmp_path)


def test_flops_are_those_counted_by_hand(part) -> None:
    flops = part("flops").batch_flops
    # 10 parameters, 6 responses sampled and 4 kept, 5 tokens each: 30 and 20 tokens.
    assert flops(10, 6, 4, 5.0, reference=True) == 2 * 10 * 30 + 2 * 10 * 20 + 2 * 10 * 20 + 6 * 10 * 20
    assert flops(10, 6, 4, 5.0, reference=False) == 2 * 10 * 30 + 2 * 10 * 20 + 6 * 10 * 20
    assert flops(10, 4, 4, 5.0, reference=False, teacher=7) == 2 * 10 * 20 + 2 * 7 * 20 + 6 * 10 * 20


def test_flops_add_up_over_windows(part) -> None:
    module = part("flops")
    window = {"batches": 20, "length": 3.0, "missing": 1.0, "sampled_groups": 24.0}
    record = {
        "arm": "prorl",
        "windows": [{"batch": 20, **window}, {"batch": 40, **window}],
        "model": {"parameters": 10, "prompt_tokens": 2.0},
    }
    one = module.batch_flops(10, 24 * 8, 15 * 8, 5.0, reference=True)
    assert module.cumulative(record) == [(20, 20 * one), (40, 40 * one)]
    cheaper = module.cumulative({**record, "arm": "no-kl"})
    assert cheaper[-1][1] == 40 * module.batch_flops(10, 24 * 8, 15 * 8, 5.0, reference=False)


def made_up(arm: str, seed: int, right: str, end: int = 40, **curve: float) -> dict[str, Any]:
    """A record of two windows."""
    window = {
        "batches": 20,
        **dict.fromkeys(("entropy", "kl_ref", "clip_high", "clip_low", "pass_rate"), 0.1 * seed),
        **{"length": 4.0, "rollout_s": 1.0, "step_s": 4.0},
    }
    mean = sum(map(int, right)) / len(right) / 4
    return {
        "arm": arm,
        "seed": seed,
        "batches": end,
        "curve": [[20, mean / 2, 0.0, 1.0], [end, mean, 0.0, 1.0]],
        "windows": [{"batch": 20, **window}, {"batch": end, **window}],
        "finals": {str(end): {"right": right, "length": 4.0}},
        "model": {"parameters": 10, "prompt_tokens": 2.0},
        "hardware": {"cpu": "made up"},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records in which `grpo` loses a quarter on every seed, `hot` differs by luck, and distillation is quicker."""
    runs = {
        "prorl": ["4433", "4432", "4434"],
        "grpo": ["3322", "3321", "3323"],
        "hot": ["4443", "4132", "4444"],
        "opd": ["4444", "4444", "4444"],
    }
    for arm, seeds in runs.items():
        for seed, right in enumerate(seeds, 1):
            record = made_up(arm, seed, right, end=120 if arm == "opd" else 40)
            if arm == "opd":
                record["curve"][0][1] = 0.99
                record["teacher"] = {"seed": 3, "batches": 40}
            (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(record))
    (tmp_path / "start.json").write_text(json.dumps({"right": "1120", "length": 4.0}))
    return tmp_path


def test_the_report_compares_with_prorl_by_item_and_by_seed(bench, part, folder: Path) -> None:
    text = bench.report(folder)
    rows = {row["arm"]: row for row in json.loads((folder / "summary.json").read_text())["summary"]}
    assert rows.keys() == {"prorl", "grpo", "hot"}
    assert rows["prorl"]["accuracy"] == pytest.approx((14 + 13 + 15) / 3 / 16)
    assert rows["prorl"]["accuracy_seeds_high"] == pytest.approx(
        14 / 16 + 4.3027 / 16 / math.sqrt(3), abs=1e-4
    )
    assert rows["prorl"]["difference"] is None and rows["prorl"]["sampling_share"] == 0.25
    assert rows["grpo"]["difference"] == rows["grpo"]["difference_seeds_high"] == pytest.approx(-0.25)
    assert (rows["grpo"]["effect"], rows["hot"]["effect"]) == ("shown", "not shown")
    assert rows["hot"]["half_width_seeds"] > rows["grpo"]["half_width_seeds"]
    assert "student before: 25.0 %" in text and "| no resets (GRPO) | 62.5 % |" in text
    with (folder / "summary.csv").open() as lines:
        assert [row["arm"] for row in csv.DictReader(lines)] == list(rows)
    assert {"ablations.png", "resets.png", "distillation.png"} <= {p.name for p in folder.iterdir()}


def test_what_an_arm_does_not_have_is_null(bench, folder: Path) -> None:
    for path in folder.glob("hot-*.json"):
        record = json.loads(path.read_text())
        for window in record["windows"]:
            del window["kl_ref"]
        path.write_text(json.dumps(record))
    bench.report(folder)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    text = (folder / "summary.json").read_text()
    rows = {row["arm"]: row for row in json.loads(text, parse_constant=refuse)["summary"]}
    assert rows["hot"]["kl_ref"] is None and rows["prorl"]["kl_ref"] == pytest.approx(0.2)


def test_the_committed_tables_are_those_of_the_committed_records(bench) -> None:
    records, text = bench.load(bench.RESULTS), (bench.RESULTS / "summary.md").read_text()
    threshold, rows = bench.distillation(records)
    assert bench.lengths(records) == [120, 240]
    assert all(bench.markdown(bench.compare(records, end)) in text for end in (120, 240))
    assert bench.distillation_markdown(rows, threshold) in text


def test_steps_and_flops_to_the_teacher_are_counted_alike(bench, part, folder: Path) -> None:
    bench.report(folder)
    found = json.loads((folder / "summary.json").read_text())
    assert found["threshold"] == pytest.approx(15 / 16 - 0.02)
    rows = {(r["arm"], r["seed"]): r for r in found["distillation"]}
    assert rows["prorl", 1]["batches"] is None  # 14/16 stays below
    assert rows["prorl", 3]["batches"] == 40 and rows["prorl", 3]["optimizer_steps"] == 160
    assert rows["opd", 1]["batches"] == rows["opd", 1]["optimizer_steps"] == 20
    one = part("flops").batch_flops(10, 128, 128, 6.0, reference=False, teacher=10)
    assert rows["opd", 1]["tflops"] == pytest.approx(20 * one / 1e12)


def test_two_teachers_are_no_comparison(bench, folder: Path) -> None:
    path = folder / "opd-2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher": {"seed": 1, "batches": 40}}))
    with pytest.raises(ValueError, match="several teachers"):
        bench.report(folder)


def test_the_teacher_is_the_best_run_on_validation_items(bench, folder: Path, tmp_path) -> None:
    teacher = bench.best(bench.load(folder), tmp_path)
    assert (teacher.seed, teacher.batches, teacher.export) == (3, 40, tmp_path / "prorl-3" / "export")
    with pytest.raises(ValueError, match="train that arm first"):
        bench.best({}, tmp_path)


def test_recorded_commands_name_no_folder_of_the_machine(bench, folder: Path) -> None:
    bench.report(folder)
    commands = json.loads((folder / "summary.json").read_text())["commands"]
    assert commands.keys() == {"prorl", "grpo", "hot", "opd"}
    assert not any(
        str(place) in " ".join(c) for c in commands.values() for place in (folder, ROOT, Path.home())
    )


def test_an_effect_needs_the_seeds_to_agree(part) -> None:
    report, interval = part("report"), part("report").Interval
    assert report.verdict(interval(1, 0.5, 1.5, 9), interval(1, 0.1, 1.9, 3)) == "shown"
    assert report.verdict(interval(1, 0.5, 1.5, 9), interval(1, -0.1, 2, 3)).startswith("in these runs")
    assert report.verdict(interval(1, -0.5, 1.5, 9), interval(1, -0.1, 2, 3)) == "not shown"


def log_rows(begin: int, end: int) -> list[dict[str, Any]]:
    """What a CSV log has: a row per batch, and one of the validation at the end."""
    train = [{"step": i, "train/length": 2.0 + i, "train/entropy": 1.0} for i in range(begin, end)]
    val = {"step": end - 1, "val/accuracy": end / 100, "val/accuracy_low": 0.0, "val/accuracy_high": 1.0}
    return [*train, val]


def test_runs_are_made_once_and_shorter_ones_go_on(bench, part, tmp_path, monkeypatch) -> None:
    module, calls = part("run"), []

    def pretend(arguments: list[str], folder: Path) -> None:
        log = folder / "logs" / f"version_{len(calls)}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        with log.open("w", newline="") as out:
            columns = [
                "step",
                "train/length",
                "train/entropy",
                "val/accuracy",
                "val/accuracy_low",
                "val/accuracy_high",
            ]
            writer = csv.DictWriter(out, columns)
            writer.writeheader()
            # The second process goes on from a checkpoint some batches before the first one's end.
            writer.writerows(log_rows(0, 40) if not calls else log_rows(30, 80))
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").touch()
        calls.append(arguments)

    monkeypatch.setattr(module, "onpolicy", pretend)
    monkeypatch.setattr(module, "evaluate", lambda model: {"right": "4", "length": 1.0})
    monkeypatch.setattr(bench, "start", lambda records: None)
    monkeypatch.setattr(module, "model_size", lambda model: {"parameters": 1, "prompt_tokens": 1.0})
    records, work = tmp_path / "records", tmp_path / "work"
    assert bench.train(["prorl"], [1], 40, records, work) == [("prorl", 1)]
    assert bench.train(["prorl"], [1], 40, records, work) == [] and len(calls) == 1
    assert bench.train(["prorl"], [1], 80, records, work) == [("prorl", 1)]
    assert not any("--ckpt_path" in a for a in calls[0])
    assert f"--ckpt_path={work / 'prorl-1' / 'checkpoints' / 'last.ckpt'}" in calls[1]
    record = json.loads(module.record_path(records, "prorl", 1).read_text())
    assert list(record["finals"]) == ["40", "80"] and record["batches"] == 80
    assert [point[:2] for point in record["curve"]] == [[40, 0.4], [80, 0.8]]
    assert [w["batches"] for w in record["windows"]] == [20, 20, 20, 20]
    assert record["windows"][1]["length"] == pytest.approx(sum(2.0 + i for i in range(20, 40)) / 20, rel=1e-3)
