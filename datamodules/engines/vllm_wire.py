"""The few routes of a vLLM server that a trainer needs, over plain HTTP (vLLM 0.32 and later; never imported)."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm"
)


class VLLMWire:
    """Requests to one server.

    Args:
        base_url: Its address, without a path: ``http://127.0.0.1:8000``.
        timeout_s: Seconds that one request may take.
        key: Sent as a bearer token.
    """

    def __init__(self, base_url: str, timeout_s: float, key: str | None = None) -> None:
        self.base_url, self.timeout_s = base_url.rstrip("/").removesuffix("/v1"), timeout_s
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"

    def ask(self, route: str, body: dict[str, Any] | None = None) -> Any:
        """A route's answer: POST with a body, GET without one.

        Raises:
            RuntimeError: If the server cannot be reached or answers with an error; the message says what it said.
            TimeoutError: If there is no answer in time.
        """
        url, data = self.base_url + route, None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, data, self._headers), timeout=self.timeout_s
            ) as reply:
                text = reply.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode("utf-8", "replace").strip()
            hint = f" Start it with: {COMMAND}" if error.code == 404 else ""
            raise RuntimeError(f"{url} answered {error.code}: {said or error.reason}.{hint}") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise TimeoutError(f"{url} did not answer within timeout_s={self.timeout_s:g}.") from None
            raise RuntimeError(f"{url} cannot be asked ({reason}). Is the server there?") from None

    def check(self) -> str:
        """Refuse a server whose weights cannot be replaced, or whose log-probabilities are of another distribution.

        Returns:
            The type of its weights, as ``torch.bfloat16``.

        Raises:
            RuntimeError: If it cannot be reached, or lacks the routes.
            ValueError: If it does not report processed log-probabilities.
        """
        model = self.ask("/server_info?config_format=json")["vllm_config"]["model_config"]
        mode = model.get("logprobs_mode")
        if mode != "processed_logprobs":
            raise ValueError(
                f"{self.base_url} reports {mode}, the log-probabilities before temperature and filters, with which "
                f"importance weights would be silently wrong. Start it with: {COMMAND}"
            )
        return str(model.get("dtype"))

    def reload(self, folder: str) -> None:
        """Replace its weights by those in a folder that it sees, and forget what it has cached under the old ones.

        Raises:
            RuntimeError: If it cannot.
        """
        order = {"method": "reload_weights", "kwargs": {"weights_path": folder}, "timeout": self.timeout_s}
        self.ask("/collective_rpc", order)
        done = self.ask("/reset_prefix_cache", {})
        if isinstance(done, dict) and not done.get("success", True):
            raise RuntimeError(
                f"{self.base_url} did not clear its prefix cache, which holds values of the weights before: is "
                "somebody else sampling there?"
            )
