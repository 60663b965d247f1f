"""Transcripts to start from: what the policy should write is scripted, what it reads is what the environment says."""

from __future__ import annotations

from typing import Any

from lightning_onpolicy.datamodules.batch import Prompt
from lightning_onpolicy.datamodules.rows import Row, Source
from lightning_onpolicy.datamodules.tools.base import Environment, Segment, Transcript


class DemonstrationSource(Source):
    """Another source's rows with a scripted response of several turns, for supervised training.

    A row's ``response`` is then a list of ``{"role": "assistant" | "tool", "content": …}``; the tool's parts are not
    trained on.

    Args:
        source: The rows.
        environment: Answers each turn but the last; it must be the one of the training to come.
        turns: What the policy says, turn by turn: Jinja templates over the row, e.g.
            ``["<<{{ metadata.expression }}=", "{{ answer }}"]``.

    Raises:
        ValueError: If there is no turn, a template is malformed or, when a row is read, names what the row lacks, or
            the environment ends the response before its last turn.
    """

    def __init__(self, source: Source, environment: Environment, turns: list[str]) -> None:
        import jinja2.sandbox

        if not turns:
            raise ValueError("DemonstrationSource.turns is empty: say what the policy should write.")
        jinja = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined)
        try:
            self._turns = [jinja.from_string(text) for text in turns]
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"DemonstrationSource.turns: {error} in {turns!r}.") from error
        self.source, self.environment = source, environment
        self.name = getattr(source, "name", "demonstrations")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row:
        import jinja2

        row = dict(self.source[index])
        try:
            said = [turn.render(row) for turn in self._turns]
        except jinja2.UndefinedError as error:
            raise ValueError(f"DemonstrationSource.turns, row {index}: {error}.") from error
        prompt = Prompt(
            (), str(row.get("prompt", "")), row, str(row.get("uid", "")), str(row.get("source", ""))
        )
        segments: list[Segment] = []
        response: list[dict[str, Any]] = []
        for number, text in enumerate(said, 1):
            segments.append(Segment("assistant", text))
            response.append({"role": "assistant", "content": text})
            if number == len(said):
                break
            [heard] = self.environment.observe([Transcript(prompt, tuple(segments), text, "stop")])
            if heard is None:
                raise ValueError(
                    f"row {index}: the environment ends the response at turn {number}, {text!r:.80}."
                )
            segments.append(Segment("tool", heard.before + heard.text + heard.after))
            response.append(
                {"role": "tool", "content": heard.text, "before": heard.before, "after": heard.after}
            )
        return {**row, "response": response}
