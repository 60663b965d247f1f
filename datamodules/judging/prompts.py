"""Prompts for judges: a Jinja template per use, replaceable, with delimiters that no response can close.

The markers around responses carry a tag made from everything that stands between them, so a response that contains
"end of answer 1" closes nothing: it would have to contain a hash of itself. Templates see ``messages``, ``responses``
(in the order presented), ``n``, ``low``, ``high``, ``tag``, ``reference`` and ``hint`` (both may be None).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.sandbox

from lightning_onpolicy.datamodules.assets import resolve_asset
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.orders import arranged

# Turns of ChatML, Llama 3, Phi and DeepSeek; of Gemma; of Mistral and Llama 2.
_SPECIAL = re.compile(
    r"<[|\uff5c][^<>\s]{1,64}[|\uff5c]>|</?(?:s|bos|eos|pad|unk)>|<(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT)\]"
)
GROUP, SINGLE, META = (f"onpolicy://judging/{name}.jinja" for name in ("group", "single", "meta"))


@dataclass(frozen=True)
class JudgeTemplate:
    """How items become prompts, and which scores are asked for.

    Args:
        path: A Jinja file; ``onpolicy://judging/group.jinja`` and the like ship with the library.
        low: Least score.
        high: Largest score.

    Raises:
        ValueError: If the range makes no sense.
    """

    path: str = GROUP
    low: int = 1
    high: int = 10

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"template.low must be below template.high, got {self.low} and {self.high}.")

    @property
    def text(self) -> str:
        """The template itself."""
        return resolve_asset(self.path).read_text(encoding="utf-8")

    def render(self, item: JudgeItem, order: Sequence[int], hint: str | None = None) -> str:
        """The judge's prompt with the responses in this order.

        Args:
            item: What is judged.
            order: Slot i shows response ``order[i]``.
            hint: What the judge is told beforehand; only where wrong judgements are to be got rid of.

        Raises:
            ValueError: If a single response meets a template whose scores are not 0 and 1 while its label is, or the
                template for a single response meets several.
        """
        single = len(item.responses) == 1
        if self.path == SINGLE and not single:
            raise ValueError(
                f"item {item.uid!r} has {len(item.responses)} responses, and {SINGLE} shows one: use {GROUP}."
            )
        if single and item.labels is not None and (self.low, self.high) != (0, 1):
            raise ValueError(
                f"item {item.uid!r} has one response, labelled 0 or 1, and the template asks for {self.low} to "
                f"{self.high}: use {SINGLE} with low 0 and high 1."
            )
        shown = [unspelled(text) for text in arranged(item.responses, order)]
        messages = [{**m, "content": unspelled(m["content"])} for m in item.messages]
        reference = None if item.reference is None else unspelled(item.reference)
        texts = [*(m["content"] for m in messages), *shown]
        text = _template(self.text).render(
            messages=messages,
            responses=shown,
            n=len(shown),
            low=self.low,
            high=self.high,
            tag=tag_of(texts if reference is None else [*texts, reference]),
            reference=reference,
            hint=hint,
        )
        return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair: no tokenizer takes it


def template_for(n: int, several: JudgeTemplate, single: JudgeTemplate) -> JudgeTemplate:
    """The template for n responses."""
    return single if n == 1 else several


def single_beside(template: JudgeTemplate, single: JudgeTemplate | None) -> JudgeTemplate:
    """The template for one response, which is right or not: what was given, ``template`` if it asks for 0 or 1, or
    the packaged one."""
    if single is None and (template.low, template.high) == (0, 1):
        return template
    return single or JudgeTemplate(SINGLE, 0, 1)


def unspelled(text: str, tokens: Iterable[str] = ()) -> str:
    """The text with a space inside whatever a judge's tokenizer would read as a special token.

    A response that spells one would close the user's turn and speak for the judge. Items are shown without common ones
    (``<|…|>``, ``<end_of_turn>``, ``</s>``, ``[INST]``); backends leave out their model's.

    Args:
        text: What is shown, or a prompt.
        tokens: More special tokens.

    Example:
        >>> unspelled("fine<|im_end|>", ["<end>"])
        'fine< |im_end|>'
    """
    for token in tokens:
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return _SPECIAL.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)


def tag_of(texts: Sequence[str]) -> str:
    """Eight hexadecimal digits that stand in none of the texts; equal texts, equal tag."""
    everything = "\0".join(texts)
    number = 0
    while True:
        digest = hashlib.blake2b(
            f"{number}\0{everything}".encode("utf-8", "surrogatepass"), digest_size=4
        ).hexdigest()
        if digest not in everything:
            return digest
        number += 1


def best_hint(item: JudgeItem, order: Sequence[int]) -> str:
    """What a hinted judge is told: which of the responses, as presented, is the best (or whether the one is right)."""
    if len(item.responses) == 1:
        assert item.labels is not None
        return f"the answer is {'correct' if item.labels[0] == 1 else 'not correct'}."
    return f"answer {list(order).index(item.best) + 1} is the best."


@lru_cache(maxsize=32)
def _template(text: str) -> jinja2.Template:
    environment: Any = jinja2.sandbox.SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=False, autoescape=False
    )
    template: jinja2.Template = environment.from_string(text)
    return template
