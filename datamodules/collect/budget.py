"""What requests can cost, and a cap that none of them can break.

Before a request is sent, its worst case is reserved; once its usage is known, the reservation becomes what it did cost.
A request goes out only if everything spent, everything reserved and its own worst case fit the cap together.

The worst case of a prompt is one token per UTF-8 byte (no byte-level or byte-fallback tokenizer makes more), 16 for
each message's frame, and 128 for what a chat template adds by itself; that of an answer is the limit sent with the
request. What else a message has (tool calls, parts) and what else the request has (``extra_body``: tools, a response's
format) may be rendered into the prompt too, and counts by the bytes of its JSON at its longest, indented and escaped.
For estimates, four bytes are taken for a token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FRAME_TOKENS = 16
TEMPLATE_TOKENS = 128
BYTES_PER_TOKEN = 4
ROUNDING = 1e-9  # sums of floats; a millionth of the smallest price that anybody bills


@dataclass(frozen=True)
class Charge:
    """What something costs, in both units that can be capped.

    Args:
        tokens: Prompt and answer tokens.
        cost: In the currency of the prices; 0 without prices.
    """

    tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class Prices:
    """Prices per million tokens; None = unknown.

    Args:
        per_prompt: Of prompt tokens.
        per_answer: Of answered tokens.
    """

    per_prompt: float | None = None
    per_answer: float | None = None

    def charge(self, tokens_in: int, tokens_out: int) -> Charge:
        """What these tokens cost; discounts for cached prompts are not reckoned with.

        Example:
            >>> Prices(2.0, 10.0).charge(1_000_000, 500_000)
            Charge(tokens=1500000, cost=7.0)
        """
        cost = (tokens_in * (self.per_prompt or 0.0) + tokens_out * (self.per_answer or 0.0)) / 1e6
        return Charge(tokens_in + tokens_out, cost)


def most_prompt_tokens(messages: Sequence[Mapping[str, Any]], extra: int = 0) -> int:
    """The worst case of a prompt, in tokens: see the head of this module.

    Args:
        messages: The conversation.
        extra: Bytes of what else the request has, from :func:`json_bytes`.
    """
    return TEMPLATE_TOKENS + len(messages) * FRAME_TOKENS + _bytes(messages) + extra


def likely_prompt_tokens(messages: Sequence[Mapping[str, Any]], extra: int = 0) -> int:
    """The estimate for a prompt, in tokens: see the head of this module.

    Args:
        messages: The conversation.
        extra: Bytes of what else the request has, from :func:`json_bytes`.
    """
    return len(messages) * FRAME_TOKENS // 2 + -(-(_bytes(messages) + extra) // BYTES_PER_TOKEN)


def json_bytes(value: Mapping[str, Any] | None) -> int:
    """Bytes of its longest JSON: templates indent it, servers escape it."""
    return len(json.dumps(value, indent=4, default=str)) if value else 0


def _bytes(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(_message_bytes(message) for message in messages)


def _message_bytes(message: Mapping[str, Any]) -> int:
    content = message["content"]
    plain = len(content.encode("utf-8", "backslashreplace")) if isinstance(content, str) else 0
    written = ("role", "content") if isinstance(content, str) else ("role",)
    return plain + json_bytes({key: value for key, value in message.items() if key not in written})


class Budget:
    """Spent, reserved and what is left, in tokens and in money.

    Args:
        spent: What was spent before.
        max_tokens: Cap on tokens; None = no cap.
        max_cost: Cap on money; None = no cap.
    """

    def __init__(self, spent: Charge, max_tokens: int | None = None, max_cost: float | None = None) -> None:
        self.spent, self.max_tokens, self.max_cost = spent, max_tokens, max_cost
        self.overrun = Charge()  # by how much a single request exceeded its worst case at most
        self._reserved: dict[int, Charge] = {}

    @property
    def in_flight(self) -> int:
        """Number of reservations."""
        return len(self._reserved)

    def fits(self, worst: Charge) -> bool:
        """Whether a request with this worst case could break no cap."""
        total = total_of([self.spent, worst, *self._reserved.values()])
        return (self.max_tokens is None or total.tokens <= self.max_tokens) and (
            self.max_cost is None or total.cost <= self.max_cost + ROUNDING
        )

    def reserve(self, request: int, worst: Charge) -> None:
        """Set the worst case of a request aside.

        Raises:
            RuntimeError: If it does not fit.
        """
        if not self.fits(worst):
            raise RuntimeError("a request was about to be sent that could exceed the cap.")
        self._reserved[request] = worst

    def settle(self, request: int, actual: Charge) -> None:
        """Replace the reservation of a request by what it cost."""
        worst = self._reserved.pop(request)
        self.spent = total_of([self.spent, actual])
        over = Charge(actual.tokens - worst.tokens, actual.cost - worst.cost)
        self.overrun = Charge(max(self.overrun.tokens, over.tokens), max(self.overrun.cost, over.cost))


def total_of(charges: Iterable[Charge]) -> Charge:
    """The sum."""
    charges = list(charges)
    return Charge(sum(c.tokens for c in charges), sum(c.cost for c in charges))
