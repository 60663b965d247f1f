"""The ``onpolicy`` command as a user meets it: listing, copying, configuring, running, continuing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from workspace import ROWS, Remember, onpolicy, workspace

from lightning_onpolicy._configs import config_root, find_config, list_configs
from lightning_onpolicy.cli import resolve_configs
from lightning_onpolicy.modules.distill import OnPolicyDistill

PREDICTED = {
    "uid",
    "source",
    "prompt",
    "response",
    "prompt_ids",
    "response_ids",
    "reward",
    "finished",
    "finish_reason",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run.yaml`` and what it names."""
    return workspace(tmp_path_factory.mktemp("cli")).parent


@pytest.fixture(scope="module")
def checkpoint(place: Path) -> Path:
    """A checkpoint of a run with objective jsd."""
    root = place / "trained"
    assert onpolicy("fit", "-c", place / "run.yaml", f"--trainer.default_root_dir={root}") == 0
    [found] = root.glob("checkpoints/*.ckpt")
    return Path(found)


def printed(capsys: Any, *args: object) -> dict[str, Any]:
    """What ``--print_config`` says."""
    capsys.readouterr()
    assert onpolicy("fit", *args, "--print_config") == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def test_it_says_how_it_is_used(capsys: Any) -> None:
    for args in ([], ["--help"], ["-h"]):
        assert onpolicy(*args) == 0
        out = capsys.readouterr().out
        assert all(
            word in out
            for word in ("130", "143", "fit", "validate", "test", "predict", "collect", "ls", "cp NAME DEST")
        )


def test_ls_lists_every_file_that_configures_a_run(capsys: Any) -> None:
    assert onpolicy("ls") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    runs = [p for p in config_root().rglob("*.yaml") if "model" in yaml.safe_load(p.read_text())]
    assert set(names) >= {p.relative_to(config_root()).with_suffix("").as_posix() for p in runs}
    for name in names:
        assert Path(find_config(name)).read_text() == (config_root() / f"{name}.yaml").read_text()


def test_cp_copies_and_never_overwrites(tmp_path: Path, capsys: Any) -> None:
    source = (config_root() / "quickstart" / "opd.yaml").read_bytes()
    mine, folder = tmp_path / "new" / "mine.yaml", f"{tmp_path / 'folder'}/"
    for destination, expected in ((mine, mine), (folder, tmp_path / "folder" / "opd.yaml")):
        assert onpolicy("cp", "quickstart/opd", destination) == 0
        assert expected.read_bytes() == source
        assert str(expected) in capsys.readouterr().out
    mine.write_text("edited")
    assert onpolicy("cp", "quickstart/opd", mine) == 1
    assert mine.read_text() == "edited"
    assert str(mine) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["fitt"], "fitt"),
        (["cp", "quickstart/opd"], "cp NAME DEST"),
        (["fit"], "-c CONFIG"),
        (["fit", "-c"], "-c/--config"),
    ],
)
def test_wrong_usage_ends_with_2(args: list[str], named: str, capsys: Any) -> None:
    assert onpolicy(*args) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "cp"])
def test_a_configuration_that_is_not_there_names_those_that_are(
    command: str, tmp_path: Path, capsys: Any
) -> None:
    args = ["-c", "nope"] if command == "fit" else ["nope", tmp_path / "x.yaml"]
    assert onpolicy(command, *args) == 1
    error = capsys.readouterr().err
    assert all(name in error for name in ("nope", *list_configs()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--model.init_args.objectiv=jsd", "objectiv"),
        ("--model.init_args.student.lorra=null", "lorra"),
        ("--data.init_args.sampling.temp=1", "temp"),
        ("--trainer.max_epoch=2", "trainer.max_epoch"),  # the beginning of a key is not the key
        ("--modle=OnPolicyDistill", "modle"),
        ("--data.init_args.prompts_per_batch=many", "many"),
        ("--model.init_args.objective=kl", "reverse_kl"),
        ("--model.init_args.loop.updates=1.5", "updates"),
        ("--trainer.callbacks+=Nope", "Nope"),
    ],
)
def test_keys_and_types_that_do_not_exist_are_named(flag: str, named: str, place: Path, capsys: Any) -> None:
    assert onpolicy("fit", "-c", place / "run.yaml", flag) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error and "NestedArg" not in error
    assert not (place / "out").exists()


