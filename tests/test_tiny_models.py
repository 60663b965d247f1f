"""The quickstart's models: what ships loads, fits together and is as good as claimed; the script remakes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
QUICKSTART = ROOT / "configs" / "quickstart"
SHIPPED = QUICKSTART / "models"
NAMES = ("teacher", "student", "reader")


@pytest.fixture
def tiny_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("reasoning_gym")
    monkeypatch.syspath_prepend(str(TOOLS))
    import tiny_data

    return tiny_data


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return json.loads((SHIPPED / "metrics.json").read_text(encoding="utf-8"))


def check_folder(folder: Path) -> None:
    """A plain Transformers folder: it loads, answers a chat, and stops at its own end-of-turn token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    chat = [{"role": "user", "content": "rev culla"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert width < out.shape[1] <= width + 8


@pytest.mark.parametrize("name", NAMES)
def test_shipped_folder_loads(name: str) -> None:
    check_folder(SHIPPED / name)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_are_small_and_bf16(name: str) -> None:
    assert sum(path.stat().st_size for path in (SHIPPED / name).iterdir()) < 4_000_000
    dtypes = {
        p.dtype for p in AutoModelForCausalLM.from_pretrained(SHIPPED / name, dtype="auto").parameters()
    }
    assert dtypes == {torch.bfloat16}


def test_the_teacher_reverses_a_word() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "teacher")
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "teacher", dtype=torch.float32)
    chat = [{"role": "user", "content": "rev culla"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "alluc" + tokenizer.eos_token


def test_teacher_and_student_have_the_same_tokenizer() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        teacher, student = ((SHIPPED / name / file).read_bytes() for name in NAMES[:2])
        assert teacher == student, file


def test_chat_template_adds_the_generation_prompt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "student")
    chat = [{"role": "user", "content": "4-1-7="}]
    plain = tokenizer.apply_chat_template(chat, tokenize=False)
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert plain == "<|bos|><|user|>4-1-7=<|end|>"
    assert asked == plain + "<|assistant|>"
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    turns = [tokenizer.bos_token, "<|user|>", tokenizer.eos_token, "<|assistant|>"]
    assert [t for t in tokenizer.convert_ids_to_tokens(ids) if t in turns] == turns


def test_encoding_round_trips(tiny_data: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "student")
    items = tiny_data.heldout_items(tiny_data.load_tasks(QUICKSTART / "tasks.yaml"), seed=3, total=120)
    assert len({item.task for item in items}) == 6
    tiny_data.check_round_trip(tokenizer, [text for item in items for text in (item.prompt, item.answer)])
    tiny_data.check_round_trip(tokenizer, ["Grüße, 世界 🙂", " two  spaces\n\ttab"])


def test_heldout_rule(tiny_data: ModuleType) -> None:
    task = tiny_data.load_tasks(QUICKSTART / "tasks.yaml")[1]
    split_of = tiny_data.split_of
    assert split_of("rev culla") == split_of("rev culla")
    for split in ("train", "heldout"):
        assert {split_of(item.prompt) for item in task.items(split, 0, 200)} == {split}
    share = sum(split_of(str(i)) == "heldout" for i in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_shipped_metrics(metrics: dict[str, Any]) -> None:
    teacher, student, reader = (metrics["models"][name] for name in NAMES)
    assert 0.35 <= reader["avg@4"] <= 0.50
    assert teacher["avg@4"] >= 0.90
    assert 0.20 <= student["avg@4"] <= 0.35
    assert student["greedy"] >= 0.90  # what it does not show in samples, it can do
    for task, measured in student["per_task"].items():
        assert measured["greedy"] >= teacher["per_task"][task]["greedy"] - 0.10, task
    for name in NAMES:
        assert metrics["models"][name]["items"] == metrics["heldout_items"] == 1200
        card = (SHIPPED / name / "README.md").read_text(encoding="utf-8")
        assert f"{metrics['models'][name]['avg@4']:.1%}" in card
    assert set(metrics) >= {"seed", "versions", "python"}


def test_the_reader_has_a_tokenizer_of_its_own() -> None:
    reader, teacher = (AutoTokenizer.from_pretrained(SHIPPED / name) for name in ("reader", "teacher"))
    text = "asc 61 33 78"
    own = reader(text, add_special_tokens=False)["input_ids"]
    assert len(own) < len(teacher(text, add_special_tokens=False)["input_ids"])
    assert reader.decode(own) == text


@pytest.mark.slow
def test_the_script_makes_all(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    done = subprocess.run(
        [sys.executable, TOOLS / "make_tiny_models.py", "--quick", "--threads", "1", "--out", tmp_path],
        env={**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        check_folder(tmp_path / name)
    made = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert set(made["models"]) == set(NAMES)
    again = subprocess.run(
        [*done.args, "--only", "reader"], env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True
    )
    assert again.returncode == 0
    kept = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["models"]
    assert {name: kept[name] for name in NAMES[:2]} == {name: made["models"][name] for name in NAMES[:2]}


def test_quick_models_need_a_folder_of_their_own(
    tiny_data: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    import make_tiny_models  # found where the fixture found tiny_data

    with pytest.raises(SystemExit, match="2"):
        make_tiny_models.main(["--quick"])
    assert "--out" in capsys.readouterr().err
