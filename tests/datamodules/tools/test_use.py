"""Tools in the text: what counts as a call, whose fault an error is; and transcripts made from scripts."""

from __future__ import annotations

import time
from typing import Any

import pytest
import talks
import torch
import toys
from talks import PROMPT

from lightning_onpolicy.datamodules.given import given_group
from lightning_onpolicy.datamodules.tools.base import Observation, Segment, Tool, ToolError, Transcript
from lightning_onpolicy.datamodules.tools.calculator import Calculator
from lightning_onpolicy.datamodules.tools.conversation import Conversation
from lightning_onpolicy.datamodules.tools.demonstrations import DemonstrationSource
from lightning_onpolicy.datamodules.tools.use import InlineTool, ToolUse

CALCULATOR = ToolUse([InlineTool(Calculator())])


def shout(call: str) -> str:
    return call.upper()


class Strict(Tool):
    def __call__(self, call: str) -> str:
        raise ToolError("no such thing")


def heard(text: str, environment: ToolUse = CALCULATOR, finish: Any = "stop") -> str | None:
    [answer] = environment.observe([Transcript(PROMPT, (Segment("assistant", text),), text, finish)])
    return None if answer is None else answer.before + answer.text + answer.after


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 by 7: <<12*7=", "84>>"),
        ("<< 12 * 7 =", "84>>"),
        ("<<1<<2+3=", "5>>"),  # the last opening counts
        ("x = 5", ""),  # nothing was opened
        ("a=b<<2*3=", "6>>"),
        ("<<=", "error: not an arithmetic expression>>"),
        ("<<9**9**9=", "error: not an arithmetic expression>>"),
        ("<<" + "(" * 100_000 + "=", "error: more than 100 characters>>"),
        ("<<1/0=", "error: division by zero>>"),
        ("<<2+2", ""),  # not closed
    ],
    ids=lambda text: text[:12],
)
def test_what_is_a_call(text: str, expected: str) -> None:
    assert heard(text) == expected


def test_a_response_that_ended_is_not_answered() -> None:
    assert heard("<<12*7=", finish="eos") is None


def test_the_tool_that_was_opened_last_answers() -> None:
    both = ToolUse([InlineTool(Calculator()), InlineTool(shout, "[", "]", " -> ", ".")])
    assert both.stop == ("=", "]")
    assert heard("<<1+1=2>> [abc]", both) == " -> ABC."
    assert heard("[abc] <<1+1=", both) == "2>>"


def test_what_the_model_did_wrong_it_reads_and_what_we_did_wrong_ends_the_run() -> None:
    assert heard("<<x=", ToolUse([InlineTool(Strict())])) == "error: no such thing>>"
    with pytest.raises(ZeroDivisionError):
        heard("<<x=", ToolUse([InlineTool(lambda call: str(1 // 0))]))
    with pytest.raises(TypeError, match="returned a int, not a string"):
        heard("<<x=", ToolUse([InlineTool(lambda call: 7)]))  # type: ignore[arg-type, return-value]


def test_long_answers_are_cut_and_say_so() -> None:
    long = ToolUse([InlineTool(lambda call: "y" * 1000, max_chars=5)])
    assert heard("<<x=", long) == "yyyyy[cut]>>"


def test_looking_for_calls_is_linear() -> None:
    start = time.process_time()
    heard("<<1" * 100_000 + "=" * 100_000)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InlineTool(shout, opens=""), "two different strings"),
        (lambda: InlineTool(shout, "=", "="), "two different strings"),
        (lambda: InlineTool(shout, max_chars=0), "max_chars must be >= 1"),
        (lambda: ToolUse([]), "needs a tool"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- demonstrations ------------------------------------------------------------------------------------

ROWS = [{"prompt": "t5 t6", "answer": "t2", "uid": "p"}]


def demonstrations(turns: list[str], **row: Any) -> DemonstrationSource:
    return DemonstrationSource([{**ROWS[0], **row}], talks.echo(), turns)


def test_a_script_is_answered_by_the_environment() -> None:
    row = demonstrations(["t1 t7 {{ answer }} t8", "{{ answer }}"])[0]
    assert row["response"] == [
        {"role": "assistant", "content": "t1 t7 t2 t8"},
        {"role": "tool", "content": "t2", "before": "t9 ", "after": " t9"},
        {"role": "assistant", "content": "t2"},
    ]


def test_a_demonstration_is_token_for_token_what_a_rollout_would_be() -> None:
    """Catches: a warm start on another tokenisation, a loss on what the tool says, an EOS in the middle."""
    tokenizer = toys.tokenizer()
    row = demonstrations(["t1 t7 {{ answer }} t8", "{{ answer }}"])[0]
    [given] = given_group(talks.Prompt((5, 6), "", row), tokenizer, "response", 6).completions
    engine = talks.Scripted(([1, 7, 2, 8], "stop"), ([2, talks.EOS], "eos"))
    conversation = Conversation(talks.echo(), tokenizer)
    [[rolled]] = conversation.sample(engine, [PROMPT], 1, talks.Sampling(max_new_tokens=9), 0)
    assert given.written is not None and rolled.written is not None
    assert torch.equal(given.ids, rolled.ids) and torch.equal(given.written, rolled.written)
    assert bool(given.logprobs[given.written].isnan().all())
    assert bool((given.logprobs[~given.written] == 0).all())
    with pytest.raises(ValueError, match="has 6 tokens, max_response_tokens is 5"):
        given_group(talks.Prompt((5, 6), "", row), tokenizer, "response", 5)


@pytest.mark.parametrize(
    ("turns", "message"),
    [([], "turns is empty"), (["{{ x"], "turns: .*unexpected end"), (["{{ nothing }}"], "row 0: 'nothing'")],
)
def test_scripts_that_cannot_be_followed_are_named(turns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demonstrations(turns)[0]


def test_an_environment_that_ends_the_response_early_is_named() -> None:
    source = DemonstrationSource(ROWS, talks.Deep(lambda prompt: 0), ["t1", "t2"])
    with pytest.raises(ValueError, match="row 0: the environment ends the response at turn 1, 't1'"):
        source[0]


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ([{"role": "user", "content": "x"}], "turn 0: expected"),
        ([{"role": "assistant"}], "turn 0: expected"),
        ([{"role": "tool", "content": "t1"}, {"role": "assistant", "content": "t1"}], "first and the last"),
        ([{"role": "assistant", "content": "t1"}, {"role": "tool", "content": "t1"}], "first and the last"),
    ],
)
def test_turns_of_another_shape_are_named(response: Any, message: str) -> None:
    row = {"response": response}
    with pytest.raises(ValueError, match=rf"row 'p': 'response'.*{message}"):
        given_group(talks.Prompt((5,), "", row, "p"), toys.tokenizer(), "response", None)


def test_an_observation_is_only_its_parts() -> None:
    assert CALCULATOR.called("nothing") is None and CALCULATOR.called("<<1+1=") == Observation("2", "", ">>")
