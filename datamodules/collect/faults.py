"""What can go wrong with a request, and what follows from it: send it again, give its row up, or stop.

| kind | what happened | again | stops the run | may have been billed |
|---|---|---|---|---|
| ``unreachable`` | no connection: nothing was sent | yes | | |
| ``throttled`` | 429, or 503 with Retry-After | yes | | |
| ``server_error`` | 5xx, 408, 409, or an error in place of an answer | yes | | yes |
| ``timeout`` | no whole answer in time | yes | | yes |
| ``cut`` | the connection broke before the answer was whole | yes | | yes |
| ``malformed`` | an answer that is not JSON, or has another shape | yes | | yes |
| ``no_choices`` | an answer with an empty list of choices | yes | | yes |
| ``rejected`` | another 4xx: this request is not accepted | | | |
| ``content_filter`` | 4xx: the prompt is refused for its content | | | |
| ``unauthorised`` | 401: the key is not accepted | | yes | |
| ``not_found`` | 404: no such model or address | | yes | |
| ``no_credit`` | 402, or 429 that says the quota is used up | | yes | |

What may have been billed counts towards the cap at its worst case. Nothing here knows the client.
"""

from __future__ import annotations

import email.utils
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AGAIN = frozenset("unreachable throttled server_error timeout cut malformed no_choices".split())
STOPS = frozenset("unauthorised not_found no_credit".split())
MAYBE_BILLED = frozenset("server_error timeout cut malformed no_choices".split())
KINDS = AGAIN | STOPS | {"rejected", "content_filter"}

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
LONGEST_RETRY_AFTER_S = 3600.0
NO_CREDIT = frozenset("insufficient_quota billing_hard_limit_reached billing_not_active".split())


@dataclass(frozen=True)
class Fault:
    """Why there is no answer.

    Args:
        kind: One of :data:`KINDS`.
        message: What the server or the connection said, without secrets.
        retry_after_s: Seconds that the server asks to wait; None = it does not say.

    Raises:
        ValueError: If the kind is unknown.
    """

    kind: str
    message: str
    retry_after_s: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of fault {self.kind!r}; known are {sorted(KINDS)}.")


def fault_of_status(status: int, body: Any, headers: Mapping[str, str], message: str, now: float) -> Fault:
    """The fault behind an HTTP status that is no success.

    Args:
        status: The status.
        body: The parsed body, if it is JSON.
        headers: The response's headers, names in lower case.
        message: What to tell people.
        now: Unix time, for ``Retry-After`` as a date.
    """
    error = body.get("error", body) if isinstance(body, Mapping) else {}
    said = {str(error.get(key)) for key in ("code", "type")} if isinstance(error, Mapping) else set()
    wait = retry_after(headers, now)
    if status == 402 or (status == 429 and said & NO_CREDIT):
        return Fault("no_credit", message)
    if status == 429 or (status == 503 and wait is not None):
        if wait is not None and wait > LONGEST_RETRY_AFTER_S:
            return Fault("no_credit", f"{message} (and asks to wait {wait:.0f} s)")
        return Fault("throttled", message, wait)
    if status >= 500 or status in (408, 409):
        return Fault("server_error", message, wait)
    if "content_filter" in said or "content_policy_violation" in said:
        return Fault("content_filter", message)
    return Fault({401: "unauthorised", 404: "not_found"}.get(status, "rejected"), message)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that ``retry-after-ms`` or ``retry-after`` (a number or a date) asks for; None if neither is usable.

    Example:
        >>> retry_after({"retry-after": "2.5"}, now=0.0)
        2.5
        >>> retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=50.0)
        10.0
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        try:
            seconds = float(text) / unit
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - now)


def wait_before(attempt: int, fault: Fault, jitter: float) -> float:
    """Seconds before the next attempt.

    Args:
        attempt: How many attempts were made, from 1 on.
        fault: What became of the last one; its ``retry_after_s`` is kept to.
        jitter: In [0, 1); spreads requests that failed together over a quarter of the wait.
    """
    if fault.retry_after_s is not None:
        return fault.retry_after_s + FIRST_WAIT_S * jitter
    return min(FIRST_WAIT_S * 2.0 ** (attempt - 1), LONGEST_WAIT_S) * (1 + jitter / 4)
