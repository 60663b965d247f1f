"""A judge as a reward: a language model reads all of a group's responses together and scores each, several times.

Source: SPCT (2504.02495): shuffled parallel samples, summed scores, a meta model that picks samples; the mean in place
of the sum, since samples that could not be read are left out and sums of different numbers do not compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_onpolicy.datamodules.judging.backends import JudgeBackend
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.judge import Judge, MetaScorer
from lightning_onpolicy.datamodules.judging.orders import OrderKind
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate
from lightning_onpolicy.datamodules.judging.votes import Verdict, meta_vote, vote
from lightning_onpolicy.datamodules.rewards.base import Reward

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Group


class GenerativeReward(Reward):
    """The mean of a judge's scores for each completion, from 0 (the template's least score) to 1 (its largest).

    A group is one item: the judge sees all its completions at once, equal ones once, also those that are empty or were
    cut. Where no sample could be read,
    the whole group is None: masked, never 0. Orders and sampling depend on the prompt, the texts and ``seed`` alone, so
    equal groups get equal scores and a cache of the backend finds them again.

    Scores of different groups do not compare: use it with advantages within groups.

    Args:
        backend: Who judges.
        template: How a group becomes a prompt.
        k: Samples per group.
        k_meta: Of these, those that ``meta`` thinks best; null takes all.
        meta: Scores judgements, e.g. ``MetaRewardScorer``; needed by ``k_meta``.
        order: ``shuffled``, ``rotated`` or ``fixed``.
        least: Samples that must be readable, for a group to be scored.
        reference_key: Key of the rows' reference answer, shown to the judge; null shows none.
        think_end: What ends the judge's thinking; null, nothing does.
        seed: Of orders and sampling.

    Raises:
        ValueError: If a number is out of range, or ``k_meta`` and ``meta`` do not go together.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> from lightning_onpolicy.datamodules.judging.backends import CallableBackend
        >>> judge = CallableBackend(lambda prompt, seed: "Both will do. \\\\boxed{10, 10}")
        >>> GenerativeReward(judge, k=2).score([group_of({"prompt": "Say hello."}, "Hello!", "Hi.")])
        [[1.0, 1.0]]
    """

    def __init__(
        self,
        backend: JudgeBackend,
        template: JudgeTemplate | None = None,
        k: int = 8,
        k_meta: int | None = None,
        meta: MetaScorer | None = None,
        order: OrderKind = "shuffled",
        least: int = 1,
        reference_key: str | None = None,
        think_end: str | None = "</think>",
        seed: int = 0,
    ) -> None:
        if (k_meta is None) != (meta is None):
            raise ValueError("k_meta says how many samples meta keeps: give both or neither.")
        if k_meta is not None and not 1 <= k_meta <= k:
            raise ValueError(f"k_meta must be in [1, k={k}], got {k_meta}.")
        if not 1 <= least <= (k if k_meta is None else k_meta):
            raise ValueError(f"least must be in [1, {k if k_meta is None else k_meta}], got {least}.")
        self.judge = Judge(backend, template, k, order, seed, think_end, meta)
        self.k_meta, self.least, self.reference_key = k_meta, least, reference_key

    @property
    def concurrent(self) -> bool:
        """Whether the judge is elsewhere, so that it may read finished groups while others are sampled."""
        return self.judge.backend.remote and self.judge.meta is None

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score in [0, 1] per completion; all None where nothing could be read.

        Raises:
            ValueError: If a row lacks the reference.
        """
        items = [self.item(group) for group in groups]
        low, high = self.judge.template.low, self.judge.template.high
        scores: list[list[float | None]] = []
        for group, item, samples in zip(groups, items, self.judge.judge(items), strict=True):
            verdict = self._verdict([s.scores for s in samples], [s.meta for s in samples])
            if verdict.means is None or len(verdict.used) < self.least:
                scores.append([None] * len(group.completions))
                continue
            worth = dict(zip(item.responses, verdict.means, strict=True))
            scores.append([(worth[c.text] - low) / (high - low) for c in group.completions])
        return scores

    def item(self, group: Group) -> JudgeItem:
        """What the judge is shown."""
        row = group.prompt.row
        texts = tuple(dict.fromkeys(c.text for c in group.completions))
        reference = None
        if self.reference_key is not None:
            if row.get(self.reference_key) is None:
                raise ValueError(
                    f"row {group.prompt.uid!r} lacks {self.reference_key!r} (reference_key); it has {sorted(row)}."
                )
            reference = str(row[self.reference_key])
        messages = tuple(
            row.get("messages") or ({"role": "user", "content": str(row.get("prompt", group.prompt.text))},)
        )
        if group.prompt.system is not None:  # the judge knows what the policy was told
            messages = ({"role": "system", "content": group.prompt.system}, *messages)
        digest = hashlib.blake2b(
            repr((messages, texts, reference)).encode("utf-8", "surrogatepass"), digest_size=8
        )
        return JudgeItem(
            messages, texts, uid=digest.hexdigest(), source=group.prompt.source, reference=reference
        )

    def _verdict(self, scores: Sequence[Sequence[int] | None], meta: Sequence[float | None]) -> Verdict:
        return vote(scores) if self.k_meta is None else meta_vote(scores, meta, self.k_meta)

    def close(self) -> None:
        """Close the backend."""
        self.judge.close()
