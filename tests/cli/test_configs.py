"""Every packaged configuration runs: the quickstart as it is, the others on tiny stand-ins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import toys
import trajectories
import yaml

from lightning_onpolicy._configs import config_root, list_configs
from lightning_onpolicy.cli import main
from lightning_onpolicy.datamodules.assets import resolve_asset

ALL = list(list_configs())
OVERLAYS = [name for name in ALL if "/with_" in name]
READ = {name: yaml.safe_load((config_root() / f"{name}.yaml").read_text()) for name in ALL}
# Others are for predict, test and reject; tests of what they configure run them.
FITS = [
    name
    for name in ALL
    if "train" in READ[name].get("data", {}).get("init_args", {})
    or "path" in READ[name].get("data", {}).get("init_args", {})
]
QUICK = [name for name in FITS if name.startswith("quickstart/") and name not in OVERLAYS]
LARGE = [name for name in FITS if not name.startswith("quickstart/")]
# In place of the model that quickstart/calculator_sft makes; it never calls the tool, and so no group's rewards vary.
MORE = {
    "quickstart/calculator": [
        "--model.init_args.student.path=onpolicy://quickstart/models/student",
        "--data.init_args.dynamic_sampling=null",
    ],
}


def small(tmp_path: Path) -> list[str]:
    """Flags for one tiny step that writes below ``tmp_path``."""
    return [
        "--trainer.fast_dev_run=1",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
        "--data.init_args.prompts_per_batch=4",
        "--data.init_args.eval_prompts=4",
        "--data.init_args.eval_group_size=2",
    ]


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what earlier stages would have made: answers, judgements, and judges."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "runs" / "teacher_answers.jsonl"
    file.parent.mkdir()
    file.write_text(
        "".join(json.dumps({"prompt": f"{i}+1+1=", "response": str(i + 2)}) + "\n" for i in range(8))
    )
    judged = tmp_path / "runs" / "spct" / "trajectories.jsonl"
    judged.parent.mkdir()
    trajectories.write(judged, trajectories.lines(20, 3))
    (judged.parent / "tuning.jsonl").write_text(file.read_text())
    shutil.copy(resolve_asset("onpolicy://quickstart/judge_items.jsonl"), judged.parent / "items.jsonl")
    for stage in ("spct_rft", "spct_rl"):
        export = tmp_path / "runs" / stage / "export"
        shutil.copytree(resolve_asset("onpolicy://quickstart/models/judge"), export)
        (export / "onpolicy_export.json").write_text("{}")  # an export may be replaced by a later one
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_quickstart_configurations_run_as_they_are(name: str, tmp_path: Path, answers: Path) -> None:
    flags = small(tmp_path)
    if READ[name]["data"]["class_path"] in ("PairDataModule", "TrajectoryDataModule"):  # nothing is sampled
        flags = [flag for flag in flags if ".eval_" not in flag]
    main(["fit", "-c", name, *flags, *MORE.get(name, [])])


@pytest.mark.slow
@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_compose_with_the_quickstart(name: str, tmp_path: Path, answers: Path) -> None:
    main(["fit", "-c", "quickstart/opd", "-c", name, *small(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_other_configurations_run_on_stand_ins(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, teacher and prompts are replaced; everything else is the packaged file."""
    monkeypatch.chdir(tmp_path)
    config: dict[str, Any] = READ[name]
    student, teacher = (
        toys.save_model(tmp_path / n, seed=i, hidden=128) for i, n in enumerate(("student", "teacher"))
    )
    named = config["data"]["init_args"]["train"]["init_args"]
    key, messages = named.get("prompt_key", "prompt"), named.get("messages_key")
    # What the rewards of every domain read, and an answer that a number at the response's end may hit.
    verified = {"domain": "stem", "answer": [str(digit) for digit in range(10)]}
    judged = {"responses": ["t1", "t2 t3"], "labels": [0, 1]}
    rows: list[dict[str, Any]] = [
        {key: f"t{i} t{i + 1}", "response": "t3 t4", **verified, **judged} for i in range(8)
    ]
    if messages:
        rows = [{messages: [{"role": "user", "content": f"t{i}"}]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stand_in: dict[str, Any] = {"model": {"init_args": {}}, "data": {"init_args": {}}}
    for key, path in (("student", student), ("teacher", teacher)):
        if key not in config["model"]["init_args"]:
            continue
        keep = {
            k: v
            for k, v in config["model"]["init_args"][key].items()
            if k in ("lora", "gradient_checkpointing")
        }
        stand_in["model"]["init_args"][key] = {"path": path, "tokenizer": path, "dtype": "float32", **keep}
    stand_in["trainer"] = {"precision": "32-true", "accelerator": "cpu"}
    given, stood = config["data"]["init_args"], stand_in["data"]["init_args"]
    for split in {"train", "val"} & given.keys():
        stood[split] = {"class_path": "FileSource", "init_args": {"path": str(tmp_path / "rows.jsonl")}}
        if given[split]["class_path"] == "DomainMix":
            mix = given[split]["init_args"]
            parts = dict.fromkeys(mix["parts"], stood[split])
            stood[split] = {"class_path": "DomainMix", "init_args": {**mix, "parts": parts}}
        if given[split]["class_path"] == "JudgeSource":
            (tmp_path / "short.jinja").write_text("{% for r in responses %}{{ r }} {% endfor %}")
            template = {"path": str(tmp_path / "short.jinja")}
            stood[split]["class_path"] = "JudgeSource"
            stood[split]["init_args"]["template"] = template
    if "group_size" in given:
        stood["group_size"] = min(given["group_size"], 16)
    for how in {"sampling", "eval_sampling"} & given.keys():
        stood[how] = {**given[how], "max_new_tokens": 8}
    overlay = tmp_path / "stand_in.yaml"
    overlay.write_text(yaml.safe_dump(stand_in))
    main(["fit", "-c", name, "-c", str(overlay), *small(tmp_path)])


def test_every_configuration_says_what_it_is() -> None:
    assert {"quickstart/opd", "quickstart/sft", "opd_tml_reasoning"} <= set(ALL)
    for name, what in list_configs().items():
        assert len(what) > 20, name
