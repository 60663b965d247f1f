"""``onpolicy validate`` on the packaged mix of domains, end to end: every verifier, every table, a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from workspace import onpolicy

pytest.importorskip("reasoning_gym")
pytest.importorskip("math_verify")
pytest.importorskip("matplotlib")

DOMAINS = ("code", "instructions", "logic", "math", "stem")


def validate(folder: Path, *more: object) -> int:
    """Exit code of the packaged evaluation with two samples per item."""
    return onpolicy(
        "validate",
        "-c",
        "quickstart/domains",
        "--trainer.logger=false",
        "--trainer.callbacks=null",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        f"--evaluation.folder={folder}",
        "--data.init_args.eval_group_size=2",
        *more,
    )


def lines(folder: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((folder / "validate" / "report.json").read_text())
    return {x["task"] or x["domain"] or x["level"]: x for x in found["lines"]}


@pytest.mark.slow
def test_each_domain_is_verified_and_two_evaluations_compare(tmp_path: Path, capsys: Any) -> None:
    """Catches: a domain sent to another's verifier, items that their own verifier refuses, programs that do not run in
    the sandbox, a macro average that is the micro average by another name."""
    assert validate(tmp_path / "half", "--data.init_args.engine=oracle.Half") == 0
    out = capsys.readouterr().out
    assert "validate, step 0: 240 samples of 120 items" in out
    found = lines(tmp_path / "half")
    assert [x for x in found if x in DOMAINS] == list(DOMAINS)
    for name in (*DOMAINS, "programs", "functions", "units", "choices", "macro", "micro"):
        line = found[name]
        assert line["accuracy"]["mean"] == 0.5 == line["pass_at"]["1"]["mean"], name
        assert line["pass_at"]["2"]["mean"] == 1.0 and line["unscored"] == line["truncated"] == 0.0, name
    assert {found[name]["items"] for name in DOMAINS} == {24}
    assert "val/accuracy_domain/stem" in out and "val/accuracy_macro" in out
    right = ("--data.init_args.engine=oracle.Right", f"--evaluation.compare_to={tmp_path / 'half'}")
    assert validate(tmp_path / "right", *right) == 0
    out = capsys.readouterr().out
    assert "compared with" in out and "+50.0" in out
    report = json.loads((tmp_path / "right" / "validate" / "report.json").read_text())
    changes = {x["domain"] or x["level"]: x["result"] for x in report["comparison"]["changes"]}
    assert report["comparison"]["same_seeds"]
    for name in DOMAINS:
        assert (changes[name]["better"], changes[name]["worse"], changes[name]["equal"]) == (24, 0, 0)
        assert changes[name]["test"] == {"p_value": pytest.approx(2.0**-23), "exact": True}
    assert changes["macro"]["difference"]["mean"] == changes["micro"]["difference"]["mean"] == 0.5
    assert validate(tmp_path / "fewer", *right, "--data.init_args.eval_prompts=20") == 1
    assert "100 of 120 items" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tiny_student_is_evaluated_offline_and_a_missing_baseline_is_one_sentence(
    tmp_path: Path, capsys: Any
) -> None:
    """Catches: prompts the tiny model cannot take, prefixes of the mix without some domain."""
    few = ("--data.init_args.eval_prompts=10",)
    assert validate(tmp_path, *few) == 0
    found = lines(tmp_path)
    assert [found[name]["items"] for name in DOMAINS] == [2] * 5
    samples = (tmp_path / "validate" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 20 and all(json.loads(x)["length"] > 0 for x in samples)
    assert validate(tmp_path / "b", *few, f"--evaluation.compare_to={tmp_path / 'none'}") == 1
    [sentence, _] = capsys.readouterr().err.splitlines()[-2:]
    assert sentence.startswith("onpolicy: error: compare_to: ") and "holds no evaluation" in sentence
