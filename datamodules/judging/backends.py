"""Who answers a judge's prompts: the protocol, a model in this process, any function."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning_onpolicy.datamodules.batch import Sampling

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Completion

JUDGING = Sampling(temperature=0.5, max_new_tokens=4096)


@dataclass(frozen=True)
class JudgeRequest:
    """One prompt, to be answered several times.

    Args:
        prompt: What the user says.
        n: Answers wanted: they share the prompt, and with it the prefix.
        seed: Of their randomness, which depends on nothing else.
    """

    prompt: str
    n: int
    seed: int


@dataclass(frozen=True)
class Reply:
    """One answer.

    Args:
        text: Decoded, without special tokens.
        finished: Whether it ended by itself.
        tokens: Its length.
    """

    text: str
    finished: bool
    tokens: int


@runtime_checkable
class JudgeBackend(Protocol):
    """Answers requests. ``remote``: it may be asked while a model in this process samples."""

    remote: bool

    def complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
        """``n`` answers for each request, in the order given; None where one could not be had."""
        ...

    def describe(self) -> dict[str, Any]:
        """What its answers depend on, as plain values: equal descriptions, equal answers."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class EngineBackend(JudgeBackend):
    """A model in this process.

    Args:
        model: A path or ``ModelSpec``, loaded when it is first asked; or a live ``Policy``, with its weights of the
            moment.
        sampling: How tokens are drawn.
        chat_options: More arguments for the chat template.
        max_rows: Answers decoded at once.
        device: Where a model that is loaded here goes; null takes CUDA where there is, or else the CPU.

    Raises:
        ValueError: If the model's tokenizer has no chat template.
    """

    remote = False

    def __init__(
        self,
        model: Any,
        sampling: Sampling | None = None,
        chat_options: dict[str, Any] | None = None,
        max_rows: int = 256,
        device: str | None = None,
    ) -> None:
        self.model, self.sampling = model, sampling or JUDGING
        self.chat_options, self.max_rows, self.device = chat_options or {}, max_rows, device
        self._engine: Any = None

    @property
    def engine(self) -> Any:
        """The engine, its model loaded."""
        if self._engine is None:
            import torch

            from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
            from lightning_onpolicy.modules.policy import Policy
            from lightning_onpolicy.modules.specs import ModelSpec

            policy: Any = self.model
            if not isinstance(policy, Policy):
                device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
                policy = ModelSpec.of(self.model).load().to(device).requires_grad_(False)
            if not policy.tokenizer.chat_template:
                raise ValueError(
                    "a judge is asked in a chat, and its tokenizer has no chat template: give it one."
                )
            self._engine = TransformersEngine(policy, max_rows=self.max_rows)
        return self._engine

    def complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
        """See :class:`JudgeBackend`; every answer can be had."""
        tokenizer = self.engine.policy.tokenizer
        prompts = [self._ids(tokenizer, request.prompt) for request in requests]
        answers: list[list[Reply | None]] = [[None] * request.n for request in requests]
        parts = [(i, first, size) for i, request in enumerate(requests) for first, size in _parts(request.n)]
        for n in sorted({size for _, _, size in parts}):
            mine = [(i, first) for i, first, size in parts if size == n]
            drawn: list[list[Completion]] = self.engine.generate(
                [prompts[i] for i, _ in mine],
                n,
                self.sampling,
                0,
                numbers=[requests[i].seed + first for i, first in mine],
            )
            for (i, first), group in zip(mine, drawn, strict=True):
                ids = [completion.ids.tolist() for completion in group]
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                answers[i][first : first + n] = [
                    Reply(text, c.finish != "length", len(c.ids))
                    for text, c in zip(texts, group, strict=True)
                ]
        return answers

    def _ids(self, tokenizer: Any, prompt: str) -> list[int]:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **self.chat_options
        )
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    def describe(self) -> dict[str, Any]:
        """Model, sampling and template options; of a live policy its type, whose weights nobody can tell."""
        model = self.model if isinstance(self.model, str) else repr(self.model)[:500]
        return {"model": model, "sampling": asdict(self.sampling), "chat_options": self.chat_options}

    def close(self) -> None:
        """Forget the engine."""
        self._engine = None


def _parts(n: int) -> list[tuple[int, int]]:
    """``(first, size)`` of the powers of two that make up n: few calls of an engine that draws equally many for each
    prompt, and large ones.

    Example:
        >>> _parts(5)
        [(0, 4), (4, 1)]
    """
    parts, first = [], 0
    for power in reversed(range(n.bit_length())):
        if n >> power & 1:
            parts.append((first, 1 << power))
            first += 1 << power
    return parts


class CallableBackend(JudgeBackend):
    """Any function as a judge: a scripted one in tests, a client of one's own.

    Args:
        function: From a prompt and a seed to the text of an answer; None, it has none. Import path in a configuration.
        threads: Calls at a time; a function that is not safe in threads needs 1.
        deadline_s: Seconds that all calls for one batch of requests may take; those not done by then count as
            unanswered, and their threads are left behind.

    Example:
        >>> backend = CallableBackend(lambda prompt, seed: f"\\\\boxed{{{len(prompt)}}}")
        >>> backend.complete([JudgeRequest("four", 1, 0)])
        [[Reply(text='\\\\boxed{4}', finished=True, tokens=0)]]
    """

    remote = True

    def __init__(
        self, function: Callable[[str, int], str | None], threads: int = 8, deadline_s: float = 600.0
    ) -> None:
        if threads < 1 or deadline_s <= 0:
            raise ValueError(f"threads must be >= 1 and deadline_s > 0, got {threads} and {deadline_s}.")
        self.function, self.threads, self.deadline_s = function, threads, deadline_s

    def complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
        """See :class:`JudgeBackend`; the j-th of a request's answers has the seed ``seed + j``.

        Raises:
            Exception: What the function raises.
        """
        end = time.monotonic() + self.deadline_s
        places = [(i, j) for i, request in enumerate(requests) for j in range(request.n)]
        todo: Iterator[tuple[int, int]] = iter(places)
        found = dict[tuple[int, int], str | None]()
        lock, failed = threading.Lock(), list[BaseException]()

        def work() -> None:
            while not failed:
                with lock:
                    place = next(todo, None) if time.monotonic() < end else None
                if place is None:
                    return
                i, j = place
                try:
                    found[place] = self.function(requests[i].prompt, requests[i].seed + j)
                except BaseException as error:
                    failed.append(error)

        # Daemons, not a pool: one that hangs must keep neither the run nor the interpreter's end waiting.
        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(self.threads, len(places)))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
        if failed:
            raise failed[0]
        texts = [[found.get((i, j)) for j in range(request.n)] for i, request in enumerate(requests)]
        return [[None if text is None else Reply(text, True, 0) for text in group] for group in texts]

    def describe(self) -> dict[str, Any]:
        """The function's name."""
        return {"function": f"{self.function.__module__}.{self.function.__qualname__}"}

    def close(self) -> None:
        """Nothing to free."""
