"""SPCTReward: trains on the rule, scores files, evaluates on benchmarks, through Trainer and command line.

Legend: ``k`` samples, ``n`` responses.
"""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judges
import lightning.pytorch as pl
import pytest
import ranks_spct
import torch
import yaml
from judged import GOOD, write_benchmark
from launching import on_two_ranks
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_onpolicy._configs import config_root, list_configs
from lightning_onpolicy.callbacks.completions import CompletionWriter
from lightning_onpolicy.callbacks.judge_report import JudgeReport
from lightning_onpolicy.cli import main
from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.judging.backends import CallableBackend
from lightning_onpolicy.datamodules.judging.formats import FORMATS
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.meta import MetaReading
from lightning_onpolicy.datamodules.judging.module import JudgingDataModule
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate
from lightning_onpolicy.datamodules.judging.records import JudgeSample, read_records
from lightning_onpolicy.datamodules.judging.rejection import item_row
from lightning_onpolicy.datamodules.judging.source import JudgeSource
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.rewards.function import FunctionReward
from lightning_onpolicy.datamodules.rewards.judgement import JudgementReward, ReadableReward
from lightning_onpolicy.modules.losses.advantages import advantages
from lightning_onpolicy.modules.losses.settings import AdvantageSpec
from lightning_onpolicy.modules.spct import JudgingSpec, SPCTReward

BACKEND = '{"class_path": "CallableBackend", "init_args": {"function": "judges.by_content"}}'
STUDENT = {"path": "onpolicy://quickstart/models/student", "dtype": "float32"}


def config_text(name: str) -> str:
    return (config_root() / f"{name}.yaml").read_text()


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    base: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**base, **settings})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item_row(item)) + "\n" for item in judges.items(24)))
    return path


@pytest.fixture
def short(tmp_path: Path) -> JudgeTemplate:
    """For a model of few positions, whose digits are scores by themselves."""
    path = tmp_path / "short.jinja"
    path.write_text("{% for r in responses %}{{ r }} {{ tag }}\n{% endfor %}")
    return JudgeTemplate(str(path))


def scripted(**settings: Any) -> SPCTReward:
    backend = CallableBackend(judges.noisy(0.75, readable=0.9))
    return SPCTReward(STUDENT, backend=backend, **settings)  # type: ignore[arg-type]


# -- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["group_zscore", "mean_centred", "leave_one_out"])
def test_plus_and_minus_one_and_one_and_zero_give_the_same_advantages(kind: str) -> None:
    """Up to the scale where the standard deviation is not taken out."""
    right = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 1])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    spec = AdvantageSpec(kind)  # type: ignore[arg-type]
    plain, signed = (advantages(spec, r, group, torch.ones(8)) for r in (right, 2 * right - 1))
    scale = 1.0 if kind == "group_zscore" else 2.0
    torch.testing.assert_close(signed, scale * plain, atol=1e-4, rtol=1e-4)


def fitted(
    file: Path, short: JudgeTemplate, folder: Path, **settings: Any
) -> tuple[SPCTReward, dict[str, float]]:
    module = SPCTReward(
        STUDENT,  # type: ignore[arg-type]
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
    )
    data = OnPolicyDataModule(
        train=JudgeSource(file, short, orders_per_item=2),
        prompts_per_batch=4,
        group_size=4,
        steps_per_epoch=2,
        sampling=Sampling(max_new_tokens=8),
        rewards={"right": JudgementReward(), "readable": ReadableReward()},
        reward_weights={"readable": 0.0},
    )
    run = trainer(folder, **settings)
    run.fit(module, data)
    return module, {name: float(value) for name, value in run.callback_metrics.items()}


def test_what_cannot_be_read_costs_one_in_training(file: Path, short: JudgeTemplate, tmp_path: Path) -> None:
    module, metrics = fitted(file, short, tmp_path)
    assert (
        metrics["train/reward"] == -1
        and metrics["train/reward/readable"] == 0
        and metrics["train/scored"] == 1
    )
    assert module.recipe == "spct" and module.kl.coef == 0.08 and module.reduction == "sequence_mean"
    assert metrics["train/constant_groups"] == 1  # all equal: nothing to learn from, and no NaN
    assert all(bool(p.isfinite().all()) for p in module.policy.parameters())


