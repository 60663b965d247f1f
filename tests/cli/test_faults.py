"""What can go wrong in a run: one message that names it, exit code 1, and nothing that was there before changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import yaml
from workspace import Batches, onpolicy, workspace

STOPPING_S = 30  # a generous "within seconds", for a loaded machine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run.yaml``, what it names, and the outputs of a good run in ``out``."""
    folder = workspace(tmp_path_factory.mktemp("faults")).parent
    assert onpolicy("fit", "-c", folder / "run.yaml") == 0
    assert onpolicy("predict", "-c", folder / "run.yaml") == 0
    checkpoint = next((folder / "out").glob("checkpoints/*.ckpt"))
    checkpoint.rename(folder / "out" / "good.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "out" / "good.ckpt").read_bytes()[:5000])
    (folder / "text.ckpt").write_text("not a checkpoint\n")
    torch.save({"weights": torch.ones(1)}, folder / "foreign.ckpt")
    (folder / "bad.jsonl").write_text('{"prompt": "t1"}\n{"prompt": t2}\n')
    (folder / "list.jsonl").write_text('{"prompt": "t1"}\n[1, 2]\n')
    (folder / "keys.jsonl").write_text('{"prompt": "t1"}\n{"question": "t2"}\n')
    (folder / "blank.jsonl").write_text('{"prompt": "t1"}\n{"prompt": "  "}\n')
    (folder / "none.jsonl").write_text("")
    (folder / "long.jsonl").write_text(
        json.dumps({"prompt": "t1"}) + "\n" + json.dumps({"prompt": "t2 " * 30})
    )
    toys.save_model(folder / "wide", 2, hidden=64)
    for name in ("plain_student", "plain_teacher"):
        toys.llama(0).save_pretrained(folder / name)
        toys.tokenizer(template=None).save_pretrained(folder / name)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


TRAIN = "--data.init_args.train.init_args.path={}/"
STUDENT = "--model.init_args.student.path="
FAULTS: dict[str, tuple[list[str], list[str]]] = {
    "missing file": ([TRAIN + "nope.jsonl"], ["nope.jsonl", "does not exist"]),
    "unknown ending": ([TRAIN + "run.yaml"], ["run.yaml", ".jsonl"]),
    "malformed row": ([TRAIN + "bad.jsonl"], ["bad.jsonl line 2", "not JSON"]),
    "row that is no object": ([TRAIN + "list.jsonl"], ["list.jsonl line 2", "mapping"]),
    "row without prompt": ([TRAIN + "keys.jsonl"], ["keys.jsonl line 2", "question"]),
    "no rows": ([TRAIN + "none.jsonl"], ["'none'", "no rows"]),
    "empty prompt": ([TRAIN + "blank.jsonl"], ["blank/1", "empty"]),
    "over-long prompt": (
        [TRAIN + "long.jsonl", "--data.init_args.max_prompt_tokens=10"],
        ["long/1", "max_prompt_tokens is 10"],
    ),
    "every prompt over-long": (
        ["--data.init_args.max_prompt_tokens=1", "--data.init_args.overlong=skip"],
        ["data.val", "max_prompt_tokens 1"],
    ),
    "every prompt for training over-long": (
        [
            "--data.init_args.max_prompt_tokens=1",
            "--data.init_args.overlong=skip",
            "--data.init_args.val=null",
        ],
        ["'rows'", "max_prompt_tokens=1"],
    ),
    "no template": (
        [STUDENT + "{}/plain_student", "--model.init_args.teacher.path={}/plain_teacher"],
        ["plain_student", "chat template", "chat: false"],
    ),
    "no model folder": ([STUDENT + "{}/nope"], ["nope", "does not exist"]),
    "folder without model": ([STUDENT + "{}/out"], ["/out", "config.json"]),
    "no such model on the hub": ([STUDENT + "nobody/nothing"], ["nobody/nothing"]),
    "teacher not on the hub": (["--model.init_args.teacher.path=nobody/nothing"], ["nobody/nothing"]),
    "no such packaged file": ([STUDENT + "onpolicy://quickstart/models/nope"], ["models/nope", "student"]),
    "no checkpoint": (["--ckpt_path={}/nope.ckpt"], ["nope.ckpt", "does not exist"]),
    "checkpoint cut short": (["--ckpt_path={}/cut.ckpt"], ["cut.ckpt", "readable"]),
    "text as checkpoint": (["--ckpt_path={}/text.ckpt"], ["text.ckpt", "readable"]),
    "foreign checkpoint": (["--ckpt_path={}/foreign.ckpt"], ["foreign.ckpt", "state_dict"]),
    "folder as checkpoint": (["--ckpt_path={}/out"], ["/out", "folder"]),
    "another model's checkpoint": (
        [STUDENT + "{}/wide", "--ckpt_path={}/out/good.ckpt"],
        ["does not fit", "another student", "policy.model"],
    ),
    "another method's checkpoint": (
        ["--model.init_args.student.lora.r=2", "--ckpt_path={}/out/good.ckpt"],
        ["does not fit", "other adapters", "lora"],
    ),
    "beyond the model's positions": (
        ["--data.init_args.sampling.max_new_tokens=100"],
        ["max_new_tokens=100", "64 positions"],
    ),
    "stuck sampling": (
        ["--data.init_args.engine=workspace.SleepingEngine", "--data.init_args.deadline_s=0.5"],
        ["phase 'rollout' on rank 0", "deadline of 0.5 s"],
    ),
    "no place to write": (["--trainer.default_root_dir={}/text.ckpt/x"], ["text.ckpt"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_message_and_changes_nothing(
    fault: str, place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No attempt to look beyond this machine.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags, named = FAULTS[fault]
    before = contents(place)
    assert onpolicy("fit", "-c", place / "run.yaml", *[f.replace("{}", str(place)) for f in flags]) == 1
    error = capsys.readouterr().err
    assert error.count("onpolicy: error:") == 1
    assert "Traceback" not in error
    said = error.partition("onpolicy: error:")[2]
    assert all(word in said for word in named), said
    assert len(said.splitlines()) <= 5, said
    assert "Namespace(" not in said
    assert contents(place) == before


def test_over_long_prompts_can_be_skipped(place: Path, tmp_path: Path) -> None:
    flags = [
        TRAIN.format(place) + "long.jsonl",
        "--data.init_args.max_prompt_tokens=10",
        "--data.init_args.overlong=skip",
        "--trainer.callbacks=workspace.Batches",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert onpolicy("fit", "-c", place / "run.yaml", *flags) == 0
    uids = {p.uid for batch in Batches.seen for p in batch.prompts}
    assert uids == {"long/0"}


def test_a_run_goes_on_when_a_verifier_hangs(place: Path, tmp_path: Path) -> None:
    """The item that never ends cannot be scored (NaN, not 0); all others are, in every batch."""
    reward = {"class_path": "workspace.HangingReward", "init_args": {"seconds": [0.0, 1e6]}}
    flags = [
        f"--data.init_args.rewards.slow={json.dumps(reward)}",
        "--trainer.callbacks=workspace.Batches",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert onpolicy("fit", "-c", place / "run.yaml", *flags) == 0
    assert len(Batches.seen) == 2
    for batch in Batches.seen:
        assert batch.rewards.isnan().nonzero().flatten().tolist() == [1]
        assert bool((batch.rewards[[0, 2, 3, 4, 5]] == 1).all())


@pytest.fixture
def hears_sigint() -> Iterator[None]:
    """SIGINT raises ``KeyboardInterrupt`` here, also where the tests run in a script's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid`` (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        text = stat.read_text() if stat.exists() else ""
        if text and int(text.rpartition(")")[2].split()[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.usefixtures("hears_sigint")  # a signal that is ignored here would be in the run, too
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_a_checkpoint_and_no_process(
    number: signal.Signals, code: int, place: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    reward = {"class_path": "workspace.HangingReward", "init_args": {"seconds": [0.0]}}
    saving = {"dirpath": str(tmp_path / "saved"), "every_n_train_steps": 1, "save_last": True}
    settings = {
        "trainer": {
            "default_root_dir": str(tmp_path),
            "max_epochs": 1_000_000,
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": saving}],
        },
        "data": {"init_args": {"rewards": {"slow": reward}}},
    }
    overlay.write_text(yaml.safe_dump(settings))
    run = ["-m", "lightning_onpolicy.cli", "fit", "-c", str(place / "run.yaml"), "-c", str(overlay)]
    helpers = str(Path(__file__).parents[1] / "helpers")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": helpers}
    last = tmp_path / "saved" / "last.ckpt"
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, *run], env=env, stdout=said, stderr=said)
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(number)
    try:
        process.wait(STOPPING_S)
    finally:
        process.kill()
    words = (tmp_path / "said").read_text()
    assert process.returncode == code, words
    assert "Traceback" not in words
    assert workers, "the reward's worker was running"
    deadline = time.monotonic() + 5
    while any(runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(runs(pid) for pid in workers)
    step = torch.load(last, weights_only=True)["global_step"]
    assert step > 0
    after = ["--trainer.default_root_dir", tmp_path / "after", f"--trainer.max_steps={step + 1}"]
    assert (
        onpolicy("fit", "-c", place / "run.yaml", "--ckpt_path", last, *after, "--trainer.max_epochs=-1") == 0
    )