def test_an_unknown_key_in_a_file_is_named(place: Path, tmp_path: Path, capsys: Any) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {init_args: {group_sise: 3}}")
    assert onpolicy("fit", "-c", place / "run.yaml", "-c", overlay) == 2
    assert "group_sise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trainer.gradient_clip_val=1.0"], "set model.init_args.loop.max_grad_norm"),
        (["--trainer.accumulate_grad_batches=4"], "model.init_args.loop.micro_batch_tokens"),
        (["--trainer.accelerator=gpu"], "gpu"),
    ],
)
def test_trainer_options_that_cannot_be_are_one_sentence(
    flags: list[str], said: str, place: Path, capsys: Any
) -> None:
    """Catches: a traceback that tells to switch to automatic optimization."""
    assert onpolicy("fit", "-c", place / "run.yaml", *flags) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_values_out_of_range_are_one_sentence(place: Path, capsys: Any) -> None:
    for flag, said in (
        ("--data.init_args.sampling.temperature=-1", "sampling.temperature must be >= 0, got -1.0."),
        ("--model.init_args.loop.updates=0", "loop.updates must be >= 1, got 0."),
    ):
        assert onpolicy("fit", "-c", place / "run.yaml", flag) == 1
        sentence, hint = capsys.readouterr().err.splitlines()[-2:]
        assert sentence == f"onpolicy: error: {said}"
        assert "ONPOLICY_TRACEBACK" in hint


def test_a_printed_configuration_prints_itself(place: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ("--model.init_args.loop.minibatches=2", "--data.init_args.seed=7")
    first = printed(capsys, "-c", place / "run.yaml", *flags)
    copy = tmp_path / "printed.yaml"
    copy.write_text(yaml.safe_dump(first))
    assert printed(capsys, "-c", copy) == first
    assert first["model"]["init_args"]["loop"]["minibatches"] == 2
    assert first["data"]["init_args"]["seed"] == 7


def test_later_files_win_and_flags_win_over_files(place: Path, tmp_path: Path, capsys: Any) -> None:
    files = []
    for name, beta in (("a", 0.2), ("b", 0.3)):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(
            f"model: {{init_args: {{beta: {beta}, {'alpha' if name == 'a' else 'gamma'}: 0.0}}}}"
        )

    def merged(*args: object) -> dict[str, Any]:
        init: dict[str, Any] = printed(capsys, "-c", place / "run.yaml", *args)["model"]["init_args"]
        return init

    a_b = merged("-c", files[0], f"--config={files[1]}")
    assert (a_b["beta"], a_b["alpha"], a_b["objective"]) == (0.3, 0.0, "jsd")
    assert merged("-c", files[1], "-c", files[0])["beta"] == 0.2
    assert merged("-c", files[0], "--model.init_args.beta=0.4")["beta"] == 0.4


def test_callbacks_can_be_appended(place: Path, tmp_path: Path, capsys: Any) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {callbacks+: {class_path: PhaseMonitor}}")
    base = place / "run.yaml"
    for more in (("--trainer.callbacks+=PhaseMonitor",), ("-c", overlay)):
        callbacks = printed(capsys, "-c", base, *more)["trainer"]["callbacks"]
        assert [c["class_path"].rpartition(".")[2] for c in callbacks] == ["Remember", "PhaseMonitor"]
    replaced = printed(capsys, "-c", base, "--trainer.callbacks=[PhaseMonitor]")["trainer"]["callbacks"]
    assert [c["class_path"].rpartition(".")[2] for c in replaced] == ["PhaseMonitor"]


def test_short_class_names_are_the_classes(place: Path, tmp_path: Path, capsys: Any) -> None:
    short = printed(capsys, "-c", place / "run.yaml")
    text = (place / "run.yaml").read_text()
    for name, home in (
        ("OnPolicyDistill", "lightning_onpolicy.modules"),
        ("OnPolicyDataModule", "lightning_onpolicy.datamodules"),
        ("FileSource", "lightning_onpolicy.datamodules"),
    ):
        text = text.replace(f"class_path: {name}", f"class_path: {home}.{name}")
    full = tmp_path / "full.yaml"
    full.write_text(text)
    assert printed(capsys, "-c", full) == short


def test_names_are_resolved_only_where_a_configuration_is_meant() -> None:
    packaged = find_config("quickstart/opd")
    args = [
        "fit",
        "-c",
        "quickstart/opd",
        "--config=quickstart/opd",
        "--config",
        "quickstart/opd",
        "--x",
        "opd",
    ]
    assert resolve_configs(args) == [
        "fit", "-c", packaged, f"--config={packaged}", "--config", packaged, "--x", "opd",
    ]  # fmt: skip


@pytest.mark.parametrize(("command", "prefix"), [("validate", "val"), ("test", "test")])
def test_evaluation_prints_its_metrics(command: str, prefix: str, place: Path, capsys: Any) -> None:
    assert onpolicy(command, "-c", place / "run.yaml") == 0
    out = capsys.readouterr().out
    assert all(f"{prefix}/{name}" in out for name in ("reverse_kl", "forward_kl", "entropy", "length"))
    assert not (place / "out").exists(), "an evaluation leaves no file"


def test_evaluation_without_prompts_says_which_key_is_missing(place: Path, capsys: Any) -> None:
    assert onpolicy("validate", "-c", place / "run.yaml", "--data.init_args.val=null") == 1
    assert "data.val is missing" in capsys.readouterr().err


def test_predict_writes_one_row_per_completion_and_overwrites_only_when_told(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "deep" / "answers.jsonl"
    run = ("predict", "-c", place / "run.yaml", f"--completions.path={file}")
    impossible = "--data.init_args.sampling.max_new_tokens=1000"
    assert onpolicy(*run, impossible) == 1
    assert not file.exists(), "a failed run must not block the next one"
    assert onpolicy(*run) == 0
    assert str(file) in capsys.readouterr().out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 2 * ROWS
    assert [r["uid"] for r in rows] == [f"rows/{i}" for i in range(ROWS) for _ in range(2)]
    for row in rows:
        assert set(row) == PREDICTED
        assert 0 < len(row["response_ids"]) <= 5
        assert row["finished"] == (row["response_ids"][-1] == 22)
        assert row["reward"] is None
    before = file.read_bytes()
    assert onpolicy(*run) == 1
    assert str(file) in capsys.readouterr().err
    assert onpolicy(*run, "--completions.overwrite=true", impossible) == 1
    assert file.read_bytes() == before, "completions are replaced when the new ones are all there"
    assert onpolicy(*run, "--completions.overwrite=true", "--data.init_args.seed=1") == 0
    assert file.read_bytes() != before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_the_command_line_wins_over_what_a_checkpoint_stores(
    place: Path, checkpoint: Path, tmp_path: Path
) -> None:
    stored = torch.load(checkpoint, weights_only=True)
    name = "policy.model.model.norm.weight"
    base = ("-c", place / "run.yaml", f"--ckpt_path={checkpoint}", f"--trainer.default_root_dir={tmp_path}")
    for command in ("validate", "fit"):
        more = ("--model.init_args.objective=reverse_kl", "--trainer.max_epochs=2")
        assert onpolicy(command, *base, *more) == 0
        module = Remember.module()
        assert module.objective == module.hparams["objective"] == "reverse_kl"
        assert torch.equal(module.state_dict()[name], stored["state_dict"][name]) == (command == "validate")
    assert Remember.trainer is not None
    assert Remember.trainer.global_step == 4, "training continued where the checkpoint stopped"


def test_a_checkpoint_loads_from_python(checkpoint: Path, recwarn: pytest.WarningsRecorder) -> None:
    module = OnPolicyDistill.load_from_checkpoint(checkpoint)
    assert not any("teacher" in str(w.message) for w in recwarn), (
        "the teacher is not missing: it is never saved"
    )
    assert module.objective == "jsd"
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    loaded = module.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[k], stored[k]) for k in stored)
    fresh = OnPolicyDistill(module.hparams["student"], module.hparams["teacher"])
    fresh.configure_model()
    assert any(not torch.equal(fresh.state_dict()[k], stored[k]) for k in stored), (
        "training moved the weights"
    )
    assert OnPolicyDistill.load_from_checkpoint(checkpoint, objective="forward_kl").objective == "forward_kl"


