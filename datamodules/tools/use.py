"""Tools called inside the text: ``<<12*7=`` is answered by ``84>>``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_onpolicy.datamodules.tools.base import Environment, Observation, Tool, ToolError, Transcript


@dataclass(frozen=True)
class InlineTool:
    """A tool and the marks that call it. The defaults are GSM8K's calculator annotations (arXiv 2110.14168).

    Args:
        tool: From the text between the marks to the answer: a :class:`Tool` or, in YAML, the import path of a
            function. What the model wrote is hostile: no tool may evaluate it in this process. It raises
            :class:`ToolError` where the model is at fault, which then reads ``error: …``; other exceptions end the
            run.
        opens: Begins a call.
        closes: Ends it, and the policy's turn.
        before: Put before the answer; special tokens count as such.
        after: Put behind the answer.
        max_chars: Longer answers are cut there, and end in ``[cut]``.

    Raises:
        ValueError: If a mark is empty, or the marks are the same.
    """

    tool: Tool | Callable[[str], str]
    opens: str = "<<"
    closes: str = "="
    before: str = ""
    after: str = ">>"
    max_chars: int = 256

    def __post_init__(self) -> None:
        if not self.opens or not self.closes or self.opens == self.closes:
            raise ValueError(
                f"a tool's opens and closes must be two different strings, got {self.opens!r} and {self.closes!r}."
            )
        if self.max_chars < 1:
            raise ValueError(f"a tool's max_chars must be >= 1, got {self.max_chars}.")

    def answer(self, call: str) -> Observation:
        """What the policy reads after this call.

        Raises:
            TypeError: If the tool does not return a string.
        """
        try:
            text = self.tool(call)
        except ToolError as error:
            text = f"error: {error}"
        if not isinstance(text, str):
            raise TypeError(f"tool {self.tool!r} returned a {type(text).__name__}, not a string.")
        if len(text) > self.max_chars:
            text = text[: self.max_chars] + "[cut]"
        return Observation(text, self.before, self.after)


class ToolUse(Environment):
    """Answers every call in the policy's text; a response without an open call goes on or ends as it likes.

    Args:
        tools: The tools. Where several could have been called, it is the one that was opened last.
        max_turns: Most turns of the policy per response: its calls and one. A closing mark that closed no call ends
            no turn.
        max_context: Most tokens of prompt and response together; null: as many as the model takes.

    Raises:
        ValueError: If there is no tool.

    Example:
        >>> from lightning_onpolicy.datamodules.tools import Calculator
        >>> ToolUse([InlineTool(Calculator())]).called("That makes <<12*7=")
        Observation(text='84', before='', after='>>')
    """

    def __init__(self, tools: list[InlineTool], max_turns: int = 4, max_context: int | None = None) -> None:
        if not tools:
            raise ValueError("ToolUse needs a tool.")
        self.tools = tools
        self.stop = tuple(dict.fromkeys(tool.closes for tool in tools))
        self.max_turns, self.max_context = max_turns, max_context

    def observe(self, transcripts: Sequence[Transcript]) -> list[Observation | None]:
        """Answers to the calls; an empty observation where a closing mark closed nothing."""
        return [
            None if t.finish != "stop" else self.called(t.segments[-1].text) or Observation()
            for t in transcripts
        ]

    def called(self, text: str) -> Observation | None:
        """The answer to the call that ends the text, if one does."""
        start, tool = max(((text.rfind(tool.opens), tool) for tool in self.tools), key=lambda found: found[0])
        call, closed, _ = text[start + len(tool.opens) :].partition(tool.closes)
        return tool.answer(call.strip()) if start >= 0 and closed else None
