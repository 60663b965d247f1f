"""The table of an evaluation: every number of a small one by hand, pass@k by enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import pytest
import torch

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, collate
from lightning_onpolicy.modules.metrics import RolloutMetrics
from lightning_onpolicy.modules.paired import stratified_interval
from lightning_onpolicy.modules.samples import (
    Evaluation,
    Sample,
    differences,
    evaluation_of,
    same_seeds,
    samples_of,
)
from lightning_onpolicy.modules.statistics import bounded_interval, cut, t_interval
from lightning_onpolicy.modules.tables import Line, Settings, changes, plain, tabulate

SCORES: dict[tuple[str, str], list[list[float | None]]] = {
    ("math", "sums"): [[1, 0, 1, 1], [0, 0, 0, None]],
    ("math", "roots"): [[1, 1, 1, 1]],
    ("code", "code"): [[0, 0.5, 0, 0], [0, 0, 1, 0]],
}


def batch(scores: dict[tuple[str, str], list[list[float | None]]] = SCORES) -> RolloutBatch:
    """A group per item; lengths 1, 2, …; odd samples are cut by length."""
    groups, rewards = [], []
    for (domain, task), items in scores.items():
        for number, row in enumerate(items):
            given = {"prompt": f"{task} {number}", "answer": number}
            said = given if domain == task else {**given, "domain": domain}
            prompt = Prompt((1, 2), f"<{task}>", said, f"p{number}", task)
            completions = tuple(
                Completion(
                    torch.ones(j + 1, dtype=torch.long),
                    torch.zeros(j + 1),
                    "length" if j % 2 else "eos",
                    text="é",
                )
                for j in range(len(row))
            )
            groups.append(Group(prompt, completions))
            rewards.append(row)
    return collate(groups, pad_id=0, rewards=rewards)


def lines_of(samples: list[Sample], **settings: object) -> dict[str, Line]:
    return {line.name: line for line in tabulate(samples, Settings(**settings))}  # type: ignore[arg-type]


def share(correct: list[int], k: int) -> float:
    """pass@k by enumeration."""
    subsets = list(itertools.combinations(correct, k))
    return sum(any(s) for s in subsets) / len(subsets)


def test_every_number_of_a_small_table() -> None:
    """Catches: items and samples confused, a macro average over tasks, seeds over items, wrong denominators."""
    lines = lines_of(samples_of(batch()))
    assert [(x.level, x.domain, x.task) for x in tabulate(samples_of(batch()))] == [
        ("domain", "code", ""),
        ("domain", "math", ""),
        ("task", "math", "roots"),
        ("task", "math", "sums"),
        ("macro", "", ""),
        ("micro", "", ""),
    ]
    assert {name: x.items for name, x in lines.items()} == {
        "code": 2, "math": 3, "roots": 1, "sums": 2, "macro": 5, "micro": 5,
    }  # fmt: skip
    assert {x.k for x in lines.values()} == {(4, 4)}
    math_items, code_items = [0.75, 0.0, 1.0], [0.125, 0.25]
    for name, items in (("math", math_items), ("code", code_items), ("micro", math_items + code_items)):
        expected = t_interval(torch.tensor(items))
        got = lines[name].accuracy
        assert got.mean == pytest.approx(expected.mean) and got.n == len(items)
        assert (got.low, got.high) == pytest.approx((max(0, expected.low), min(1, expected.high)))
    both = stratified_interval([torch.tensor(math_items), torch.tensor(code_items)])
    assert lines["macro"].accuracy == cut(both)
    assert both.mean == pytest.approx((sum(math_items) / 3 + sum(code_items) / 2) / 2)
    assert math.isnan(lines["roots"].accuracy.low), "one item says nothing about others"

    math_seeds = [2 / 3, 1 / 3, 2 / 3, 1.0]  # sample 3 of the second sum is unscored
    code_seeds = [0.0, 0.25, 0.5, 0.0]
    for name, seeds in (
        ("math", math_seeds),
        ("code", code_seeds),
        ("macro", [(x + y) / 2 for x, y in zip(math_seeds, code_seeds, strict=True)]),
        ("micro", [2 / 5, 1.5 / 5, 3 / 5, 2 / 4]),
    ):
        spread = torch.tensor(seeds, dtype=torch.float64)
        assert lines[name].seed_std == pytest.approx(float(spread.std())), name
        assert lines[name].by_seed.mean == pytest.approx(float(spread.mean())), name
        assert lines[name].by_seed.low == pytest.approx(max(0, t_interval(spread).low)), name
        assert lines[name].by_seed.n == 4

    correct = {
        "sums": [[1, 0, 1, 1], [0, 0, 0]],
        "roots": [[1, 1, 1, 1]],
        "code": [[0, 0, 0, 0], [0, 0, 1, 0]],
    }
    correct["math"] = correct["roots"] + correct["sums"]
    correct["micro"] = correct["math"] + correct["code"]
    for name, items in correct.items():
        assert list(lines[name].pass_at) == [1, 2, 4]
        for k, got in lines[name].pass_at.items():
            passes = [share(row, k) for row in items if len(row) >= k]
            assert got.mean == pytest.approx(sum(passes) / len(passes)), (name, k)
            assert got.n == len(passes)
    assert lines["code"].pass_at[4].mean == 0.5
    for k in (1, 2, 4):
        means = [lines[name].pass_at[k].mean for name in ("math", "code")]
        assert lines["macro"].pass_at[k].mean == pytest.approx(sum(means) / 2)
    assert lines["roots"].pass_at[4] == bounded_interval(torch.ones(1))

    assert {x.truncated for x in lines.values()} == {0.5}
    assert {x.length for x in lines.values()} == {2.5}
    assert [lines[name].unscored for name in ("code", "math", "sums")] == pytest.approx([0, 1 / 12, 1 / 8])
    assert lines["micro"].unscored == pytest.approx(1 / 20)
    assert lines["macro"].unscored == pytest.approx(1 / 24)


def test_the_table_agrees_with_the_logged_metrics() -> None:
    """Catches: two definitions of one number."""
    metrics = RolloutMetrics()
    metrics.update(batch())
    logged = metrics.compute()
    lines = lines_of(samples_of(batch()))
    micro = lines["micro"]
    assert logged["accuracy"] == pytest.approx(micro.accuracy.mean)
    assert logged["accuracy_low"] == pytest.approx(micro.accuracy.low)
    assert logged["accuracy_seed_std"] == pytest.approx(micro.seed_std)
    assert logged["pass@2_high"] == pytest.approx(micro.pass_at[2].high)
    assert logged["accuracy_macro"] == pytest.approx(lines["macro"].accuracy.mean)
    for name in ("math", "code"):
        assert logged[f"accuracy_domain/{name}"] == pytest.approx(lines[name].accuracy.mean)
    assert logged["accuracy/sums"] == pytest.approx(lines["sums"].accuracy.mean)
    assert logged["length"] == micro.length and logged["unscored"] == pytest.approx(micro.unscored)


def test_without_domains_the_sources_are_the_domains_and_nothing_is_logged_twice() -> None:
    """Catches: an empty domain, a macro line over one domain, metrics that other runs never asked for."""
    scores = {("a", "a"): [[1.0, 0.0]], ("b", "b"): [[0.0, None]]}
    assert [x.level for x in tabulate(samples_of(batch(scores)))] == ["domain", "domain", "macro", "micro"]
    alone = {("a", "a"): [[1.0, 0.0]]}
    assert [(x.level, x.name) for x in tabulate(samples_of(batch(alone)))] == [
        ("domain", "a"),
        ("micro", "micro"),
    ]
    metrics = RolloutMetrics()
    metrics.update(batch(scores))
    assert not [name for name in metrics.compute() if "domain" in name or "macro" in name]
    assert tabulate([]) == []


def test_a_domain_without_a_score_has_no_average_and_neither_has_macro() -> None:
    """Catches: macro accuracy over the domains that happened to be scored; a crash."""
    lines = lines_of(samples_of(batch({**SCORES, ("judged", "poems"): [[None] * 4]})))
    for name in ("judged", "poems", "macro"):
        assert math.isnan(lines[name].accuracy.mean) and math.isnan(lines[name].seed_std)
        assert not lines[name].pass_at
    assert lines["judged"].unscored == 1.0 and lines["micro"].accuracy.mean == pytest.approx(2.125 / 5)
    assert json.loads(json.dumps(plain(lines["macro"]), allow_nan=False))["accuracy"]["mean"] is None
    metrics = RolloutMetrics()
    metrics.update(batch({**SCORES, ("judged", "poems"): [[None] * 4]}))
    logged = metrics.compute()
    assert "accuracy_macro" not in logged and "accuracy_domain/math" in logged


def test_intervals_stay_where_scores_can_be() -> None:
    """Catches: a macro average of -3 % to 20 %; scores beyond 1 that are cut all the same."""
    low = {("a", "a"): [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], ("b", "b"): [[0.0, 0.0], [0.0, 0.0]]}
    macro = lines_of(samples_of(batch(low)))["macro"]
    assert macro.accuracy.low == macro.by_seed.low == macro.pass_at[2].low == 0.0
    large = {key: [[-10 * (x or 0) for x in row] for row in rows] for key, rows in low.items()}
    assert lines_of(samples_of(batch(large)))["macro"].accuracy.low < -1


def test_order_does_not_matter_and_settings_do() -> None:
    """Catches: samples numbered by arrival, thresholds and ks without an effect."""
    samples = samples_of(batch())
    shuffled = random.Random(0).sample(samples, len(samples))
    assert plain(tabulate(shuffled)) == plain(tabulate(samples))
    assert evaluation_of(shuffled, None) == evaluation_of(samples, None)
    lines = lines_of(samples, ks=(1, 3), correct_threshold=0.5, confidence=0.8)
    assert list(lines["code"].pass_at) == [1, 3]
    assert lines["code"].pass_at[1].mean == pytest.approx(0.25)
    assert lines["micro"].accuracy.high < lines_of(samples)["micro"].accuracy.high
    for wrong in ({"ks": (0,)}, {"ks": ()}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)  # type: ignore[arg-type]


def test_ragged_items_say_so() -> None:
    """Catches: an item with fewer samples taken for one with unscored ones."""
    [line, _] = tabulate(samples_of(batch({("a", "a"): [[1.0, 0.0, 1.0], [1.0]]})))
    assert line.k == (1, 3) and line.unscored == 0 and line.accuracy.mean == pytest.approx((2 / 3 + 1) / 2)
    assert {k: x.n for k, x in line.pass_at.items()} == {1: 2, 2: 1}


def test_rows_that_pad_a_rank_and_given_responses_are_no_samples() -> None:
    """Catches: repeats counted twice, dataset text scored as the policy's."""
    whole = batch()
    counted = torch.ones(len(whole), dtype=torch.bool)
    counted[4:8] = False
    samples = samples_of(whole.with_extra(counted=counted, seed=torch.full((len(whole),), 2**62)))
    assert len(samples) == len(whole) - 4
    assert samples[0] == Sample("p0", "sums", "math", samples[0].question, 0, 2**62, 1.0, True, 1, "é")
    given = dataclasses.replace(whole, on_policy=torch.zeros(len(whole), dtype=torch.bool))
    assert samples_of(given) == []
    with pytest.raises(ValueError, match="a prompt per row"):
        samples_of(dataclasses.replace(whole, prompts=()))


