"""One request over the wire with the official client, which must not retry: the only retry layer is in ``run.py``.

The key is read from the environment and handed to the client, nowhere else. Whatever comes back is cleaned of it before
anybody sees it: a server may echo a key in its errors.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from lightning_onpolicy.datamodules.collect.faults import Fault, fault_of_status
from lightning_onpolicy.datamodules.collect.settings import check_variable

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECRET_LENGTH = 16  # local servers take any word as key, e.g. EMPTY; an answer may well contain that word
CLEANED = "[API key]"
# Raised before anything was sent. By name, because the transport (httpx2, or httpx in older versions of the client) is
# the client's own affair.
UNSENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")


def openai() -> ModuleType:
    """The official client, imported on first use.

    Raises:
        ImportError: If it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ImportError(
            "onpolicy collect needs the official client: pip install 'lightning-onpolicy[collect]'."
        ) from error


def read_key(variable: str, base_url: str) -> str:
    """The API key from the environment, without blanks around it; a server on loopback may do without.

    Raises:
        ValueError: If it is not set, or no header can carry it; the message names the variable, unless that looks like
            a key.
    """
    check_variable(variable)
    key = os.environ.get(variable, "").strip()
    named = f" {variable}" if key or re.fullmatch("[A-Z_][A-Z0-9_]{0,39}", variable) else ""
    if not key and urlsplit(base_url).hostname not in LOOPBACK:
        raise ValueError(
            f"the environment variable{named} (api_key_env) holds no API key. If the server wants none, set it to any "
            "word."
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"the environment variable{named} (api_key_env) holds line breaks or characters outside ASCII, which no "
            "API key has: set it anew."
        )
    return key or "none"


@dataclass(frozen=True)
class Reply:
    """A response of status 2xx whose body is JSON.

    Args:
        body: The parsed body.
        request_id: The server's name for the request.
    """

    body: Any
    request_id: str | None


class Client:
    """Sends requests one by one; belongs to the event loop that first uses it.

    Args:
        base_url: Where the API is served.
        key: The API key.
        timeout_s: Seconds that one request may take in all.
    """

    def __init__(self, base_url: str, key: str, timeout_s: float) -> None:
        self._openai = openai()
        self._key, self._timeout_s = key, timeout_s
        self._client = self._openai.AsyncOpenAI(
            api_key=key,
            base_url=base_url,
            timeout=timeout_s,
            max_retries=0,  # the client's own layer stays off: two layers would multiply
        )

    async def ask(self, body: Mapping[str, Any]) -> Reply | Fault:
        """Send one request, once.

        Args:
            body: The body of a chat completion's request.
        """
        try:
            # The client's timeout bounds the wait for the next byte, this one the whole request.
            async with asyncio.timeout(self._timeout_s):
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=body["model"], messages=list(body["messages"]), extra_body=dict(body)
                )
                text = raw.http_response.text
                headers = raw.http_response.headers
        except (TimeoutError, self._openai.APITimeoutError) as error:
            kind = "unreachable" if _cause(error) in UNSENT else "timeout"
            return Fault(kind, f"no whole answer within {self._timeout_s:g} s")
        except self._openai.APIStatusError as error:
            response = error.response
            message = f"HTTP {response.status_code}: {self.clean(response.text).strip()[:500]}"
            lower = {name.lower(): value for name, value in response.headers.items()}
            return fault_of_status(response.status_code, _json(response.text), lower, message, time.time())
        except self._openai.APIConnectionError as error:
            cause = _cause(error)
            return Fault(
                "unreachable" if cause in UNSENT else "cut", self.clean(f"{cause}: {error.__cause__}")
            )
        parsed = _json(text)
        if parsed is None:
            return Fault("malformed", f"not JSON: {self.clean(text)[:200]!r}")
        if len(self._key) >= SECRET_LENGTH:
            parsed = self._without_key(parsed)
        elif isinstance(parsed, Mapping) and parsed.get("error"):  # no answer, but something to tell people
            parsed = {**parsed, "error": self._without_key(parsed["error"])}
        request_id = headers.get("x-request-id")
        return Reply(parsed, None if request_id is None else self.clean(request_id))

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    def _without_key(self, value: Any) -> Any:
        """The parsed JSON with its texts cleaned."""
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, Mapping):
            return {self.clean(key): self._without_key(part) for key, part in value.items()}
        return [self._without_key(part) for part in value] if isinstance(value, list) else value

    def clean(self, text: str) -> str:
        """The text without the key, also where its slashes are escaped. To be cut afterwards: half a key is one too."""
        if self._key == "none":
            return text
        return text.replace(self._key, CLEANED).replace(self._key.replace("/", "\\/"), CLEANED)


def _cause(error: BaseException) -> str:
    return type(error.__cause__).__name__


def _json(text: str) -> Any:
    """The parsed text; None if it is not JSON (a body that says ``null`` is no answer either)."""
    try:
        return json.loads(text)
    except ValueError:
        return None