@pytest.mark.parametrize("name", [name for name in list_configs() if "JudgementReward" in config_text(name)])
def test_configurations_validate_judges_by_their_accuracy_and_train_them_on_plus_and_minus_one(
    name: str,
) -> None:
    """Catches: ``val/accuracy`` that is twice the accuracy less one, because training's reward measures it."""
    data = yaml.safe_load(config_text(name))["data"]["init_args"]
    measured = data.get("eval_rewards") or data["rewards"]
    assert measured["right"]["init_args"] == {"wrong": 0.0}
    assert sum(data.get("reward_weights", {}).get(key, 1.0) for key in measured) == 1.0
    if "eval_rewards" in data:
        assert data["rewards"]["right"] == {"class_path": "JudgementReward"}


# -- scoring and evaluation ------------------------------------------------------------------------------------


def test_predict_scores_files(file: Path, tmp_path: Path) -> None:
    module = scripted(judging=JudgingSpec(k=9, seed=2))
    run = trainer(tmp_path)
    rows = [row for batch in run.predict(module, JudgingDataModule(predict=str(file))) or [] for row in batch]
    assert [row["uid"] for row in rows] == [item.uid for item in judges.items(24)]
    for row in rows:
        read = [s["scores"] for s in row["samples"] if s["scores"] is not None]
        assert len(row["samples"]) == 9 and row["voted"] == [
            i for i, s in enumerate(row["samples"]) if s["scores"]
        ]
        assert row["scores"] == [sum(column) / len(read) for column in zip(*read, strict=True)]
        assert row["labels"] and json.dumps(row)  # what the file had is still there, and it can be written
    right = sum(row["best"] == max(range(3), key=row["labels"].__getitem__) for row in rows)
    assert right >= 21


def test_predict_has_null_where_nothing_could_be_read(file: Path, tmp_path: Path) -> None:
    module = SPCTReward(STUDENT, backend=CallableBackend(lambda prompt, seed: "?"))  # type: ignore[arg-type]
    run = trainer(tmp_path)
    rows = [row for batch in run.predict(module, JudgingDataModule(predict=str(file))) or [] for row in batch]
    assert all(row["scores"] is None and row["best"] is None and row["voted"] == [] for row in rows)


def test_test_writes_records_tables_and_a_plot_of_every_k(file: Path, tmp_path: Path) -> None:
    module = scripted(judging=JudgingSpec(k=16))
    folder = tmp_path / "report"
    run = trainer(tmp_path, callbacks=[JudgeReport(str(folder))])
    [metrics] = run.test(module, JudgingDataModule(test={"items": str(file)}), verbose=False)
    assert set(metrics) == {f"test/items/vote@{k}" for k in (1, 2, 4, 8, 16)}
    assert metrics["test/items/vote@16"] > metrics["test/items/vote@1"]
    records = read_records(folder / "records.jsonl")
    assert len(records) == 24 and all(len(record.samples) == 16 for record in records)
    assert len({sample.order for record in records for sample in record.samples}) == 6
    assert {path.name for path in folder.iterdir()} == {
        "records.jsonl",
        "tables.txt",
        "sweep.csv",
        "accuracy.png",
    }
    assert (
        "toy" in (folder / "tables.txt").read_text() and "random tie" in (folder / "tables.txt").read_text()
    )
    run.test(module, JudgingDataModule(test={"items": str(file)}), verbose=False)
    assert (tmp_path / "report.previous1" / "records.jsonl").exists()  # an earlier evaluation is moved aside


def test_every_benchmarks_format_goes_through_one_evaluation(tmp_path: Path) -> None:
    """A judge that knows what is right gets everything right, single responses and ties included."""

    def judge(prompt: str, seed: int) -> str:
        texts = judges.shown(prompt)
        if len(texts) == 1:
            return f"\\boxed{{{int(texts[0].startswith(GOOD))}}}"
        return f"\\boxed{{{', '.join('9' if text.startswith(GOOD) else '2' for text in texts)}}}"

    files = {name: str(write_benchmark(tmp_path / name, name, 2)) for name in FORMATS}
    module = SPCTReward(STUDENT, backend=CallableBackend(judge), judging=JudgingSpec(k=2, order="rotated"))  # type: ignore[arg-type]
    folder = tmp_path / "report"
    run = trainer(tmp_path, callbacks=[JudgeReport(str(folder), plot=False)])
    [metrics] = run.test(module, JudgingDataModule(test=files), verbose=False)
    assert {name.split("/")[1] for name in metrics} == set(FORMATS)
    for name in FORMATS:
        assert metrics[f"test/{name}/vote@2"] == pytest.approx(1.0, abs=0.011), name  # Ties end in 0.01 tanh
    assert all(
        sample.outcome == "ok" for item in read_records(folder / "records.jsonl") for sample in item.samples
    )


