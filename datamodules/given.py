"""Completions that nobody sampled: responses that the data gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_onpolicy.datamodules.batch import Completion, FinishReason, Group, Prompt
from lightning_onpolicy.datamodules.rows import check_characters, finish_reasons
from lightning_onpolicy.datamodules.tools.base import Observation
from lightning_onpolicy.datamodules.tools.tokens import encode_observation

WEIGHT = "weight"  # [B] float in ``extra``: what a given response counts


def given_weights(prompt: Prompt, count: int, key: str) -> list[float]:
    """The weights of the responses that a row holds.

    Args:
        prompt: The row's.
        count: Its responses.
        key: Under which it has one number, or a list with one per response.

    Raises:
        ValueError: If they are missing, of another number, negative or not finite; the message names the row.
    """
    value: Any = prompt.row.get(key)
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise ValueError(f"{prompt.where}: {count} responses, but {len(values)} entries in {key!r}.")
    for weight in values:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ValueError(
                f"{prompt.where}: {key!r} (weight_key) must hold finite numbers >= 0, got {value!r}."
            )
    return [float(weight) for weight in values]


def given_group(prompt: Prompt, tokenizer: Any, response_key: str, max_response_tokens: int | None) -> Group:
    """The prompt with the response(s) its row holds.

    A string or a list of them; a list of turns, ``{"role": "assistant" | "tool", "content": …}``; or
    ``response_ids``, taken as they are. Ids count where there is no text, and where ``response_mask`` says which of
    them the policy wrote, as ``predict`` does for responses with a tool's words in them: those are not trained on.

    Where the row has ``finish_reasons``, one per text (or ``finish_reason``, one for all), those with ``length`` were
    cut: they are not closed by EOS, and not finished.

    Raises:
        ValueError: If the row has no response, an empty one, or half a character in it; the message names the row and,
            where there is none, the keys it has.
    """
    row = prompt.row
    # Tables keep absent values as None.
    texts, ids, mask = (row.get(key) for key in (response_key, "response_ids", "response_mask"))
    check_characters(texts, f"{prompt.where}: {response_key!r}")
    if ids is not None and (texts is None or mask is not None):
        if not len(ids):
            raise ValueError(f"{prompt.where}: 'response_ids' is empty.")
        if mask is not None and len(mask) != len(ids):
            raise ValueError(
                f"{prompt.where}: 'response_mask' has {len(mask)} values for {len(ids)} 'response_ids'."
            )
        text = tokenizer.decode(ids, skip_special_tokens=True)
        completions = [text_completion(text, tokenizer, ids=ids, written=mask)]
    elif isinstance(texts, list | tuple) and texts and all(isinstance(t, Mapping) for t in texts):
        completions = [turns_completion(texts, tokenizer, f"{prompt.where}: {response_key!r}")]
    else:
        if texts is None:
            known = sorted(key for key, value in row.items() if value is not None)
            raise ValueError(f"{prompt.where} has no response: key {response_key!r} is not among {known}.")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(
                f"{prompt.where}: {response_key!r} must be a non-empty string or a list of them."
            )
        reasons = finish_reasons(row, len(texts))
        if len(reasons) != len(texts):
            raise ValueError(
                f"{prompt.where}: {len(texts)} responses, but {len(reasons)} entries in 'finish_reasons'."
            )
        completions = [
            text_completion(t, tokenizer, cut=r == "length") for t, r in zip(texts, reasons, strict=True)
        ]
    for c in completions:
        if max_response_tokens is not None and c.tokens > max_response_tokens:
            raise ValueError(
                f"{prompt.where}: a response has {c.tokens} tokens, max_response_tokens is "
                f"{max_response_tokens}. Raise it or shorten the data; nothing is cut silently."
            )
    return Group(prompt, tuple(completions), on_policy=False)


def text_completion(
    text: str,
    tokenizer: Any,
    ids: Sequence[int] | None = None,
    cut: bool = False,
    written: Sequence[bool] | None = None,
) -> Completion:
    """A completion nobody sampled: given text, closed by EOS. Its log-probabilities are NaN (unknown).

    Args:
        text: The response.
        tokenizer: Encodes it, unless ``ids`` are given.
        ids: Token ids to use as they are.
        cut: The text ends where a token limit ended it: no EOS belongs there.
        written: Which of the ids are the response's own; the others are observations. None: all.
    """
    if tokenizer.eos_token_id is None and not cut and ids is None:
        raise ValueError(
            "the tokenizer has no EOS, which closes a given response: set its eos_token in tokenizer_config.json."
        )
    end = [] if cut else [tokenizer.eos_token_id]
    tokens = list(ids) if ids is not None else [*tokenizer.encode(text, add_special_tokens=False), *end]
    own = None if written is None or all(written) else torch.tensor(written, dtype=torch.bool)
    logprobs = torch.full((len(tokens),), float("nan"))
    if own is not None:
        logprobs[~own] = 0.0
    finish: FinishReason = "length" if cut else "eos"
    return Completion(torch.tensor(tokens, dtype=torch.long), logprobs, finish, -1, text, own)


def turns_completion(turns: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> Completion:
    """A completion nobody sampled, in turns: the assistant's, closed by EOS, and between them what a tool said.

    Args:
        turns: ``role``, ``content`` and, of tools, ``before`` and ``after`` (see ``tools.Observation``).
        tokenizer: Encodes each turn by itself.
        where: What to call it in errors.

    Raises:
        ValueError: If a turn has another role or no text, or the first or last is not the assistant's.
    """
    ids: list[int] = []
    written: list[bool] = []
    for number, turn in enumerate(turns):
        role, content = turn.get("role"), turn.get("content")
        if role not in ("assistant", "tool") or not isinstance(content, str):
            raise ValueError(
                f"{where}, turn {number}: expected {{'role': 'assistant' or 'tool', 'content': text}}, "
                f"got {turn!r:.80}."
            )
        own = role == "assistant"
        heard = Observation(content, turn.get("before") or "", turn.get("after") or "")
        new = (
            tokenizer.encode(content, add_special_tokens=False)
            if own
            else encode_observation(tokenizer, heard)
        )
        ids += new
        written += [own] * len(new)
    if turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the first and the last turn must be the assistant's.")
    ids.append(tokenizer.eos_token_id)
    written.append(True)
    return text_completion(tokenizer.decode(ids, skip_special_tokens=True), tokenizer, ids, written=written)


def group_of(row: Mapping[str, Any], *texts: str) -> Group:
    """A group of plain texts without tokens, to try a reward on.

    Args:
        row: The prompt's row; its ``prompt``, ``uid`` and ``source`` become the prompt's.
        texts: The completions' texts.
    """
    prompt = Prompt(
        (), str(row.get("prompt", "")), dict(row), str(row.get("uid", "")), str(row.get("source", ""))
    )
    none = torch.empty(0)
    return Group(prompt, tuple(Completion(none.long(), none, "eos", -1, t) for t in texts), on_policy=False)
