"""From the body of a response to an answer with flags, or to the fault that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_onpolicy.datamodules.collect.faults import Fault


@dataclass(frozen=True)
class Answer:
    """One answer of the teacher.

    Args:
        text: What it wrote; where it refused without writing, the words of its refusal.
        finish_reason: As the server says it: ``stop``, ``length``, ``content_filter``, …
        refused: The server marks a refusal, or its filter ended the answer. Polite refusals in plain text are not
            recognised.
        truncated: The token limit ended the answer.
        empty: There is no text.
        reasoning: What the model wrote before its answer, where the server sends it apart.
        model: Name the server gives the model.
        fingerprint: The server's mark of its build.
        usage: Token counts as sent.
        tokens_in: Prompt tokens billed; None = the server does not say.
        tokens_out: Answered tokens billed; None = the server does not say.
    """

    text: str
    finish_reason: str | None
    refused: bool
    truncated: bool
    empty: bool
    reasoning: str | None
    model: str | None
    fingerprint: str | None
    usage: Mapping[str, Any] | None
    tokens_in: int | None
    tokens_out: int | None


def answer_of(body: Any) -> Answer | Fault:
    """The answer in a chat completion's body."""
    if not isinstance(body, Mapping):
        return Fault("malformed", f"expected a JSON object, got {type(body).__name__}")
    if body.get("error"):  # some gateways answer 200 and put the provider's error in the body
        return Fault("server_error", f"an error in place of an answer: {body['error']!r:.300}")
    choices = body.get("choices")
    if not isinstance(choices, list):
        return Fault("malformed", f"no list of choices; the keys are {sorted(map(str, body))}")
    if not choices:
        return Fault("no_choices", "the list of choices is empty")
    message = choices[0].get("message") if isinstance(choices[0], Mapping) else None
    if not isinstance(message, Mapping):
        return Fault("malformed", "the first choice has no message")
    content = _text(message.get("content"))
    if content is None:
        return Fault("malformed", f"the content is {type(message.get('content')).__name__}, not text")
    finish = choices[0].get("finish_reason")
    refusal = message.get("refusal")
    text = content or (refusal if isinstance(refusal, str) else "")
    usage = body.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    return Answer(
        text=text,
        finish_reason=None if finish is None else str(finish),
        refused=bool(refusal) or finish == "content_filter",
        truncated=finish == "length",
        empty=not text.strip(),
        reasoning=_string(message.get("reasoning_content") or message.get("reasoning")),
        model=_string(body.get("model")),
        fingerprint=_string(body.get("system_fingerprint")),
        usage=counts or None,
        tokens_in=_count(counts.get("prompt_tokens")),
        tokens_out=_count(counts.get("completion_tokens")),
    )


def _text(content: Any) -> str | None:
    """Text, the text parts of a list of parts, or "" where nothing was written; None = something else."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return None
    return "".join(str(part.get("text") or "") for part in content if part.get("type") == "text")


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