def evaluated(folder: Path, *, limit: int | None = None, k: int = 8, **files: str) -> dict[str, float]:
    """What ``test`` logs, with a plot, of a judge that knows the best of several, and calls a single one right."""

    def judge(prompt: str, seed: int) -> str:
        texts = judges.shown(prompt)
        scores = ["9" if text.startswith(GOOD) else "2" for text in texts] if len(texts) > 1 else ["1"]
        return f"\\boxed{{{', '.join(scores)}}}"

    module = SPCTReward(STUDENT, backend=CallableBackend(judge), judging=JudgingSpec(k=k))  # type: ignore[arg-type]
    run = trainer(folder, callbacks=[JudgeReport(str(folder / "report"))])
    [metrics] = run.test(module, JudgingDataModule(test=files, limit=limit), verbose=False)
    return dict(metrics)


def test_judgebench_has_its_score_also_in_shuffled_orders(tmp_path: Path) -> None:
    """Catches: pairs that chance shows in one order only, so that the benchmark has no score and its plot fails."""
    path = str(write_benchmark(tmp_path / "data", "judgebench", 30))
    assert JudgingSpec().order == "shuffled"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no score")
        metrics = evaluated(tmp_path, judgebench=path, items=str(labelled(tmp_path, 0.0, 1.0)))
    assert {f"test/judgebench/vote@{k}": 1.0 for k in (2, 4, 8)}.items() <= metrics.items()
    assert "test/judgebench/vote@1" not in metrics
    records = read_records(tmp_path / "report" / "records.jsonl")
    first = [r.samples[0].order for r in records if r.benchmark == "judgebench"]
    assert 40 <= first.count((0, 1)) <= 80, "which order comes first is a coin's"
    for record in records:
        alternates = all(a.order != b.order for a, b in itertools.pairwise(record.samples))
        assert alternates or record.benchmark != "judgebench"
        assert not alternates or record.benchmark != "items"  # others are shuffled as before


def test_one_sample_of_judgebench_is_said_to_be_too_few_before_anything_is_sampled(tmp_path: Path) -> None:
    path = str(write_benchmark(tmp_path / "data", "judgebench", 2))
    asked: list[str] = []

    def judge(prompt: str, seed: int) -> str:
        asked.append(prompt)
        return judges.by_content(prompt, seed)

    for spec in (JudgingSpec(k=1), JudgingSpec(k=4, order="fixed")):
        module = SPCTReward(STUDENT, backend=CallableBackend(judge), judging=spec)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="judgebench will have no score")
            with pytest.raises(UserWarning, match=r"set judging\.k to 2 or more"):
                trainer(tmp_path).test(module, JudgingDataModule(test={"judgebench": path}), verbose=False)
    assert not asked


def labelled(folder: Path, *labels: float) -> Path:
    """A file of single pairs or, of one label, single responses."""
    path = folder / "labelled.jsonl"
    row = {"prompt": "?", "responses": ["bad", "good"][-len(labels) :], "labels": labels}
    path.write_text("".join(json.dumps({**row, "uid": f"u{i}"}) + "\n" for i in range(3)))
    return path


def test_a_score_that_does_not_exist_costs_no_evaluation(tmp_path: Path) -> None:
    """Catches: an error after all is sampled, for want of something to draw, and with it the loss of what was said."""
    one = tmp_path / "one.jsonl"
    write_benchmark(tmp_path / "data", "realmistake", 2)
    lines = (tmp_path / "data" / "math" / "x.jsonl").read_text().splitlines()
    one.write_text("\n".join(line for line in lines if '"no_error"' in line))
    ties = write_benchmark(tmp_path / "ties", "rewardbench2", 2)
    only = [line for line in (ties / "test.jsonl").read_text().splitlines() if '"Ties"' in line]
    (ties / "test.jsonl").write_text("\n".join(only))
    pairs = str(write_benchmark(tmp_path / "pairs", "judgebench", 2))
    for name, files, limit, k, why in (
        ("realmistake", {"realmistake": str(one)}, None, 2, "needs right and wrong responses"),
        ("rewardbench2", {"rewardbench2": str(ties)}, 3, 2, "Ties: every question needs both of its items"),
        ("judgebench", {"judgebench": pairs}, None, 1, "must be judged in both orders"),
    ):
        folder = tmp_path / name
        with pytest.warns(UserWarning, match=f"{name} has no score.*{why}"):
            assert evaluated(folder, limit=limit, k=k, **files) == {}
        written = {path.name for path in (folder / "report").iterdir()}
        assert written == {"records.jsonl", "tables.txt", "sweep.csv"}
    with pytest.warns(UserWarning, match="realmistake has no score"):
        metrics = evaluated(tmp_path / "both", realmistake=str(one), judgebench=pairs)
    assert metrics["test/judgebench/vote@8"] == 1.0
    assert (tmp_path / "both" / "report" / "accuracy.png").exists()


