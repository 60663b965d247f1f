"""Completions that nobody sampled: responses that the data gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt


def given_group(prompt: Prompt, tokenizer: Any, response_key: str, max_response_tokens: int | None) -> Group:
    """The prompt with the response(s) its row holds: a string, a list of strings, or ``response_ids``.

    ``response_ids`` are taken as they are; they count only where there is no text. Where the row has
    ``finish_reasons``, one per text, those with ``length`` were cut: they are not closed by EOS, and not finished.

    Raises:
        ValueError: If the row has no response or an empty one; the message names the row and the keys it has.
    """
    row = prompt.row
    texts, ids = (row.get(key) for key in (response_key, "response_ids"))  # tables keep absent values as None
    if texts is None and ids is not None:
        if not len(ids):
            raise ValueError(f"row {prompt.uid!r}: 'response_ids' is empty.")
        completions = [text_completion(tokenizer.decode(ids, skip_special_tokens=True), tokenizer, ids=ids)]
    else:
        if texts is None:
            known = sorted(key for key, value in row.items() if value is not None)
            raise ValueError(
                f"row {prompt.uid!r} has no response: key {response_key!r} is not among {known}."
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(
                f"row {prompt.uid!r}: {response_key!r} must be a non-empty string or a list of them."
            )
        reasons = row.get("finish_reasons") or [None] * len(texts)
        if len(reasons) != len(texts):
            raise ValueError(
                f"row {prompt.uid!r}: {len(texts)} responses, but {len(reasons)} entries in 'finish_reasons'."
            )
        completions = [
            text_completion(t, tokenizer, cut=r == "length") for t, r in zip(texts, reasons, strict=True)
        ]
    for c in completions:
        if max_response_tokens is not None and len(c.ids) > max_response_tokens:
            raise ValueError(
                f"row {prompt.uid!r}: a response has {len(c.ids)} tokens, max_response_tokens is "
                f"{max_response_tokens}. Raise it or shorten the data; nothing is cut silently."
            )
    return Group(prompt, tuple(completions), on_policy=False)


def text_completion(
    text: str, tokenizer: Any, ids: Sequence[int] | None = None, cut: bool = False
) -> Completion:
    """A completion nobody sampled: given text, closed by EOS. Its log-probabilities are NaN (unknown).

    Args:
        text: The response.
        tokenizer: Encodes it, unless ``ids`` are given.
        ids: Token ids to use as they are.
        cut: The text ends where a token limit ended it: no EOS belongs there.
    """
    end = [] if cut else [tokenizer.eos_token_id]
    tokens = list(ids) if ids is not None else [*tokenizer.encode(text, add_special_tokens=False), *end]
    return Completion(
        torch.tensor(tokens, dtype=torch.long),
        torch.full((len(tokens),), float("nan")),
        "length" if cut else "eos",
        -1,
        text,
    )


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
