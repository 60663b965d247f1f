"""The reward of programs: unit tests in a sandbox."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.cases import Case, cases_of
from lightning_onpolicy.datamodules.rewards.code_worker import Setting
from lightning_onpolicy.datamodules.rewards.sandbox import Sandbox
from lightning_onpolicy.datamodules.rewards.sandbox_process import START_S, STOP_S, Limits
from lightning_onpolicy.datamodules.rewards.workers import WorkerPool

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Group, Prompt


class CodeReward(Reward):
    """Scores the last fenced Python block of a response by the unit tests of its prompt's row.

    The row's ``tests`` is a list (or the same as JSON text) of ``{"stdin": text, "stdout": text}``, compared by the
    words of each line, and of ``{"function": name, "args": list, "expected": value}``, compared as JSON values of
    exactly equal types, floats to nine digits; ``Class.method`` is called on ``Class()``. Programs have the standard
    library only. A response without a closed block scores 0; a test that ends with an error, writes too
    much or runs out of time is failed; None is for what the sandbox itself could not do.

    Each test runs in a process of its own behind the strongest wall of this machine (``Sandbox``; the log names it and
    what it does not stop). Expected outputs stay outside and are compared there.

    Args:
        partial: Score the fraction of tests passed. Without it, 1 if all passed and else 0, and the first test that
            fails is the last to run.
        workers: Programs tested at a time.
        deadline_s: Seconds one test may take, on the clock and of CPU time.
        total_s: Seconds all tests of one program may take; those that did not start by then are failed.
        overtime: What a program that takes longer gets: ``share`` of the tests it passed, or ``zero`` (ProRL).
        languages: Tags of the blocks to consider; an empty one admits blocks without a tag.
        tier: Sandbox tier: ``"auto"``, ``"bubblewrap"`` or ``"subprocess"``.
        minimum_tier: Refuse to start with less than this.
        memory_bytes: Address space of each process of a program.
        output_bytes: Most that a test may write to standard output, or return as JSON.
        processes: Processes and threads that a program may have at a time.

    Raises:
        TierError: If this machine does not offer the tier; the message says what to install or enable.

    Example:
        >>> from lightning_onpolicy.datamodules import Completion, Group, Prompt
        >>> import torch
        >>> row = {"tests": [{"stdin": "2", "stdout": "4"}, {"stdin": "3", "stdout": "9"}]}
        >>> texts = ["```python\\nprint(int(input()) ** 2)\\n```", "```python\\nprint(4)\\n```", "four"]
        >>> group = Group(
        ...     Prompt((1,), "Square the number.", row),
        ...     tuple(Completion(torch.tensor([1]), torch.zeros(1), "eos", text=text) for text in texts),
        ... )
        >>> reward = CodeReward(workers=1)
        >>> reward.score([group])
        [[1.0, 0.5, 0.0]]
        >>> reward.close()
    """

    concurrent = True

    def __init__(
        self,
        partial: bool = True,
        workers: int = 2,
        deadline_s: float = 5.0,
        total_s: float = 15.0,
        languages: Sequence[str] = ("python", "py", "python3"),
        tier: str = "auto",
        minimum_tier: str = "subprocess",
        memory_bytes: int = 512 * 2**20,
        output_bytes: int = 2**20,
        processes: int = 16,
        overtime: Literal["share", "zero"] = "share",
    ) -> None:
        if overtime not in ("share", "zero"):
            raise ValueError(f"overtime must be share or zero, got {overtime!r}.")
        if not total_s > 0:
            raise ValueError(f"total_s must be positive, got {total_s!r}.")
        limits = Limits(
            wall_s=deadline_s, memory_bytes=memory_bytes, output_bytes=output_bytes, processes=processes
        )
        self.languages = frozenset(tag.lower() for tag in languages)
        self.sandbox = Sandbox(tier, minimum_tier, limits)
        self.setting = Setting(self.sandbox.wall, limits, total_s, partial, overtime == "zero")
        self.pool = WorkerPool(
            "lightning_onpolicy.datamodules.rewards.code_worker:score",
            workers=workers,
            # Only for a worker that is stuck itself: the last test may start just before total_s, in a new sandbox.
            deadline_s=total_s + deadline_s + START_S + 2 * STOP_S,
            memory_bytes=max(2 * 2**30, 2 * memory_bytes),
            chunk=1,
        )

    @property
    def failures(self) -> Counter[str]:
        """Programs that could not be scored so far, by reason."""
        return self.pool.failures

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion; None where the sandbox failed.

        Raises:
            ValueError: If a row's ``tests`` are missing or have another form; the message names the prompt.
        """
        scores: list[list[float | None]] = [[0.0] * len(group.completions) for group in groups]
        places, items = [], []
        for g, group in enumerate(groups):
            cases = _cases(group.prompt)
            for c, completion in enumerate(group.completions):
                source = last_block(completion.text, self.languages)
                if source is not None:
                    places.append((g, c))
                    items.append((self.setting, source, cases))
        for (g, c), score in zip(places, self.pool.map(items), strict=True):
            scores[g][c] = score
        return scores

    def close(self) -> None:
        """End the worker processes."""
        self.pool.close()


def last_block(text: str, languages: frozenset[str]) -> str | None:
    """The last closed fenced block (CommonMark) whose tag is one of ``languages``, or None.

    Example:
        >>> last_block("```py\\na = 1\\n```\\nthen\\n```json\\n{}\\n```", frozenset({"py"}))
        'a = 1\\n'
    """
    found, fence, tag = None, "", ""
    body: list[str] = []
    for line in text.split("\n"):
        marks, info = _fence(line)
        if not fence:
            fence, tag, body = marks, (info.split() or [""])[0].lower(), []
        elif marks.startswith(fence) and not info:
            if tag in languages:
                found = "".join(part + "\n" for part in body)
            fence = ""
        else:
            body.append(line)
    return found


def _fence(line: str) -> tuple[str, str]:
    """The marks of a fence and what follows them; two empty strings for any other line."""
    inner = line.lstrip(" ")
    info = inner.lstrip(inner[:1])
    marks = inner[: len(inner) - len(info)]
    if (
        len(line) - len(inner) > 3
        or len(marks) < 3
        or marks[0] not in "`~"
        or (marks[0] == "`" and "`" in info)
    ):
        return "", ""
    return marks, info.strip()


def _cases(prompt: Prompt) -> list[Case]:
    try:
        return cases_of(prompt.row)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.uid!r}: {error}") from error
