"""One response in the making: what the policy wrote and what it read, in the order the model saw it.

Legend: ``L`` tokens of the response so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_onpolicy.datamodules.batch import Completion, FinishReason, Prompt
from lightning_onpolicy.datamodules.tools.base import Transcript
from lightning_onpolicy.datamodules.tools.tokens import segments_of


class Draft:
    """Grows by turns (:meth:`say`) and observations (:meth:`read`).

    Args:
        prompt: What it answers.
        tokenizer: Decodes it for the environment.
    """

    def __init__(self, prompt: Prompt, tokenizer: Any) -> None:
        self.prompt, self.tokenizer = prompt, tokenizer
        self.context = list(prompt.ids)  # what the model sees: prompt and response
        self.logprobs: list[float] = []  # [L]
        self.written: list[bool] = []  # [L]
        self.finish: FinishReason = "length"
        self.version = 0
        self.answers = 0  # observations it read that said something
        self._turn = 0  # tokens of the last turn

    @property
    def response(self) -> list[int]:
        """``[L]`` token ids."""
        return self.context[len(self.prompt.ids) :]

    @property
    def used(self) -> int:
        """Tokens the policy wrote."""
        return sum(self.written)

    def say(self, turn: Completion) -> None:
        """Append what the policy wrote; the oldest weights that wrote any of it are the response's version."""
        self.version = min(self.version, turn.version) if self.written else turn.version
        self._append(turn.ids.tolist(), turn.logprobs.tolist(), written=True)
        self._turn, self.finish = len(turn.ids), turn.finish

    def read(self, ids: Sequence[int]) -> None:
        """Append an observation."""
        self.answers += bool(ids)
        self._append(ids, [0.0] * len(ids), written=False)

    def _append(self, ids: Sequence[int], logprobs: Sequence[float], written: bool) -> None:
        self.context += ids
        self.logprobs += logprobs
        self.written += [written] * len(ids)

    def has_ended(self, stop: Sequence[str]) -> bool:
        """Whether it was cut, or says a stop string of the sampling, which is no environment's to answer.

        Such a string may stand across two turns, which the engine, seeing one at a time, cannot know.
        """
        if self.finish == "length" or not stop:
            return self.finish == "length"
        last = segments_of(self.response, self.written, self.tokenizer, special=True)[-1].text
        return any(s in last for s in stop)

    def transcript(self) -> Transcript:
        """What the environment gets to see."""
        said = self.tokenizer.decode(self.context[-self._turn :], skip_special_tokens=True)
        segments = segments_of(self.response, self.written, self.tokenizer)
        return Transcript(self.prompt, tuple(segments), said, self.finish)

    def completion(self) -> Completion:
        """The response as every part of the library takes it; one turn alone is an ordinary completion."""
        return Completion(
            torch.tensor(self.response, dtype=torch.long),
            torch.tensor(self.logprobs, dtype=torch.float32),
            self.finish,
            self.version,
            written=None if all(self.written) else torch.tensor(self.written),
        )