def test_the_policy_itself_judges_where_no_backend_is_named(
    file: Path, short: JudgeTemplate, tmp_path: Path
) -> None:
    spec = JudgingSpec(template=short, k=2, sampling=Sampling(max_new_tokens=4))
    module = SPCTReward(STUDENT, judging=spec)  # type: ignore[arg-type]
    run = trainer(tmp_path)
    data = JudgingDataModule(predict=str(file), limit=3)
    rows = [row for batch in run.predict(module, data) or [] for row in batch]
    assert len(rows) == 3 and any(s["text"] for row in rows for s in row["samples"])
    again = [row for batch in trainer(tmp_path).predict(module, data) or [] for row in batch]
    assert again == rows


def test_single_responses_are_asked_about_with_the_template_of_their_training(tmp_path: Path) -> None:
    """Catches: ``test`` and ``predict`` that ask with the packaged template what was trained with one's own."""
    mine = tmp_path / "mine.jinja"
    mine.write_text("Right? {{ responses[0] }}")
    row = {"uid": "a", "prompt": "1+1=", "responses": ["2"], "labels": [1]}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    for spec in (
        {"template": JudgeTemplate(str(mine), 0, 1)},
        {"single": JudgeTemplate(str(mine), 0, 1)},
        {},
    ):
        trained = JudgeSource(tmp_path / "one.jsonl", **spec)[0]["prompt"]  # type: ignore[arg-type]
        asked: list[str] = []

        def judge(prompt: str, seed: int, asked: list[str] = asked) -> str:
            asked.append(prompt)
            return "\\boxed{1}"

        module = SPCTReward(STUDENT, backend=CallableBackend(judge), judging=JudgingSpec(k=1, **spec))  # type: ignore[arg-type]
        items = str(tmp_path / "one.jsonl")
        data = JudgingDataModule(predict=items, test={"items": items})
        trainer(tmp_path).predict(module, data)
        trainer(tmp_path).test(module, data, verbose=False)
        assert asked == [trained] * 2 and ("Right?" in trained) == bool(spec)


