"""Files in six formats: what is right, where it stands, and what a malformed row is told.

Catches: the right response always first, a label read the wrong way round, an error that does not say where.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from judged import GOOD, rows_of, write_benchmark

from lightning_onpolicy.datamodules.judging.cases import placed
from lightning_onpolicy.datamodules.judging.formats import FORMATS, load_cases

SIZES = {
    "rewardbench": 23 * 4,
    "rewardbench2": 5 * 4 + 2 * 4,
    "ppe_preference": 24,
    "ppe_correctness": 5 * 4 * 2,
    "rmb": 4 * 4,
    "judgebench": 4 * 4,
    "realmistake": 2 * 8,
}


@pytest.mark.parametrize("benchmark", sorted(FORMATS))
def test_the_right_responses_are_those_that_the_file_says(benchmark: str, tmp_path: Path) -> None:
    cases = load_cases(benchmark, write_benchmark(tmp_path, benchmark))
    assert len(cases) == SIZES[benchmark] == len({case.item.uid for case in cases})
    for case in cases:
        right = tuple(i for i, text in enumerate(case.item.responses) if text.startswith(GOOD))
        assert case.correct == right and case.benchmark == benchmark
        assert case.item.messages[-1]["role"] == "user" and case.item.messages[-1]["content"].endswith("?")
        if case.kind == "pick":
            assert case.correct == (case.item.best,)
        elif case.kind == "single":
            assert case.item.labels == (float(len(right)),)
        else:
            assert case.item.labels is None and len(right) == (1 if case.item.uid.startswith("ref:") else 3)


@pytest.mark.parametrize("benchmark", sorted(FORMATS.keys() - {"realmistake"}))
def test_the_right_response_has_no_slot_of_its_own(benchmark: str, tmp_path: Path) -> None:
    """Not even for a judge that is shown the items in their own order."""
    cases = load_cases(benchmark, write_benchmark(tmp_path, benchmark, 24))
    for n in {len(case.item.responses) for case in cases if case.kind == "pick"}:
        firsts = Counter(case.correct[0] for case in cases if len(case.item.responses) == n)
        total = sum(firsts.values())
        assert set(firsts) == set(range(n))
        assert all(abs(count / total - 1 / n) < 4 * (1 / n / total) ** 0.5 for count in firsts.values())


def test_placing_is_a_permutation_and_repeats() -> None:
    responses, correct = placed(["r", "s"], ["w", "x", "y"], "a")
    assert sorted(responses) == ["r", "s", "w", "x", "y"] and {responses[i] for i in correct} == {"r", "s"}
    assert placed(["r", "s"], ["w", "x", "y"], "a") == (responses, correct)
    assert len({placed(["r"], ["w"], str(i))[1] for i in range(20)}) == 2


def test_subsets_and_sections(tmp_path: Path) -> None:
    def names(benchmark: str) -> tuple[set[str], set[str]]:
        cases = load_cases(benchmark, write_benchmark(tmp_path / benchmark, benchmark, 1))
        return {case.subset for case in cases}, {case.section for case in cases}

    assert len(names("rewardbench")[0]) == 23
    assert names("rewardbench")[1] == {"Chat", "Chat Hard", "Safety", "Reasoning"}
    assert names("ppe_preference") == ({"English", "French"}, {"Preference"})
    assert names("ppe_correctness")[1] == {"mmlu_pro", "math", "gpqa", "ifeval", "mbpp_plus"}
    goals = ("Harmlessness", "Helpfulness")
    assert names("rmb")[1] == {f"{cell}/{goal}" for cell in ("BoN_set", "Pairwise_set") for goal in goals}
    assert names("judgebench")[1] == {"JudgeBench"} and "livecodebench" in names("judgebench")[0]
    assert names("realmistake")[0] == {"math/x", "facts/x"}


def test_parquet_is_read_like_jsonl(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = rows_of("ppe_correctness", 2)["math.jsonl"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "math.parquet")
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_cases("ppe_correctness", tmp_path / "math.parquet") == load_cases(
        "ppe_correctness", tmp_path / "math.jsonl"
    )


def test_one_prompt_one_digest_and_repeated_names_get_numbers(tmp_path: Path) -> None:
    row = rows_of("judgebench", 1)["gpt.jsonl"][0]
    (tmp_path / "x.jsonl").write_text((json.dumps(row) + "\n") * 2 + json.dumps(row | {"question": "other?"}))
    cases = load_cases("judgebench", tmp_path / "x.jsonl")
    assert [case.item.uid for case in cases] == ["mmlu-pro0", "mmlu-pro0#2", "mmlu-pro0#3"]
    assert cases[0].prompt == cases[1].prompt != cases[2].prompt


@pytest.mark.parametrize(
    ("benchmark", "change", "message"),
    [
        ("rewardbench", {"chosen": None}, r"line 2: key 'chosen' must be a text, got NoneType"),
        ("rewardbench", {"chosen": ...}, r"line 2: key 'chosen' is missing; the row has \['chosen_model'"),
        ("rewardbench", {"subset": "shp"}, r"line 2: key 'subset' must be one of .*'shp'"),
        ("rewardbench2", {"chosen": ["a", "b"]}, r"line 2: key 'num_correct' is 1, but 'chosen' has 2"),
        ("rewardbench2", {"chosen": ["a", "b"], "num_correct": 2}, r"line 2: key 'chosen' must have one response"),
        ("rewardbench2", {"rejected": []}, r"line 2: key 'rejected' must be a list of one or more texts"),
        ("rewardbench2", {"subset": "Ties"}, r"line 2: key 'id' must be ref:<id> or tied:<id>"),
        ("rewardbench2", {"subset": "Ties", "id": "tied:3"}, r"line 2: key 'chosen' has 1 responses"),
        ("ppe_preference", {"winner": "a"}, r"line 2: key 'winner' must be one of"),
        ("ppe_preference", {"prompt": 3}, r"line 2: key 'prompt' must be a text or a list of turns"),
        ("ppe_correctness", {"sampled_conflict_pairs": [[0, 4]]}, r"_pairs' \[0\] must be two of the 4"),
        ("ppe_correctness", {"sampled_conflict_pairs": [[0, 2]]}, r"\[0\] is \[0, 2\], and both have the score True"),
        ("ppe_correctness", {"response_4": ...}, r"line 2: key 'response_4' is missing"),
        ("rmb", {"category_path": 1}, r"row 1: key 'category_path' must be a text"),
        ("rmb", {"loser_list": []}, r"row 1: key 'loser_list' is empty"),
        ("rmb", {"loser_list": [{"llm_name": "x"}]}, r"row 1, loser_list\[0\]: key 'answer' is missing"),
        ("rmb", {"conversation_input": [{"content": "a"}]}, r"row 1, conversation_input\[0\]: key 'role' is missing"),
        ("judgebench", {"label": "A=B"}, r"line 2: key 'label' must be one of \['A>B', 'B>A'\], got 'A=B'"),
        ("realmistake", {"error_label": "yes"}, r"line 2: key 'error_label' must be one of"),
        ("realmistake", {"metadata": {}}, r"line 2, metadata: key 'id' is missing"),
    ],
)  # fmt: skip
def test_malformed_rows(benchmark: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    name, rows = next(iter(rows_of(benchmark, 2).items()))
    if benchmark == "rmb":
        name, rows = next((n, r) for n, r in rows_of(benchmark, 2).items() if "BoN" in n)
    rows[1] = {key: value for key, value in (rows[1] | change).items() if value is not ...}
    file = tmp_path / Path(name).name
    text = json.dumps(rows) if file.suffix == ".json" else "\n".join(json.dumps(row) for row in rows)
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_cases(benchmark, file)
    assert str(file) in str(caught.value)


def test_what_is_no_benchmark_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="benchmark must be one of"):
        load_cases("mmlu", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl"):
        load_cases("rmb", tmp_path)
    (tmp_path / "a.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"a.jsonl line 1: expected an object with keys, got list"):
        load_cases("rmb", tmp_path)
    (tmp_path / "a.jsonl").write_text('{"a": \n')
    with pytest.raises(ValueError, match=r"a.jsonl line 1: not JSON"):
        load_cases("rmb", tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no item of rmb"):
        load_cases("rmb", tmp_path)
