"""The items of quickstart/domains: made by the script, small enough for the tiny student, none in both splits."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "configs" / "quickstart" / "domains"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_domain_items

    return make_domain_items


def test_the_script_makes_what_ships(script: ModuleType, tmp_path: Path) -> None:
    """Catches: items edited by hand, a script that draws differently."""
    script.main(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in SHIPPED.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (SHIPPED / path.name).read_bytes(), path.name


def test_items_fit_the_tiny_student_and_splits_share_no_question() -> None:
    """Catches: a training question in the evaluation, an answer that sampling would cut."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / "quickstart" / "models" / "student")
    for domain in ("math", "code", "stem", "instructions"):
        val, train = (
            [json.loads(line) for line in (SHIPPED / f"{domain}.{split}.jsonl").read_text().splitlines()]
            for split in ("val", "train")
        )
        assert (len(val), len(train)) == (24, 96)
        prompts = [row["prompt"] for row in (*val, *train)]
        assert len(set(prompts)) == len(prompts)
        for row in (*val, *train):
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
            )
            assert tokenizer.unk_token_id not in (ids := tokenizer.encode(asked, add_special_tokens=False))
            assert len(ids) <= 80
            assert len(tokenizer.encode(row["response"], add_special_tokens=False)) < 48
