"""A judge: items in, k judgements of each out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from lightning_onpolicy.datamodules.judging.backends import JudgeBackend, JudgeRequest, Reply
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.orders import OrderKind, orders, restored
from lightning_onpolicy.datamodules.judging.parser import opens_thinking, parse_scores
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate, best_hint, template_for
from lightning_onpolicy.datamodules.judging.records import JudgeSample


@runtime_checkable
class MetaScorer(Protocol):
    """Says how good judgements are."""

    def score(self, items: Sequence[JudgeItem], samples: Sequence[JudgeSample]) -> list[float | None]:
        """One score per sample, of the item at the same place; None where there is none."""
        ...


class Judge:
    """Asks a model k times about each item, with the responses in another order each time.

    What is drawn for an item depends on its name, the seed and ``visit`` alone, not on the items beside it.

    Args:
        backend: Who answers.
        template: How an item becomes a prompt.
        single: The same for items of one response, which are right or not; None: ``template``.
        k: Judgements per item.
        order: ``shuffled``, ``rotated`` or ``fixed``.
        seed: Of orders and sampling.
        think_end: What ends the judge's thinking, which does not count; None, nothing does.
        meta: Scores the judgements that could be read.

    Raises:
        ValueError: If k is not positive.
    """

    def __init__(
        self,
        backend: JudgeBackend,
        template: JudgeTemplate | None = None,
        k: int = 8,
        order: OrderKind = "shuffled",
        seed: int = 0,
        think_end: str | None = "</think>",
        meta: MetaScorer | None = None,
        single: JudgeTemplate | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}.")
        self.backend, self.template, self.k, self.order = backend, template or JudgeTemplate(), k, order
        self.seed, self.think_end, self.meta = seed, think_end, meta
        self.single = single or self.template

    def judge(
        self,
        items: Sequence[JudgeItem],
        visit: int = 0,
        *,
        hinted: bool = False,
        kinds: Sequence[OrderKind] | None = None,
    ) -> list[tuple[JudgeSample, ...]]:
        """k samples of each item.

        Args:
            items: What is judged; their names must differ where their content does.
            visit: Another number, other orders and samples.
            hinted: Tell the judge beforehand which response is the best; only to make text to learn from.
            kinds: One per item, in place of ``order``; None: ``order`` for all.

        Raises:
            ValueError: If the backend does not answer as often as it is asked, or ``kinds`` are not one per item.
        """
        requests: list[JudgeRequest] = []
        drawn: list[list[tuple[int, ...]]] = []
        for item, kind in zip(items, [self.order] * len(items) if kinds is None else kinds, strict=True):
            key = (item.uid, self.seed, visit, hinted)
            drawn.append(orders(len(item.responses), self.k, kind, key))
            for order, count in Counter(drawn[-1]).items():
                hint = best_hint(item, order) if hinted else None
                prompt = self._template(len(order)).render(item, order, hint)
                requests.append(JudgeRequest(prompt, count, _number(*key, order)))
        answers = self.backend.complete(requests)
        if [len(group) for group in answers] != [request.n for request in requests]:
            raise ValueError(
                f"{type(self.backend).__name__}.complete gave {[len(group) for group in answers]} replies to requests "
                f"for {[request.n for request in requests]}: one per sample, None where there is none."
            )
        replies = iter(answers)
        judged = [tuple(self._in_turn(order_k, replies)) for order_k in drawn]
        return judged if self.meta is None else _graded(self.meta, items, judged)

    def _in_turn(
        self, order_k: Sequence[tuple[int, ...]], replies: Iterator[list[Reply | None]]
    ) -> list[JudgeSample]:
        """One item's samples, in the order of its orders."""
        by_order = {order: iter(next(replies)) for order in dict.fromkeys(order_k)}
        return [self._sample(next(by_order[order]), order) for order in order_k]

    def _sample(self, reply: Reply | None, order: tuple[int, ...]) -> JudgeSample:
        if reply is None:
            return JudgeSample(order, "unanswered")
        low, high = self._template(len(order)).low, self._template(len(order)).high
        said = parse_scores(
            reply.text,
            len(order),
            low,
            high,
            finished=reply.finished,
            think_end=self.think_end,
            opened=opens_thinking(reply.prompt_end, self.think_end),
        )
        scores = None if said.scores is None else tuple(restored(said.scores, order))
        return JudgeSample(order, said.outcome, scores, None, reply.text, reply.finished)

    def _template(self, n: int) -> JudgeTemplate:
        return template_for(n, self.template, self.single)

    def close(self) -> None:
        """Close the backend."""
        self.backend.close()


def _graded(
    meta: MetaScorer, items: Sequence[JudgeItem], judged: Sequence[tuple[JudgeSample, ...]]
) -> list[tuple[JudgeSample, ...]]:
    """The samples that could be read with their meta scores."""
    pairs = [
        (i, j) for i, samples in enumerate(judged) for j, s in enumerate(samples) if s.scores is not None
    ]
    scores = meta.score([items[i] for i, _ in pairs], [judged[i][j] for i, j in pairs])
    known = dict(zip(pairs, scores, strict=True))
    return [
        tuple(dataclasses.replace(s, meta=known.get((i, j))) for j, s in enumerate(samples))
        for i, samples in enumerate(judged)
    ]


def _number(*key: object) -> int:
    """62 bits that belong to a key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 2
