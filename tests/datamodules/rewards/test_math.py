"""Mathematical answers: equal forms, wrong ones, none, and formulas made to hang the verifier."""

from __future__ import annotations

import importlib.util
import time

import pytest

from lightning_onpolicy.datamodules.given import group_of
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.math import MathReward, answers, depth, equal, rational

needs_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs the extra lightning-onpolicy[verify]"
)


@pytest.fixture(scope="module")
def reward():
    made = MathReward(workers=1, deadline_s=2.0)
    yield made
    made.close()


def boxed(answer: str) -> str:
    return f"Some reasoning about 41.\nSo \\boxed{{{answer}}}."


@needs_verify
@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (
            "5",
            ["5", "5.0", "+5", "05", "x = 5", "10/2", "5 \\text{ cm}", "\\sqrt{25}"],
            ["6", "-5", "x", "5x"],
        ),
        ("1000", ["1,000", "1{,}000", "10^3", "10**3", "1e3", "1 \\cdot 10^{3}"], ["1,001", "10^4"]),
        ("\\frac{1}{2}", ["\\dfrac12", "0.5", "1/2", "50\\%", "\\tfrac{2}{4}", ".5"], ["\\frac{1}{3}", "2"]),
        ("-\\frac{3}{4}", ["\\frac{-3}{4}", "-0.75"], ["\\frac{3}{4}"]),
        ("2\\sqrt{2}", ["\\sqrt{8}", "2^{3/2}", "2 \\cdot \\sqrt 2"], ["\\sqrt{2}", "2.8"]),
        ("x^2+2x+1", ["(x+1)^2", "1 + 2x + x^2"], ["(x-1)^2", "x^2+2x"]),
        ("(1,2]", ["\\left(1, 2\\right]"], ["(1,2)", "[1,2]"]),
        ("1 < x \\le 2", ["(1,2]", "2 \\ge x > 1"], ["(1,2)", "[1,2]"]),
        ("\\{1,2\\}", ["\\{2, 1\\}", "1, 2"], ["\\{1,2,3\\}", "1"]),
        (
            "(3, \\frac{\\pi}{2})",
            ["(3, \\pi/2)", "\\left( 3, \\dfrac{\\pi}{2} \\right)"],
            ["(\\frac{\\pi}{2}, 3)"],
        ),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", ["\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"], ["2"]),
        ("90^\\circ", ["90", "90^{\\circ}"], ["91"]),
        ("\\text{Evelyn}", ["Evelyn", "\\text{evelyn}", "\\mathrm{Evelyn}"], ["\\text{Nylvee}", "Carla"]),
        ("\\text{no}", ["no", "No"], ["on"]),
        ("\\text{B}", ["B", "\\textbf{B}"], ["A"]),
    ],
)
def test_equal_forms_score_and_others_do_not(
    reward: MathReward, gold: str, right: list[str], wrong: list[str]
) -> None:
    texts = [boxed(gold), *map(boxed, right), *map(boxed, wrong)]
    expected = [1.0] * (1 + len(right)) + [0.0] * len(wrong)
    scores = dict(zip(texts, reward.score([group_of({"answer": gold}, *texts)])[0], strict=True))
    assert scores == dict(zip(texts, expected, strict=True))


@needs_verify
@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The answer is 18.", 1.0),
        ("The answer is $18$ apples.", 1.0),
        ("3 + 15 = 18\n#### 18", 1.0),
        ("He has 3 + 15 = 18 apples", 1.0),
        ("**Answer:** \\(\\frac{36}{2}\\)", 1.0),
        ("Answer: 36/2", 1.0),
        ("18", 1.0),
        ("<think>\\boxed{7}</think> It is \\boxed{18}", 1.0),
        ("\\boxed{18} and then \\boxed{19}", 0.0),
        ("The answer is 18x.", 0.0),
        ("The answer is 17. It is not 18", 0.0),
        ("18 is what I would say of 19", 0.0),
        ("I do not know", 0.0),
        ("\\boxed{}", 0.0),
        ("\\boxed{18", 0.0),
        ("", 0.0),
    ],
)
def test_plain_answers(reward: MathReward, text: str, score: float) -> None:
    assert reward.score([group_of({"answer": "18"}, text)]) == [[score]]
    assert isinstance(reward, Reward)


@needs_verify
def test_only_boxed_answers_if_asked() -> None:
    strict = MathReward(workers=1, boxed_only=True, answer_key="solution", after=None)
    row = {"solution": "Because … it is \\boxed{7}"}
    texts = ["\\boxed{7}", "The answer is 7", "7", "\\boxed{7}</think>\\boxed{8}"]
    assert strict.score([group_of(row, *texts)]) == [[1.0, 0.0, 0.0, 0.0]]
    assert not strict.pool._live, "strings decided: no process was started"


