"""A server that speaks as vLLM does on the routes that ``VLLMServerEngine`` asks, with a policy of ours inside."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.specs import ModelSpec


class FakeVLLM:
    """A context with a server at ``url``.

    Args:
        path: Folder of the model it starts with.
        logprobs_mode: What it reports.
        dev_mode: Whether the routes that replace weights are there.
        deaf_to: Parameters (parts of names) that keep their values when weights are replaced.
        token_ids: Whether replies hold them.
        delay_s: Seconds before every reply of a completion.
    """

    def __init__(
        self,
        path: str,
        *,
        logprobs_mode: str = "processed_logprobs",
        dev_mode: bool = True,
        deaf_to: str | None = None,
        token_ids: bool = True,
        delay_s: float = 0.0,
    ) -> None:
        self.policy: Policy = ModelSpec(path, dtype="float32").load()
        self.logprobs_mode, self.dev_mode, self.deaf_to = logprobs_mode, dev_mode, deaf_to
        self.token_ids, self.delay_s = token_ids, delay_s
        self.asked: list[dict[str, Any]] = []
        self.reloads: list[str] = []
        self.flushes = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.answer(self, None)

            def do_POST(self) -> None:
                fake.answer(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def log_message(self, *args: Any) -> None:
                """Nobody reads it."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # Waited for: a thread in native code at the end would abort the process.
        self._http.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FakeVLLM:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any] | None) -> None:
        """One request."""
        route = handler.path.partition("?")[0]
        status, reply = 200, None
        with self._lock:
            if route == "/v1/models":
                reply = {"data": [{"id": "served"}]}
            elif route == "/v1/completions":
                assert body is not None
                status, reply = self._complete(body)
            elif not self.dev_mode:
                status, reply = 404, {"detail": "Not Found"}
            elif route == "/server_info":
                model = {"logprobs_mode": self.logprobs_mode, "dtype": "torch.float32"}
                reply = {"vllm_config": {"model_config": model}}
            elif route == "/collective_rpc":
                assert body is not None and body["method"] == "reload_weights"
                self._reload(body["kwargs"]["weights_path"])
                reply = {"results": [None]}
            elif route == "/reset_prefix_cache":
                self.flushes += 1
                reply = {"success": True}
        data = json.dumps(reply).encode()
        with contextlib.suppress(BrokenPipeError):  # who asked waits no longer
            handler.send_response(status)
            handler.send_header("content-length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)

    def _reload(self, path: str) -> None:
        self.reloads.append(path)
        fresh = ModelSpec(path, dtype="float32").load()
        with torch.no_grad():
            for (name, old), new in zip(self.policy.named_parameters(), fresh.parameters(), strict=True):
                if self.deaf_to is None or self.deaf_to not in name:
                    old.copy_(new)

    def _complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append(body)
        time.sleep(self.delay_s)
        room = self.policy.max_positions
        if room is not None and len(body["prompt"]) + body["max_tokens"] > room:
            return 400, {"error": {"message": f"This model's maximum context length is {room} tokens."}}
        if body["n"] > 1 and body["temperature"] == 0:
            return 400, {"error": {"message": "n must be 1 when using greedy sampling."}}
        # A server takes what is not said from the model's generation config.
        assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1, 0, 0)
        assert body["skip_special_tokens"] is False
        own = set(self.policy.eos_token_ids)
        sampling = Sampling(
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            min_p=body["min_p"],
            max_new_tokens=body["max_tokens"],
            min_new_tokens=body["min_tokens"],
            stop_token_ids=tuple(i for i in body["stop_token_ids"] if i not in own),
            stop=tuple(body["stop"]),
        )
        [group] = TransformersEngine(self.policy).generate(
            [body["prompt"]], body["n"], sampling, body["seed"]
        )
        choices = []
        for index, drawn in enumerate(group):
            last = int(drawn.ids[-1])
            why: Any = None
            if drawn.finish == "stop":
                why = body["stop"][0]
            elif drawn.finish == "eos" and last not in own:
                why = last
            choice = {
                "index": index,
                "text": self.policy.tokenizer.decode(drawn.ids, skip_special_tokens=True),
                "logprobs": {"token_logprobs": drawn.logprobs.tolist()},
                "finish_reason": "length" if drawn.finish == "length" else "stop",
                "stop_reason": why,
            }
            choices.append({**choice, "token_ids": drawn.ids.tolist()} if self.token_ids else choice)
        return 200, {"choices": choices[::-1]}
