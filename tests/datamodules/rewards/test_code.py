"""The reward of programs: right ones, wrong ones, and what cannot be scored."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from hostile import left_behind

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.cases import CallCase, StdioCase, cases_of, same, words
from lightning_onpolicy.datamodules.rewards.code import CodeReward, last_block
from lightning_onpolicy.datamodules.rewards.sandbox import find
from lightning_onpolicy.datamodules.rewards.tiers import Tier, Wall

STDIO = [{"stdin": str(n), "stdout": str(n * n)} for n in range(4)]
CALLS = [{"function": "square", "args": [n], "expected": n * n} for n in range(4)]


def block(source: str, tag: str = "python") -> str:
    return f"Let me think.\n```{tag}\n{source}\n```\nDone."


def group(tests: object, *texts: str, **row: object) -> Group:
    completions = tuple(Completion(torch.tensor([1]), torch.zeros(1), "eos", text=t) for t in texts)
    return Group(Prompt((1,), "", {"tests": tests, **row}, "seven"), completions)


@pytest.fixture(scope="module")
def reward():
    made = CodeReward(workers=2, deadline_s=1.0, total_s=3.0)
    yield made
    made.close()


def test_the_fraction_of_tests_passed(reward: CodeReward) -> None:
    right, half = "print(int(input()) ** 2)", "n = int(input())\nprint(n * n if n < 2 else 0)"
    as_function = ["def square(x): return x * x", "def square(x): return x if x < 2 else 0"]
    scores = reward.score(
        [
            group(STDIO, block(right), block(half), block("syntax error"), "no code", ""),
            group(CALLS, *map(block, as_function)),
            group(
                [*STDIO, *CALLS], block(right), block(f"{as_function[0]}\nif __name__ == '__main__': {right}")
            ),
            group(STDIO),
        ]
    )
    assert scores == [[1.0, 0.5, 0.0, 0.0, 0.0], [1.0, 0.5], [0.5, 1.0], []]
    assert isinstance(reward, Reward)
    assert not reward.failures


def test_all_or_nothing_stops_at_the_first_failure() -> None:
    reward = CodeReward(partial=False, workers=1, deadline_s=1.0, total_s=30.0)
    slow = "import time\nn = int(input())\nif n: time.sleep(60)\nprint(1)"  # wrong for 0, endless after that
    start = time.monotonic()
    assert reward.score([group(STDIO, block(slow), block("print(int(input()) ** 2)"))]) == [[0.0, 1.0]]
    assert time.monotonic() - start < 1.0 + 5.0
    reward.close()


def test_a_test_out_of_time_is_failed_and_the_others_count(reward: CodeReward) -> None:
    source = "n = int(input())\nwhile n == 1: pass\nprint(n * n)"
    assert reward.score([group(STDIO, block(source))]) == [[0.75]]


def test_a_program_that_is_always_slow_ends_with_its_total_time(reward: CodeReward) -> None:
    start = time.monotonic()
    tests = [{"stdin": "", "stdout": "x"}] * 50
    assert reward.score([group(tests, block("while True: pass"))]) == [[0.0]]
    assert time.monotonic() - start < 10
    assert not reward.failures


def test_overtime_may_cost_all() -> None:
    """ProRL's rule. Catches: a program that passes four tests and idles in the fifth, paid for the four."""
    source = block("n = int(input())\nwhile n == 3: pass\nprint(n * n)")  # the last test is the slow one
    quick = block("print(int(input()) ** 2)")
    for overtime, slow in (("share", 0.75), ("zero", 0.0)):
        reward = CodeReward(workers=1, deadline_s=3.0, total_s=2.0, overtime=overtime)
        assert reward.score([group(STDIO, source, quick)]) == [[slow, 1.0]]
        reward.close()
    with pytest.raises(ValueError, match="overtime must be share or zero"):
        CodeReward(overtime="none")