@pytest.mark.parametrize("form", ["flag", "file"])
def test_the_last_checkpoint_is_continued_and_its_absence_said(
    form: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    """A job script may name ``last`` from its first start on; an evaluation of nothing is an error."""
    overlay = tmp_path / "last.yaml"
    overlay.write_text("ckpt_path: last")
    saving = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path), "save_last": True}}
    base = (
        *("-c", place / "run.yaml", f"--trainer.default_root_dir={tmp_path}"),
        *(["--ckpt_path=last"] if form == "flag" else ["-c", overlay]),
        f"--trainer.callbacks+={json.dumps(saving)}",
    )
    for command in ("validate", "test", "predict"):
        assert onpolicy(command, *base) == 1
        error = capsys.readouterr().err
        assert "onpolicy: error: --ckpt_path last: there is no checkpoint to evaluate" in error, error
        assert "save_last" in error
    for epochs, steps in ((1, 2), (2, 4)):
        assert onpolicy("fit", *base, f"--trainer.max_epochs={epochs}") == 0
        error = capsys.readouterr().err
        assert error.count("starts from scratch") == (epochs == 1), error
        assert Remember.trainer is not None and Remember.trainer.global_step == steps
    assert onpolicy("validate", *base) == 0
    assert "no checkpoint" not in capsys.readouterr().err


def test_a_checkpoint_that_a_file_names_and_is_not_there_is_an_error(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    overlay = tmp_path / "missing.yaml"
    overlay.write_text("ckpt_path: nowhere/nope.ckpt")
    assert onpolicy("fit", "-c", place / "run.yaml", "-c", overlay) == 1
    assert "nope.ckpt" in capsys.readouterr().err
    assert not (place / "out").exists()