@needs_verify
def test_references_may_be_numbers_solutions_and_several(reward: MathReward) -> None:
    for gold in (7, 7.0, "3 + 4 = 7\n#### 7", "\\boxed{7}", [8, "7"], ["x", "\\frac{14}{2}"]):
        assert reward.score([group_of({"answer": gold}, "\\boxed{7}", "\\boxed{9}")]) == [[1.0, 0.0]]
    for row, message in (
        ({"gold": 1}, "lacks 'answer'"),
        ({"answer": " "}, "is empty"),
        ({"answer": []}, "empty"),
    ):
        with pytest.raises(ValueError, match=f"'seven'.*{message}"):
            reward.score([group_of({**row, "uid": "seven"}, "1")])


@needs_verify
def test_a_reference_that_cannot_be_read_scores_nobody() -> None:
    reward = MathReward(workers=1)
    assert reward.score([group_of({"answer": "\\frac{"}, "\\boxed{\\frac{1}{2}}", "\\boxed{\\frac{}")]) == [
        [None, 0.0]
    ]
    assert reward.failures == {"error": 1}
    reward.close()


HOSTILE = {
    "power tower": "9^{9^{9^{9}}}",
    "python power": "9**9**9",
    "large exponent": "10^{400000000}",
    "expansion": "(x+y+z)^{500}",
    "sum": "\\sum_{k=1}^{10000000} k^{k}",
    "integral": "\\int_0^1 e^{x^2}\\sin(x^3) dx",
    "binomial": "\\binom{10^{9}}{5\\cdot10^8}",
    "factorial": "(9!)!",
    "braces": "{" * 5000 + "1" + "}" * 5000,
    "parentheses": "(" * 5000 + "1" + ")" * 5000,
    "nested fractions": "\\frac{1}{" * 300 + "2" + "}" * 300,
    "long sum": "1+" * 50_000 + "1",
    "long number": "9" * 200_000,
    "code": "__import__('os').system('true')",
    "null": "\x00\ud800",
}


@needs_verify
@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_formulas_made_to_hang_end_within_the_deadline(reward: MathReward, name: str) -> None:
    reward.score([group_of({"answer": "x"}, "\\boxed{y+1}")])  # the worker is up
    start = time.monotonic()
    group = group_of({"answer": "\\frac{7}{3}"}, boxed(HOSTILE[name]), boxed("7/3"), HOSTILE[name])
    first, second, third = reward.score([group])[0]
    assert first in (0.0, None)
    assert third in (0.0, None)
    assert second == 1.0, "the pool goes on"
    assert time.monotonic() - start < 12, "two deadlines of 2 s, and new workers"


@needs_verify
def test_equal_answers_to_a_prompt_are_verified_once(
    reward: MathReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[object] = []
    answer = reward.pool.map
    monkeypatch.setattr(reward.pool, "map", lambda items: sent.extend(items) or answer(items))
    groups = [group_of({"answer": "2x"}, "\\boxed{x+x}", "\\boxed{x+x}", "\\boxed{2x}")] * 2
    assert reward.score(groups) == [[1.0] * 3] * 2
    assert len(sent) == 2, "one per prompt; equal strings need none"


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-onpolicy\[verify\]"):
        MathReward()


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("7", "8", False),
        ("1000", "1,000", True),
        ("0.5", "0.50", True),
        ("1/2", "0.5", True),
        ("1/3", "0.333333", None),
        ("1/3", "0.3", False),
        ("1/3", "2/6", True),
        ("1/3", "1/4", False),
        ("50\\%", "0.5", None),
        ("2x", "x+x", None),
        ("7", "Hm", False),
        ("1", "\\sin\\pi", None),
        ("x", "x ", True),
        ("\\dfrac{1}{2}", "\\frac{1}{2}", True),
        ("abc", "cab", False),
        ("5", "5" * 100_000, None),
    ],
)
def test_what_strings_decide(gold: str, answer: str, verdict: bool | None) -> None:
    assert equal(gold, answer) is verdict


def test_helpers() -> None:
    texts = (
        "-007",
        "-0",
        "1,234,567.0",
        "12,34",
        "1.5",
        ".5",
        "5.",
        "-3/4",
        "\\frac34",
        "1/0",
        "",
        ".",
        "-",
        "1/2/3",
    )
    values = [-7, 0, 1234567, None, 1.5, 0.5, 5, -0.75, 0.75, None, None, None, None, None]
    assert [rational(x) for x in texts] == values
    assert rational("9" * 41) is None
    assert depth("{(1)}[2]") == 2
    assert answers("Answer: between 3 and $4$.")[-1] == "4"
    assert answers("The answer is \\$5.50.") == ["\\$5.50"]
