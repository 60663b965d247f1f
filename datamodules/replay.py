"""Old answers of the student, for the discriminator to keep in mind what it has seen.

A discriminator that sees only the newest student forgets how to tell older ones, and the game goes in circles. Replay
mixes some of their answers into *its* batches; the policy never trains on them. First in, first out, plain values only,
and which items are drawn is computed from a key, so that a resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_onpolicy.datamodules.seeds import derive_seed
from lightning_onpolicy.datamodules.shuffle import Permutation

Item = Mapping[str, Any]
_PLAIN = (str, int, float, bool, type(None))


class ReplayBuffer:
    """The newest ``capacity`` items ever added.

    An item is whatever the discriminator needs to score an answer: prompt, the teacher's answer to it, the student's,
    how that ended. It consists of strings, numbers, lists and dicts; it is copied on its way in and on its way out.

    Args:
        capacity: Items kept; adding more drops the oldest.
        share: Part of a batch that :meth:`mix` replaces by old items, in [0, 1).
        seed: Chooses which.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> buffer = ReplayBuffer(capacity=100, share=0.5)
        >>> buffer.add([{"text": "old"}])
        >>> sorted(item["text"] for item in buffer.mix([{"text": "new"}, {"text": "new"}], number=7))
        ['new', 'old']
    """

    def __init__(self, capacity: int, share: float = 0.5, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"replay.capacity must be >= 1, got {capacity}.")
        if not 0 <= share < 1:
            raise ValueError(
                f"replay.share must be in [0, 1), got {share}: some of the batch has to be fresh."
            )
        self.capacity, self.share, self.seed = capacity, share, seed
        self._items: deque[dict[str, Any]] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, items: Sequence[Item]) -> None:
        """Take up items; do so *after* a batch was mixed, or it meets itself.

        Raises:
            TypeError: If an item holds anything but plain values.
        """
        self._items.extend([_plain(dict(item), "item") for item in items])

    def sample(self, n: int, number: int) -> list[dict[str, Any]]:
        """``n`` different items, or all if there are fewer.

        Args:
            n: How many.
            number: Of the draw; equal numbers draw equally from an equal buffer.
        """
        if not self._items or n < 1:
            return []
        order = Permutation(len(self._items), key=(self.seed, number))
        chosen = [order(i) for i in range(min(n, len(self._items)))]
        held = list(self._items)
        return [_plain(held[i], "item") for i in chosen]

    def mix(self, fresh: Sequence[Item], number: int) -> list[dict[str, Any]]:
        """As many items as came in, of which ``share`` are old: rounded up as often as makes that right on average, and
        fewer while there are not enough.

        Args:
            fresh: The batch; it is not changed.
            number: Of the draw.
        """
        wanted = self.share * len(fresh)
        more = derive_seed("replay", self.seed, number) / 2**63 < wanted - int(wanted)
        old = self.sample(int(wanted) + more, number)
        out = [_plain(dict(item), "item") for item in fresh]
        if old:
            order = Permutation(len(fresh), key=(self.seed, number, 1))
            for i, item in enumerate(old):
                out[order(i)] = item
        return out

    def state_dict(self) -> dict[str, Any]:
        """Every item, oldest first."""
        return {"items": [_plain(item, "item") for item in self._items]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up items in place of what is held; of too many, the newest."""
        self._items.clear()
        self.add(state["items"])


def _plain(value: Any, where: str) -> Any:
    """A copy that shares nothing that could change; a tensor would hold a device, or a graph."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_plain(x, f"{where}[{i}]") for i, x in enumerate(value)]
    if isinstance(value, dict):
        return {key: _plain(x, f"{where}[{key!r}]") for key, x in value.items()}
    raise TypeError(
        f"{where} is a {type(value).__name__}: a replay buffer holds strings, numbers, lists and dicts."
    )
