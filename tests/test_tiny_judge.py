"""The quickstart's judge: it loads, fits its template and items and is as good as claimed; the script remakes it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_onpolicy.datamodules.judging.parser import parse_scores
from lightning_onpolicy.datamodules.judging.predicate import is_right

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
QUICKSTART = ROOT / "configs" / "quickstart"
SHIPPED = QUICKSTART / "models" / "judge"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("reasoning_gym")
    monkeypatch.syspath_prepend(str(TOOLS))
    import make_tiny_judge

    return make_tiny_judge


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return json.loads((SHIPPED / "metrics.json").read_text(encoding="utf-8"))


def test_rule_written_judgements_say_what_they_mark(script: ModuleType) -> None:
    """Catches: scores that do not follow from the marks, a text that the parser reads otherwise, a hint ignored."""
    draw = random.Random(0)
    for _ in range(200):
        item = script.draw_item(draw, "train")
        for chance, hinted in ((0.0, False), (0.2, False), (0.2, True)):
            marks = script.noisy_marks(item, chance, draw, hinted)
            text = script.judgement(item, marks)
            parsed = parse_scores(text, len(item.responses))
            assert parsed.outcome == "ok" and text.count(" bad") == sum(map(sum, marks))
            if chance == 0.0 or hinted:
                assert is_right(parsed.scores, item.labels)


def test_one_mark_in_five_is_turned(script: ModuleType) -> None:
    draw = random.Random(0)
    turned = total = 0
    for _ in range(500):
        item = script.draw_item(draw, "train")
        right = [x for row in script.noisy_marks(item, 0.0, draw) for x in row]
        noisy = [x for row in script.noisy_marks(item, script.WRONG, draw) for x in row]
        turned, total = turned + sum(a != b for a, b in zip(right, noisy, strict=True)), total + len(right)
    assert abs(turned / total - 0.2) < 0.03


def test_a_judgement_by_hand(script: ModuleType) -> None:
    words = script.Item("words", "3 letters, ends k", ("jk", "gjk", "hh"))
    assert script.judgement(words, [[True, False], [False, False], [True, True]]) == (
        "Criteria: 3 letters, ends k\n"
        "Analysis: #1 (jk) 3 letters: 2 bad, ends k: k ok; #2 (gjk) 3 letters: 3 ok, ends k: k ok; "
        "#3 (hh) 3 letters: 2 bad, ends k: h bad\n"
        "Scores: \\boxed{7, 10, 4}"
    )
    sums = script.Item("sums", "4-1-7=", ("-4", "3"))
    assert script.judgement(sums, [[False], [True]]) == (
        "Criteria: right value\n"
        "Analysis: 4-1=3, 3-7=-4; #1 (-4) right value -4: -4 ok; #2 (3) right value -4: 3 bad\n"
        "Scores: \\boxed{10, 2}"
    )


def test_every_item_fits_and_the_fixed_pieces_are_tokens(script: ModuleType) -> None:
    """Catches: a prompt that leaves no room for a judgement, a judgement that its limit would cut."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    draw = random.Random(1)
    items = [script.draw_item(draw, split) for split in ("train", "heldout") for _ in range(150)]
    prompts = [script.prompt_of(item, hinted=True) for item in items]
    said = [script.judgement(item, script.noisy_marks(item, 0.2, draw)) for item in items]
    script.tiny_data.check_round_trip(tokenizer, [*prompts, *said])
    longest = max(map(len, script.tiny_data.prompt_ids(tokenizer, prompts)))
    assert longest + script.MAX_JUDGEMENT_TOKENS <= tokenizer.model_max_length == script.POSITIONS
    assert max(len(tokenizer.encode(text)) for text in said) < script.MAX_JUDGEMENT_TOKENS
    assert [tokenizer.decode(tokenizer.encode("\\boxed{10, 7}")[:1])] == ["\\boxed{"]


def test_the_shipped_folder(metrics: dict[str, Any]) -> None:
    """Small, bf16, and fit together; its most likely judgements can be read, and most are right."""
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 2_000_000
    assert (SHIPPED / "model.safetensors").stat().st_size < 2_000_000
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == metrics["parameters"] <= 900_000
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 256
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id


def test_the_shipped_judge_judges(script: ModuleType) -> None:
    """Catches: weights, tokenizer or template of another training."""
    import tiny_judge_evaluation  # found where the fixture found its script

    from lightning_onpolicy.datamodules.engines import TransformersEngine
    from lightning_onpolicy.modules import ModelSpec

    items = tiny_judge_evaluation.load_items(QUICKSTART / "judge_items_heldout.jsonl")[:32]
    engine = TransformersEngine(ModelSpec(str(SHIPPED), dtype="float32").load())
    judged = tiny_judge_evaluation.judge(
        engine, script.TEMPLATE, items, 0.0, script.MAX_JUDGEMENT_TOKENS, k=1
    )
    assert all(found[0].outcome == "ok" for found in judged)
    right = [is_right(found[0].by_response, item.labels) for item, found in zip(items, judged, strict=True)]
    assert sum(right) >= 24
    assert any(found[0].by_slot != tuple(found[0].by_response) for found in judged)  # orders were shuffled


def test_shipped_metrics(metrics: dict[str, Any]) -> None:
    """Mediocre when sampled, capable of more, better by votes: what the quickstart builds on."""
    sampled, cooler, greedy = (metrics[name] for name in ("sampled_1.0", "sampled_0.5", "greedy"))
    assert 0.50 <= sampled["right"] <= 0.60 and sampled["readable"] > 0.9
    assert greedy["right"] >= 0.80
    assert sampled["vote@8"] >= sampled["right"] + 0.2
    assert sampled["right"] < cooler["right"] < cooler["vote@8"]
    for name, part in sampled["parts"].items():
        assert part["right"] + 0.1 < greedy["parts"][name]["right"], name
    for setting in (sampled, cooler, greedy):
        assert sum(setting["outcomes"].values()) == 8 * setting["items"] == 8 * 320
        assert sum(part["items"] for part in setting["parts"].values()) == 320
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert f"{sampled['right']:.1%}" in card and f"{greedy['right']:.1%}" in card


@pytest.mark.slow
def test_the_script_makes_all(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    command = [sys.executable, str(TOOLS / "make_tiny_judge.py"), "--quick", "--out", str(tmp_path / "judge")]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "judge" / "metrics.json").read_text(encoding="utf-8"))
    assert first["sampled_1.0"]["items"] == 24 and (tmp_path / "judge" / "README.md").exists()
    again = subprocess.run([*command, "--measure"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    second = json.loads((tmp_path / "judge" / "metrics.json").read_text(encoding="utf-8"))
    assert second["made"] == first["made"] and second["greedy"]["outcomes"] == first["greedy"]["outcomes"]


def test_a_quick_judge_needs_a_folder_of_its_own(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--quick"])
    assert "--out" in capsys.readouterr().err
