"""A trained meta reward model as the filter of a judge's samples."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.judge import MetaScorer
from lightning_onpolicy.datamodules.judging.meta import MetaReading
from lightning_onpolicy.datamodules.judging.records import JudgeSample
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.scalar_reward import FrozenScalar
from lightning_onpolicy.modules.specs import ModelSpec


class MetaRewardScorer(FrozenScalar, MetaScorer):
    """Scores judgements, without their labels: the logit that one is right, for ``meta_vote``.

    Args:
        model: What ``MetaRewardModel`` exported, or a live :class:`ScalarModel`.
        reading: How a judgement is read; null reads as in training.
        micro_batch_tokens: Positions (rows × longest row) per forward pass.
        device: Where to score; null takes CUDA where there is, or else the CPU.

    Example:
        >>> from lightning_onpolicy.modules import ModelSpec
        >>> policy = ModelSpec("onpolicy://quickstart/models/judge", dtype="float32").load()
        >>> reading = MetaReading("onpolicy://quickstart/judge.jinja")
        >>> scorer = MetaRewardScorer(ScalarModel.copy_of(policy), reading)  # an untrained head: 0 for everything
        >>> item = JudgeItem(({"role": "user", "content": "1+1="},), ("2", "3"))
        >>> samples = [JudgeSample((0, 1), "ok", (9, 2), text="9, 2"), JudgeSample((1, 0), "missing", text="?")]
        >>> scorer.score([item, item], samples)
        [0.0, None]
    """

    def __init__(
        self,
        model: str | ModelSpec | ScalarModel,
        reading: MetaReading | None = None,
        micro_batch_tokens: int = 16384,
        device: str | None = None,
    ) -> None:
        super().__init__(model, micro_batch_tokens, device)
        self.reading = reading or MetaReading.of(self.model.body.config)

    def score(self, items: Sequence[JudgeItem], samples: Sequence[JudgeSample]) -> list[float | None]:
        """One score per judgement; None for those that could not be read, which have no vote, and for those that are
        longer than the model's positions, whose score would mean nothing.

        Args:
            items: What was judged, one per sample.
            samples: What the judge wrote.
        """
        scores: list[float | None] = [None] * len(samples)
        pairs = zip(items, samples, strict=True)
        known = {i: pair for i, pair in enumerate(pairs) if pair[1].scores is not None}
        if not known:
            return scores
        reading, tokenizer = self.reading, self.model.tokenizer
        rows = [reading.row(item, sample, False, f"{item.uid}/{i}") for i, (item, sample) in known.items()]
        stream = PromptStream(
            rows, tokenizer, chat=reading.chat, chat_options=reading.chat_options, shuffle=False
        )
        batch = reading.batch(stream.take(len(rows)), tokenizer)
        room = self.model.max_positions
        fits = [at for at, length in enumerate(batch.lengths.tolist()) if room is None or length <= room]
        places = list(known)
        if fits:
            for at, value in zip(fits, self.of_rows(batch.select(fits)), strict=True):
                scores[places[at]] = value
        return scores
