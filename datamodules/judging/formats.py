"""Six benchmarks for judges, read from local files in the format in which their authors publish them.

No data comes with the library. What each counts as right:

- ``rewardbench`` (allenai/reward-bench): pairs; 23 subsets in 4 sections. A section weighs its subsets by
  :data:`REWARDBENCH_WEIGHTS`, their sizes, except that math-prm counts 984 of its 447, as much as all code together.
- ``rewardbench2`` (allenai/reward-bench-2): one right of four; the subset Ties has several right ones, in items
  ``tied:<id>``, each with its item ``ref:<id>`` with one. Subsets count equally.
- ``ppe_preference`` (lmarena-ai/PPE-Human-Preference-V1): pairs; those that people called a tie are left out.
- ``ppe_correctness`` (lmarena-ai/PPE-…-Best-of-K): of each prompt's 32 verified answers, the pairs in
  ``sampled_conflict_pairs``, one right and one wrong. Files count equally.
- ``rmb`` (Zhou-Zoey/RMB): pairs, and best-of-N whose best must beat every loser. Four cells (pairs or best-of-N,
  helpfulness or harmlessness) count equally; within one, items do.
- ``judgebench`` (ScalerLab/JudgeBench): pairs, judged in both orders, and so at least twice.
- ``realmistake`` (ryokamoi/realmistake): single responses with or without an error; area under the ROC curve.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from lightning_onpolicy.datamodules.judging.cases import EvalCase, Fields, placed
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.sources import read_rows

REWARDBENCH_WEIGHTS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
             "mt-bench-easy": 28, "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164},
}  # fmt: skip
JUDGEBENCH_GROUPS = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
TIES = "Ties"
log = logging.getLogger(__name__)


def load_cases(benchmark: str, path: str | Path) -> list[EvalCase]:
    """All items of a benchmark.

    Args:
        benchmark: A key of :data:`FORMATS`.
        path: A ``.jsonl``, ``.json`` or ``.parquet`` file, or a folder, of which all such files are read.

    Returns:
        The cases, files and rows in order. Names that repeat within a file's benchmark get ``#2``, ``#3``, ….

    Raises:
        FileNotFoundError: If there is no such file or no file in the folder.
        ValueError: If the benchmark is unknown, or a row is malformed; the message names file, line and key.
    """
    if benchmark not in FORMATS:
        raise ValueError(f"benchmark must be one of {sorted(FORMATS)}, got {benchmark!r}.")
    root = Path(path)
    cases: list[EvalCase] = []
    for file in _files(root):
        name = file.relative_to(root).with_suffix("").as_posix() if root.is_dir() else file.stem
        for where, row in read_rows(file):
            cases.extend(FORMATS[benchmark](Fields(where, row), name))
    if not cases:
        raise ValueError(f"{path} holds no item of {benchmark}.")
    return _named(cases)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".ndjson", ".json", ".parquet"))
    if not found:
        raise FileNotFoundError(f"no .jsonl, .json or .parquet file in {path}.")
    return found


def _named(cases: Iterable[EvalCase]) -> list[EvalCase]:
    seen: Counter[str] = Counter()
    out = []
    for case in cases:
        uid = case.item.uid
        seen[uid] += 1
        if seen[uid] > 1:
            case = dataclasses.replace(case, item=dataclasses.replace(case.item, uid=f"{uid}#{seen[uid]}"))
        out.append(case)
    return out


def _pick(
    fields: Fields,
    benchmark: str,
    section: str,
    subset: str,
    uid: str,
    key: str,
    right: str,
    wrong: list[str],
) -> EvalCase:
    """One right response among the wrong ones; the conversation is under ``key``."""
    responses, correct = placed([right], wrong, f"{benchmark}/{uid}")
    labels = tuple(float(i in correct) for i in range(len(responses)))
    item = JudgeItem(fields.messages(key), responses, labels, uid=uid, source=subset)
    return EvalCase(item, benchmark, subset, section, "pick", correct)


def _rewardbench(row: Fields, file: str) -> list[EvalCase]:
    sections = {subset: section for section, subsets in REWARDBENCH_WEIGHTS.items() for subset in subsets}
    subset = row.among("subset", list(sections))
    uid, wrong = f"{subset}/{row.name('id')}", [row.text("rejected")]
    return [_pick(row, "rewardbench", sections[subset], subset, uid, "prompt", row.text("chosen"), wrong)]


def _rewardbench2(row: Fields, file: str) -> list[EvalCase]:
    subset, name = row.text("subset"), row.name("id")
    right, wrong = row.texts("chosen"), row.texts("rejected")
    if "num_correct" in row and row.get("num_correct", int, "a whole number") != len(right):
        raise row.wrong("num_correct", f"is {row.row['num_correct']}, but 'chosen' has {len(right)}")
    if subset != TIES:
        if len(right) != 1:
            raise row.wrong("chosen", f"must have one response outside the subset {TIES}, got {len(right)}")
        uid = f"{subset}/{name}"
        return [_pick(row, "rewardbench2", subset, subset, uid, "prompt", right[0], wrong)]
    kind, _, number = name.partition(":")
    if kind not in ("ref", "tied") or not number:
        raise row.wrong("id", f"must be ref:<id> or tied:<id> in the subset {TIES}, got {name!r}")
    if (len(right) == 1) != (kind == "ref"):
        raise row.wrong(
            "chosen", f"has {len(right)} responses, but ref: items have one and tied: items several"
        )
    responses, correct = placed(right, wrong, f"rewardbench2/{name}")
    item = JudgeItem(row.messages("prompt"), responses, None, uid=name, source=subset)
    return [EvalCase(item, "rewardbench2", subset, subset, "ties", correct)]


def _ppe_preference(row: Fields, file: str) -> list[EvalCase]:
    winner = row.among("winner", ["model_a", "model_b", "tie", "tie (bothbad)"])
    uid = row.name("question_id")
    if winner.startswith("tie"):
        log.info("%s: left out, people called it a tie.", row.where)
        return []
    labels = (1.0, 0.0) if winner == "model_a" else (0.0, 1.0)
    responses = (row.text("response_1"), row.text("response_2"))
    subset = row.text("language") if "language" in row else file
    item = JudgeItem(row.messages("prompt"), responses, labels, uid=uid, source=subset)
    return [EvalCase(item, "ppe_preference", subset, "Preference", "pick", (item.best,))]


def _ppe_correctness(row: Fields, file: str) -> list[EvalCase]:
    uid, scores = row.name("question_id"), row.get("scores", list, "a list")
    cases = []
    for j, pair in enumerate(row.get("sampled_conflict_pairs", list, "a list of pairs")):
        known = isinstance(pair, list) and len(pair) == 2
        if not known or not all(isinstance(i, int) and 0 <= i < len(scores) for i in pair):
            raise row.wrong(
                "sampled_conflict_pairs", f"[{j}] must be two of the {len(scores)} responses, got {pair}"
            )
        a, b = pair
        if bool(scores[a]) == bool(scores[b]):
            raise row.wrong("sampled_conflict_pairs", f"[{j}] is {pair}, and both have the score {scores[a]}")
        labels = (float(scores[a]), float(scores[b]))
        responses = (row.text(f"response_{a + 1}"), row.text(f"response_{b + 1}"))
        item = JudgeItem(row.messages("prompt"), responses, labels, uid=f"{file}/{uid}/{j}", source=file)
        cases.append(EvalCase(item, "ppe_correctness", file, file, "pick", (item.best,)))
    return cases


def _rmb(row: Fields, file: str) -> list[EvalCase]:
    path = row.text("category_path")
    cell = "/".join(path.split("/")[:2])
    if "bon_best" in row:
        losers = row.get("loser_list", list, "a list of answers")
        if not losers:
            raise row.wrong("loser_list", "is empty")
        wrong = [Fields(f"{row.where}, loser_list[{i}]", x).text("answer") for i, x in enumerate(losers)]
        uid, best = f"{path}/{row.name('bon_uid')}", row.inside("bon_best")
    else:
        wrong = [row.inside("reject").text("answer")]
        uid, best = f"{path}/{row.name('pair_uid')}", row.inside("chosen")
    return [_pick(row, "rmb", cell, path, uid, "conversation_input", best.text("answer"), wrong)]


def _judgebench(row: Fields, file: str) -> list[EvalCase]:
    labels = (1.0, 0.0) if row.among("label", ["A>B", "B>A"]) == "A>B" else (0.0, 1.0)
    source = row.text("source")
    subset = next((group for group in JUDGEBENCH_GROUPS if source.startswith(group)), source)
    responses = (row.text("response_A"), row.text("response_B"))
    item = JudgeItem(row.messages("question"), responses, labels, uid=row.name("pair_id"), source=subset)
    return [EvalCase(item, "judgebench", subset, "JudgeBench", "pick", (item.best,))]


def _realmistake(row: Fields, file: str) -> list[EvalCase]:
    """The key of the label is ``error_label`` in the dataset and ``label`` in the description of its files."""
    label = row.among("error_label" if "error_label" in row else "label", ["error", "no_error"])
    right = int(label == "no_error")
    uid = f"{file}/{row.inside('metadata').name('id')}"
    item = JudgeItem(
        row.messages("input"), (row.text("llm_response"),), (float(right),), uid=uid, source=file
    )
    return [EvalCase(item, "realmistake", file, file, "single", (0,) if right else ())]


FORMATS: dict[str, Callable[[Fields, str], list[EvalCase]]] = {
    "rewardbench": _rewardbench,
    "rewardbench2": _rewardbench2,
    "ppe_preference": _ppe_preference,
    "ppe_correctness": _ppe_correctness,
    "rmb": _rmb,
    "judgebench": _judgebench,
    "realmistake": _realmistake,
}