def test_scores_do_not_depend_on_the_number_of_workers(reward: CodeReward) -> None:
    texts = [block(f"n = int(input())\nprint(n * n if n < {k} else -1)") for k in range(6)]
    groups = [group(STDIO, *texts), group(CALLS, *texts)]
    alone = CodeReward(workers=1, deadline_s=1.0, total_s=3.0)
    assert reward.score(groups) == alone.score(groups) == [[0.0, 0.25, 0.5, 0.75, 1.0, 1.0], [0.0] * 6]
    alone.close()


def test_one_stuck_answer_does_not_hold_up_the_others() -> None:
    reward = CodeReward(workers=2, deadline_s=3.0)
    reward.pool.start()
    groups = [group(STDIO[:1], block("while True: pass"), *[block("print(0)")] * 20)]
    start = time.monotonic()
    assert reward.score(groups) == [[0.0, *[1.0] * 20]]
    assert time.monotonic() - start < 8
    reward.close()


def test_what_the_sandbox_cannot_do_is_none_and_not_zero() -> None:
    reward = CodeReward(workers=1)
    broken = Wall(Tier.BUBBLEWRAP, ("/bin/false",))
    reward.setting = replace(reward.setting, wall=broken)
    assert reward.score([group(STDIO, block("print(int(input()) ** 2)"), "no code")]) == [[None, 0.0]]
    assert reward.failures == {"error": 1}
    reward.close()


def test_expected_outputs_do_not_enter_the_sandbox() -> None:
    from lightning_onpolicy.datamodules.rewards import code_worker

    asked: list[object] = []

    class Program:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Program:
            return self

        def __exit__(self, *_: object) -> None: ...
        def run(self, *args: object) -> code_worker.Outcome:
            asked.append(args)
            return code_worker.Outcome("ok", b"secret one")

        def call(self, *args: object) -> code_worker.Outcome:
            asked.append(args)
            return code_worker.Outcome("ok", b'"secret two"')

    tests = [
        {"stdin": "1", "stdout": "secret one"},
        {"function": "f", "args": [2], "expected": "secret two"},
    ]
    reward = CodeReward(workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_worker, "Program", Program)
        assert code_worker.score((reward.setting, "", cases_of({"tests": tests}))) == 1.0
    assert asked == [("1",), ("f", "[2]")]