def test_a_meta_model_chooses_who_votes_also_where_its_number_is_not_given(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a meta model that is loaded, scores every judgement, and has no effect on any."""

    class Meta:
        def __init__(self, model: object, reading: object, device: str) -> None:
            pass

        def score(self, items: Sequence[JudgeItem], samples: Sequence[JudgeSample]) -> list[float | None]:
            return [float(s.scores[0]) for s in samples if s.scores is not None]

    monkeypatch.setattr("lightning_onpolicy.modules.spct.MetaRewardScorer", Meta)
    for k, k_meta, kept in ((9, None, 4), (1, None, 1), (9, 9, 9), (9, 2, 2)):
        backend = CallableBackend(judges.noisy(0.75))
        module = SPCTReward(STUDENT, backend=backend, meta="a", judging=JudgingSpec(k=k, k_meta=k_meta))  # type: ignore[arg-type]
        [rows] = trainer(tmp_path).predict(module, JudgingDataModule(predict=str(file), limit=3)) or []
        for row in rows:
            best = sorted(range(k), key=lambda i: (-row["samples"][i]["meta"], i))[:kept]
            assert row["voted"] == sorted(best), (k, k_meta)


def test_a_number_of_kept_samples_needs_a_meta_model() -> None:
    with pytest.raises(ValueError, match="name one in meta"):
        scripted(judging=JudgingSpec(k=4, k_meta=2))
    with pytest.raises(ValueError, match=r"k_meta in \[1, k\]"):
        JudgingSpec(k=4, k_meta=5)


def test_settings_without_an_effect_are_named() -> None:
    with pytest.raises(ValueError, match="give them to the backend"):
        scripted(judging=JudgingSpec(sampling=Sampling(max_new_tokens=7)))
    with pytest.raises(ValueError, match="reading says how the meta model reads"):
        scripted(reading=MetaReading())


def test_scores_of_files_are_strict_json_whatever_the_meta_model_and_the_judge_say(tmp_path: Path) -> None:
    item = judges.items(1)[0]
    sample = JudgeSample((0, 1, 2), "ok", (1, 2, 3), float("nan"), "\ud800")
    row = scripted()._row(item, [sample])
    assert row["samples"][0]["meta"] is None and json.dumps(row, allow_nan=False)
    writer = CompletionWriter(str(tmp_path / "out.jsonl"))
    run = trainer(tmp_path)
    writer.on_predict_start(run, scripted())
    writer.write_on_batch_end(run, scripted(), [row], None, None, 0, 0)
    writer.on_predict_end(run, scripted())
    assert json.loads((tmp_path / "out.jsonl").read_text())["samples"][0]["text"] == "\ud800"


def test_a_tables_dates_come_back_as_text(tmp_path: Path) -> None:
    """Catches: a file that is judged and then cannot be written, because JSON has no dates."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    when = datetime.datetime(2026, 8, 21, 12, 30)
    rows = [{"prompt": "?", "responses": ["a", "bb"], "when": when, "day": when.date()}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    out = tmp_path / "out.jsonl"
    run = trainer(tmp_path, callbacks=[CompletionWriter(str(out))])
    module = SPCTReward(STUDENT, backend=CallableBackend(judges.by_content))  # type: ignore[arg-type]
    run.predict(module, JudgingDataModule(predict=str(tmp_path / "in.parquet")))
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["when"], row["day"], row["best"]) == ("2026-08-21 12:30:00", "2026-08-21", 1)


def test_without_matplotlib_a_report_says_so_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: an ImportError when all is judged."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(ImportError, match=r"lightning-onpolicy\[plot\]'?, or set plot: false"):
        JudgeReport(str(tmp_path))
    assert JudgeReport(str(tmp_path), plot=False).plot is False


def test_a_report_without_a_judge_says_what_goes_with_it(tmp_path: Path) -> None:
    report = JudgeReport(str(tmp_path))
    with pytest.raises(TypeError, match="goes with SPCTReward and JudgingDataModule"):
        report.on_test_batch_end(trainer(tmp_path), scripted(), None, [], 0)


def test_the_command_line_scores_a_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(
        [
            "predict",
            "-c",
            "spct_score",
            f"--data.init_args.predict={file}",
            "--model.init_args.student=onpolicy://quickstart/models/student",
            f"--model.init_args.backend={BACKEND}",
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
            f"--completions.path={tmp_path / 'scores.jsonl'}",
        ]
    )
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["best"] for row in rows] == [item.best for item in judges.items(24)]


def test_the_command_line_evaluates(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(
        [
            "test",
            "-c",
            "spct_eval",
            f'--data.init_args.test={{"items": "{file}"}}',
            "--model.init_args.student=onpolicy://quickstart/models/student",
            f"--model.init_args.backend={BACKEND}",
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
        ]
    )
    assert (tmp_path / "runs" / "spct_eval" / "accuracy.png").stat().st_size > 1000


# -- ranks and resume ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_judge_every_item_once_and_train_on_whole_groups(
    file: Path, short: JudgeTemplate, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    ranks_spct.run(one, file, Path(short.path), "auto", 1)
    on_two_ranks(ranks_spct, two, file, short.path)
    for name in ("records.jsonl", "sweep.csv", "tables.txt"):
        for folder in ("report", "few"):
            assert (two / folder / name).read_text() == (one / folder / name).read_text(), (folder, name)
    ranks = [json.loads((two / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["metrics"]["train/scored"] == 1


def test_a_resumed_run_equals_one_that_was_never_interrupted(
    file: Path, short: JudgeTemplate, tmp_path: Path
) -> None:
    def fit(folder: Path, epochs: int, ckpt: str | None = None) -> SPCTReward:
        module = SPCTReward(STUDENT, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))  # type: ignore[arg-type]
        data = OnPolicyDataModule(
            train=JudgeSource(file, short, orders_per_item=2),
            prompts_per_batch=3,
            group_size=4,
            steps_per_epoch=2,
            sampling=Sampling(max_new_tokens=6),
            rewards={"right": FunctionReward(lambda prompt, response: float(len(response) % 2))},
        )
        saving = ModelCheckpoint(dirpath=folder, save_last=True, every_n_epochs=1)
        run = trainer(folder, max_epochs=epochs, callbacks=[saving], enable_checkpointing=True)
        run.fit(module, data, ckpt_path=ckpt)
        return module

    whole = fit(tmp_path / "whole", 2)
    fit(tmp_path / "half", 1)
    again = fit(tmp_path / "rest", 2, str(tmp_path / "half" / "last.ckpt"))
    start = SPCTReward(STUDENT)  # type: ignore[arg-type]
    start.configure_model()
    before = start.policy.state_dict()
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, again.policy.state_dict()[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in whole.policy.state_dict().items())