def test_changes_by_hand() -> None:
    """Catches: domains crossed, before and after swapped."""
    better = {**SCORES, ("math", "sums"): [[1, 1, 1, 1], [0, 1, 0, None]]}
    old, new = (evaluation_of(samples_of(batch(x)), None) for x in (SCORES, better))
    found = {x.name: x.result for x in changes(old, new)}
    assert list(found) == ["code", "math", "macro", "micro"]
    assert found["math"].difference.mean == pytest.approx((0.25 + 1 / 3 + 0) / 3)
    assert (found["math"].better, found["math"].worse, found["math"].equal) == (2, 0, 1)
    assert found["code"].difference.mean == 0 and found["code"].equal == 2
    assert found["macro"].difference.mean == pytest.approx((0.25 + 1 / 3) / 3 / 2)
    assert found["micro"].difference.mean == pytest.approx((0.25 + 1 / 3) / 5)
    assert found["micro"].test.p_value == 0.5  # of four sums of ±1/4 ± 1/3, two are as far
    assert {x.name: x.result.after for x in changes(new, old)}["macro"] == found["macro"].before


def test_what_cannot_be_compared_says_why() -> None:
    """Catches: a silent comparison of other items, other questions, another k or temperature."""
    base = Evaluation(tuple(samples_of(batch())), {"temperature": 1.0, "stop": []})

    def reasons(
        scores: dict[tuple[str, str], list[list[float | None]]] = SCORES, **sampling: object
    ) -> list[str]:
        drawn = {"temperature": 1.0, "stop": (), **sampling}
        return differences(base, Evaluation(tuple(samples_of(batch(scores))), drawn))

    assert reasons() == []
    assert reasons(temperature=0.7) == ["sampling.temperature was 1.0 and is 0.7"]
    fewer = {key: [row[:2] for row in rows] for key, rows in SCORES.items()}
    assert reasons(fewer) == ["k was 4 and is 2 samples for 5 items, such as 'code: p0'"]
    gone = {key: rows for key, rows in SCORES.items() if key != ("math", "roots")}
    assert reasons(gone) == ["1 of 5 items, such as 'roots: p0', is gone"]
    moved = {("maths" if key[0] == "math" else key[0], key[1]): rows for key, rows in SCORES.items()}
    assert reasons(moved) == ["3 of 5 items, such as 'roots: p0', have another domain"]
    other = [dataclasses.replace(s, question=s.question + (s.task == "code")) for s in base.samples]
    assert differences(base, Evaluation(tuple(other), None)) == [
        "2 of 5 items, such as 'code: p0', have another question or reference answer"
    ]
    assert differences(Evaluation(base.samples), base) == [], "unknown sampling is no difference"


def test_same_seeds() -> None:
    """Catches: unknown seeds taken for equal ones."""

    def seeded(seed: int | None) -> Evaluation:
        return Evaluation(tuple(dataclasses.replace(s, seed=seed) for s in samples_of(batch())))

    assert same_seeds(seeded(1), seeded(1)) and not same_seeds(seeded(1), seeded(2))
    assert not same_seeds(seeded(None), seeded(None))
