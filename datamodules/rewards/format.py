"""The reward of a format: tags, each once and in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_onpolicy.datamodules.rewards.base import Reward

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Group


class TagReward(Reward):
    """1 where the response has each tag's ``<tag>…</tag>`` exactly once, in order and not nested; else 0.

    String searches in this process, linear in the text's length.

    Args:
        tags: Names of the tags, in order.
        opened: The prompt ends with the first tag's opening, as reasoning templates do: the response starts inside.
        exact: Nothing but white space may stand outside the tags.
        filled: Something other than white space must stand inside each.

    Raises:
        ValueError: If there is no tag, or a name is empty, repeated or has angle brackets.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> reward = TagReward(["think", "answer"])
        >>> texts = ["<think>1+1</think> <answer>2</answer>", "<answer>2</answer>"]
        >>> reward.score([group_of({}, *texts)])
        [[1.0, 0.0]]
    """

    concurrent = True

    def __init__(
        self,
        tags: Sequence[str] = ("think", "answer"),
        opened: bool = False,
        exact: bool = False,
        filled: bool = True,
    ) -> None:
        if not tags or len(set(tags)) < len(tags) or any(not t or set("<>/") & set(t) for t in tags):
            raise ValueError(f"tags must be different names without brackets, got {list(tags)!r}.")
        self.tags, self.opened, self.exact, self.filled = tuple(tags), opened, exact, filled

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion; every text can be scored."""
        return [[float(self.holds(c.text)) for c in group.completions] for group in groups]

    def holds(self, text: str) -> bool:
        """Whether a response keeps the format."""
        if self.opened:
            text = f"<{self.tags[0]}>{text}"
        place, outside = 0, []
        for tag in self.tags:
            start, end = f"<{tag}>", f"</{tag}>"
            if text.count(start) != 1 or text.count(end) != 1:
                return False
            first, last = text.index(start), text.index(end)
            if not place <= first < last or (self.filled and not text[first + len(start) : last].strip()):
                return False
            outside.append(text[place:first])
            place = last + len(end)
        return not self.exact or not "".join([*outside, text[place:]]).strip()
