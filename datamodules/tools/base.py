"""What an environment is: transcripts of unfinished responses in, one observation (or the end) per transcript out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from lightning_onpolicy.datamodules.batch import FinishReason, Prompt

Role = Literal["assistant", "tool"]


class ToolError(Exception):
    """What a tool raises where its caller, the model, is at fault; the model gets to read the message.

    Any other exception is ours and ends the run.
    """


class Tool(ABC):
    """From the text of a call to the answer. An ordinary function does as well; a class can be named in YAML."""

    @abstractmethod
    def __call__(self, call: str) -> str:
        """The answer.

        Raises:
            ToolError: If the call makes no sense.
        """


@dataclass(frozen=True)
class Observation:
    """What the policy reads before it goes on.

    Args:
        text: What the tool says; names of special tokens in it are ordinary text. Empty: nothing to read, go on.
        before: Put before it, e.g. the head of a chat turn; special tokens count as such.
        after: Put behind it, likewise.
    """

    text: str = ""
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Segment:
    """A part of a response by one author.

    Args:
        role: ``assistant`` (the policy) or ``tool``.
        text: Decoded, without special tokens.
    """

    role: Role
    text: str


@dataclass(frozen=True)
class Transcript:
    """A response so far.

    Args:
        prompt: What it answers; its row may hold what an environment needs.
        segments: Alternating; the last one is the policy's.
        said: What the policy wrote in the turn that just ended: all or the end of the last segment.
        finish: Why the turn ended: ``eos`` or ``stop``.
    """

    prompt: Prompt
    segments: tuple[Segment, ...]
    said: str
    finish: FinishReason


@runtime_checkable
class Environment(Protocol):
    """Answers the policy; without a memory of its own: all it needs to know is in the transcript.

    Args:
        stop: Strings that end a turn, as ``sampling.stop`` ends a response.
        max_turns: Most turns of the policy per response, without those that an empty observation answered; one that
            would need more is cut.
        max_context: Most tokens of prompt and response together; None: as many as the model takes.
    """

    stop: tuple[str, ...]
    max_turns: int
    max_context: int | None

    def observe(self, transcripts: Sequence[Transcript]) -> list[Observation | None]:
        """What each response reads next; None where it has ended.

        What the policy wrote is hostile text: it is parsed, never evaluated.
        """
        ...
