"""What a row is: a mapping with ``prompt`` or ``messages``, and whatever rewards need to score a response.

A row has a ``prompt`` (a string) or ``messages`` (a list of ``{"role": …, "content": …}``), never both.
Optional: ``response``, ``answer``, ``uid``, ``source``, and any other key, which is kept for rewards and
logs. A last message by the assistant is the response, not part of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

Row = Mapping[str, Any]


@runtime_checkable
class Source(Protocol):
    """Rows by number: equal numbers, equal rows. A list of dicts is one, so is a ``datasets.Dataset``.

    A source may have a ``name``, used for prompts whose row does not say its ``source``, and a method ``place``, from
    a row's number to its file and line, for errors. For the command line, give the methods of your own sources exactly
    these annotations.
    """

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int) -> Row:
        """Row ``index``: see the head of this module for its keys."""
        ...


@runtime_checkable
class MixedSource(Protocol):
    """A source that mixes several, whose weights may change while it is read (``GymSource`` is one)."""

    def check_mix(self, weights: Mapping[str, float]) -> None:
        """Raise a ValueError that names the key if one is unknown or a weight is not allowed."""

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Give these parts new weights, relative to those of the others, for rows read from now on."""


@dataclass(frozen=True)
class RowKeys:
    """Under which keys a file or dataset keeps what the library calls prompt, messages, response and answer.

    Args:
        prompt: Key of the prompt text; None ignores a column of the name ``prompt``.
        messages: Key of the conversation; None ignores a column of the name ``messages``.
        response: Key of the given response.
        answer: Key of the reference answer.
    """

    prompt: str | None = "prompt"
    messages: str | None = "messages"
    response: str | None = "response"
    answer: str | None = "answer"


PLAIN = RowKeys()


def canonical(row: Mapping[str, Any], keys: RowKeys, where: str) -> dict[str, Any]:
    """The row under the library's own key names, with a last assistant message moved to ``response``.

    Applying it twice (with default keys the second time) changes nothing more.

    Args:
        row: A row as read.
        keys: Names of its keys.
        where: What to call the row in errors, e.g. ``"train.jsonl line 7"``.

    Raises:
        ValueError: If a key that was named is missing, there is neither prompt nor messages, there are both,
            messages have the wrong shape, or there is half a character in prompt, messages or response.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be a mapping of keys to values, got {type(row).__name__}.")
    out = dict(row)
    for name in ("prompt", "messages", "response", "answer"):
        key: str | None = getattr(keys, name)
        if key == name:
            continue
        out.pop(name, None)
        if key is not None:
            if key not in row:
                raise ValueError(
                    f"{where}: key {key!r} (named by {name}_key) is missing; the row has {sorted(row)}."
                )
            out[name] = row[key]
    for name in ("prompt", "messages"):
        if out.get(name, 0) is None:  # tables keep absent values as None
            del out[name]
    if isinstance(out.get("prompt"), list | tuple) and "messages" not in out:
        out["messages"] = out.pop("prompt")  # a conversation under the name of a prompt, as TRL has it
    if "prompt" in out and "messages" in out:
        raise ValueError(
            f"{where}: the row has both 'prompt' and 'messages'; set prompt_key or messages_key to null "
            "to choose."
        )
    if "messages" in out:
        out["messages"] = _checked_messages(out["messages"], where)
        if out["messages"][-1]["role"] == "assistant":
            if out.get("response") is None:
                out["response"] = out["messages"][-1]["content"]
            out["messages"] = out["messages"][:-1]
    elif "prompt" not in out:
        raise ValueError(
            f"{where}: neither 'prompt' nor 'messages' is among the row's keys {sorted(row)}; "
            "name one with prompt_key or messages_key."
        )
    elif not isinstance(out["prompt"], str):
        raise ValueError(f"{where}: 'prompt' must be a string, got {type(out['prompt']).__name__}.")
    for name in ("prompt", "messages", "response"):
        check_characters(out.get(name), f"{where}: {name!r}")
    return out


def check_characters(value: Any, where: str) -> None:
    r"""Refuse lone surrogates (JSON can hold them, as ``"\ud83d"``) in a text, and in lists and mappings of texts.

    Args:
        value: A text, a list or mapping with texts somewhere in it, or anything else, which passes.
        where: What to call it in errors, e.g. ``"train.jsonl line 7: 'prompt'"``.

    Raises:
        ValueError: The message names the place and the first of them.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} holds {value[error.start]!r} at character {error.start}: half of a character, which no "
                "tokenizer and no API takes. Write the whole character there, or remove it."
            ) from None
    elif isinstance(value, Mapping):
        for key, part in value.items():
            check_characters(key, f"{where}: the key {key!r}")
            check_characters(part, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            check_characters(part, f"{where}[{i}]")


def finish_reasons(row: Row, count: int) -> list[Any]:
    """What each of a row's answers ended with; None where the row does not say it.

    Args:
        row: ``finish_reasons`` (or ``finish_reason``) is a list with one per answer, or one for all. Tables keep absent
            values as None.
        count: Answers; a list is returned as it is, whatever its length.

    Example:
        >>> finish_reasons({"finish_reasons": None, "finish_reason": "length"}, 2)
        ['length', 'length']
    """
    said = row.get("finish_reasons")
    said = row.get("finish_reason") if said is None else said
    return list(said) if isinstance(said, list | tuple) else [said] * count


def _checked_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    shape = "a non-empty list of {'role': …, 'content': …}"
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{where}: 'messages' must be {shape}, got {messages!r:.80}.")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}: messages[{i}] is {message!r:.80}; 'messages' must be {shape}.")
    return [dict(m) for m in messages]