@pytest.mark.parametrize("tier", list(Tier), ids=[tier.label for tier in Tier])
def test_an_interrupt_leaves_nothing_behind(tier: Tier) -> None:
    if not isinstance(find(tier), Wall):
        pytest.skip(f"tier {tier.label}: {find(tier)}")
    reward = CodeReward(workers=1, deadline_s=60.0, tier=tier.label)
    reward.pool.start()
    sleeper = block("import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(60)")
    timer = threading.Timer(1.0, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        reward.score([group(STDIO, sleeper)])
    timer.join()
    end = time.monotonic() + 10
    while (left := left_behind()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
    assert reward.score([group(STDIO, block("print(int(input()) ** 2)"))]) == [[1.0]]
    reward.close()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\n```python\nb\n```", "b\n"),
        ("```python\na\n```\n```text\nb\n```", "a\n"),
        ("```Python title=x\na\n```", "a\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("````python\n```\na\n```\n````", "```\na\n```\n"),
        ("  ```python\r\na\r\n```\r\n", "a\r\n"),
        ("```python\n```", ""),
        ("```python\na", None),
        ("```\na\n```", None),
        ("a ```python a```", None),
        ("    ```python\na\n    ```", None),
        ("```python `x`\na\n```", None),
        ("", None),
    ],
)
def test_which_block_counts(text: str, code: str | None) -> None:
    assert last_block(text, frozenset({"python"})) == code


def test_blocks_without_a_tag_count_if_asked_for() -> None:
    assert last_block("```\na\n```", frozenset({""})) == "a\n"


@pytest.mark.parametrize(
    "text", ["`" * 200_000, "```" + "a" * 200_000 + "`", "```python\n" * 50_000, " " * 200_000 + "`"]
)
def test_blocks_are_found_in_linear_time(text: str) -> None:
    start = time.perf_counter()
    last_block(text, frozenset({"python"}))
    assert time.perf_counter() - start < 1.0


def test_rows_in_their_forms() -> None:
    tests = [{"stdin": "1", "stdout": "2"}, {"function": "f", "args": [(1, 2)], "expected": {1: None}}]
    cases = [StdioCase("1", "2"), CallCase("f", "[[1, 2]]", {"1": None})]
    assert cases_of({"tests": tests}) == cases_of({"tests": json.dumps(tests)}) == cases
    table = [{"stdin": None, "stdout": "2", "function": None, "args": None, "expected": None}]
    assert cases_of({"tests": table}) == [StdioCase("", "2")]
    assert cases_of({"tests": [{"function": "f", "args": [], "expected": None, "stdin": None}]}) == [
        CallCase("f", "[]", None)
    ]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "'tests' must be a list of tests, got None; the row has"),
        ([], "must be a list of tests"),
        ("[1", "'tests' is no JSON"),
        ([{"stdin": "1"}], r"tests\[0\] must be"),
        ([*STDIO, {"function": "f", "args": "ab", "expected": 1}], r"tests\[4\] must be"),
        ([{"function": "f", "args": [1]}], r"tests\[0\] must be"),
        ([{"function": "f", "args": [{1}], "expected": 1}], r"tests\[0\].*not JSON serializable"),
    ],
)
def test_rows_without_proper_tests_name_the_prompt(reward: CodeReward, tests: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"prompt 'seven': .*{message}"):
        reward.score([group(tests, "x")])


@pytest.mark.parametrize(
    ("expected", "got", "equal"),
    [
        (1, 1, True),
        (1, True, False),
        (True, 1, False),
        (1, 1.0, False),
        (0.3, 0.1 + 0.2, True),
        (0.3, 0.3001, False),
        (float("inf"), float("inf"), True),
        (float("nan"), float("nan"), False),
        (None, None, True),
        (None, 0, False),
        ("1", 1, False),
        ([1, [2.0]], [1, [2.0]], True),
        ([1, 2, 3], [1, 2], False),
        ([], [1], False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1}, {"b": 1}, False),
        (10**30, 10**30, True),
    ],
)
def test_values(expected: object, got: object, equal: bool) -> None:
    assert same(expected, got) is equal
    assert CallCase("f", "[]", expected).passes(json.dumps(got).encode()) is equal


@pytest.mark.parametrize(
    ("expected", "output", "equal"),
    [
        ("1 2\n3", "1 2\n3\n", True),
        ("1 2\n3", "\n 1  2 \r\n3\n\n", True),
        ("1 2\n3", "1\n2 3", False),
        ("1 2\n3", "1 2", False),
        ("1 2", "1 2\n3", False),
        ("1", "", False),
        ("", "\n", True),
        ("a\n\nb", "a\nb", False),
    ],
)
def test_outputs(expected: str, output: str, equal: bool) -> None:
    assert (words(expected) == words(output)) is equal
    assert StdioCase("", expected).passes(output.encode()) is equal


def test_settings_are_checked_and_copies_work(reward: CodeReward) -> None:
    for key in ("workers", "deadline_s", "total_s", "memory_bytes", "output_bytes", "processes"):
        with pytest.raises(ValueError, match="must be positive"):
            CodeReward(**{key: 0})
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.score([group(STDIO, block("print(int(input()) ** 2)"))]) == [[1.0]]
    copy.close()


def test_workers_do_not_need_torch() -> None:
    code = (
        "import sys; import lightning_onpolicy.datamodules.rewards.code, "
        "lightning_onpolicy.datamodules.rewards.code_worker; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
