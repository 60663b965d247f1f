"""The data that flows from prompts to losses: small frozen dataclasses, defined before the code that uses them.

Legend: ``B`` sequences, ``T`` padded positions (prompt + response), ``L`` tokens of one response.
Values at position ``t`` always speak of token ``t``: ``sampler_logprobs[b, t]`` is the log-probability with
which ``input_ids[b, t]`` was sampled. Token ids are never decoded and re-encoded on their way to the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How an engine draws tokens.

    Args:
        temperature: Softmax temperature; 0 means greedy decoding (log-probabilities are then those at 1).
        top_p: Nucleus mass kept, in (0, 1]; 1 keeps everything.
        top_k: Number of most probable tokens kept; 0 keeps all.
        min_p: Tokens below ``min_p`` times the largest probability are dropped; 0 keeps all.
        max_new_tokens: Longest response, in tokens, the end-of-sequence token included; where an environment answers,
            what the policy writes in all turns together.
        min_new_tokens: End-of-sequence tokens have probability 0 before this many tokens.
        stop_token_ids: Token ids that end a response, besides the model's own EOS ids.
        stop: Strings that end a response once they appear in its decoded text; the tokens that complete the
            string stay in the response.

    Raises:
        ValueError: If a value is outside its range; the message names the key.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "stop", tuple(self.stop))
        _require(self.temperature >= 0, "temperature", self.temperature, ">= 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, ">= 0")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "in [0, 1)")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, ">= 1")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"in [0, max_new_tokens={self.max_new_tokens}]",
        )
        _require(all(self.stop), "stop", self.stop, "a list of non-empty strings")

    @property
    def truncates(self) -> bool:
        """Whether tokens are removed from the distribution, so that the sampler's support is not the policy's."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.min_new_tokens > 0


def _require(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"sampling.{key} must be {rule}, got {value!r}.")


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to be sampled from.

    Args:
        ids: Token ids, template applied, generation prompt included.
        text: The rendered text the ids were made from (for people and for rewards).
        row: The source row (question, answer, metadata, …): what a reward needs to score a response.
        uid: Stable name of the item, unique within its source.
        source: Name of the source, e.g. the reasoning-gym task; metrics are also reported per source.
        place: Where its row is, if the source says so: a file and its line.
        system: System message that was put before the row's conversation, and does not stand in the row.
    """

    ids: tuple[int, ...]
    text: str
    row: Mapping[str, Any] = field(default_factory=dict)
    uid: str = ""
    source: str = ""
    place: str = ""
    system: str | None = None

    @property
    def where(self) -> str:
        """What to call its row in errors."""
        return f"row {self.uid!r}" + (f" ({self.place})" if self.place else "")

    @property
    def domain(self) -> str:
        """What evaluations group tasks by: the row's ``domain``; the source, where the row does not say it."""
        said = self.row.get("domain")
        return self.source if said is None else str(said)


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Args:
        ids: ``[L]`` int64 token ids on the CPU, the real EOS included when the model emitted one.
        logprobs: ``[L]`` float32, log-probability of each token under the distribution actually sampled from
            (temperature and filters included); 0 on observations.
        finish: ``"eos"`` (an EOS or stop token), ``"stop"`` (a stop string) or ``"length"`` (cut: no token, turn or
            context was left).
        version: Version of the policy weights that sampled it.
        text: Decoded response without special tokens; filled by the loader.
        written: ``[L]`` bool, False on observations: tokens between the policy's turns that a tool wrote. None: the
            policy wrote all.
    """

    ids: Tensor
    logprobs: Tensor
    finish: FinishReason
    version: int = 0
    text: str = ""
    written: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens the policy wrote."""
        return len(self.ids) if self.written is None else int(self.written.sum())


@dataclass(frozen=True)
class Group:
    """A prompt with its completions: what a reward scores, always whole.

    Args:
        prompt: The prompt.
        completions: Its ``n`` completions.
        on_policy: Whether the policy being trained sampled them (False: dataset or teacher text).
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    on_policy: bool = True


@dataclass(frozen=True)
class RolloutBatch:
    """B sequences of prompt + response, right-padded to T.

    Args:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` bool, True on prompt and response tokens.
        response_mask: ``[B, T]`` bool, True on tokens that are trained on: those the policy (or, off-policy,
            the dataset) wrote, its real EOS included; never on prompts, observations or padding.
        sampler_logprobs: ``[B, T]`` float32, 0 outside ``response_mask``; NaN on off-policy rows, whose
            sampler is unknown.
        rewards: ``[B]`` float32; NaN = could not be scored.
        reward_parts: Named ``[B]`` float32 parts of the reward.
        group: ``[B]`` int64; rows with the same number answer the same prompt.
        finished: ``[B]`` bool; stopped by EOS or a stop string, not by length (the engine's finish reason).
        on_policy: ``[B]`` bool; False for rows the policy did not sample.
        policy_version: ``[B]`` int64; version of the weights that sampled the row (-1 off-policy).
        prompts: One :class:`Prompt` per row.
        texts: One decoded response per row.
        sampling: How the on-policy rows were drawn; None when unknown.
        timings: Seconds spent per phase while this batch was made, e.g. ``{"rollout": 1.2, "reward": 0.1}``.
        counts: What was counted meanwhile on this rank, e.g. ``{"sampled": 24, "varying": 16}`` groups; what is not
            about groups has its own prefix, as in ``tools/observations``.
        extra: Named tensors that a method's ``prepare`` adds, first dimension B; sliced with the batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    sampler_logprobs: Tensor
    rewards: Tensor
    group: Tensor
    finished: Tensor
    on_policy: Tensor
    policy_version: Tensor
    reward_parts: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: tuple[Prompt, ...] = ()
    texts: tuple[str, ...] = ()
    sampling: Sampling | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.input_ids.device

    @property
    def lengths(self) -> Tensor:
        """``[B]`` int64: real tokens per row, prompt included."""
        return self.attention_mask.sum(1)

    @property
    def response_lengths(self) -> Tensor:
        """``[B]`` int64: trained tokens per row."""
        return self.response_mask.sum(1)

    @property
    def prompt_lengths(self) -> Tensor:
        """``[B]`` int64: tokens before the first trained one; all of a row that has none."""
        return torch.where(self.response_mask.any(1), self.response_mask.int().argmax(1), self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RolloutBatch:
        """The batch with every tensor on ``device`` (Lightning calls this)."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RolloutBatch:
        """The batch in page-locked memory."""
        return self._map(lambda x: x.pin_memory())

    def select(self, rows: Sequence[int] | Tensor, trim: bool = True) -> RolloutBatch:
        """The given rows, in the given order.

        Args:
            rows: Row numbers.
            trim: Cut columns that are padding in all chosen rows.
        """
        index = torch.as_tensor(rows, dtype=torch.long, device=self.device)
        out = self._map(lambda x: x[index])
        order = index.tolist()
        out = dataclasses.replace(
            out,
            prompts=tuple(self.prompts[i] for i in order) if self.prompts else (),
            texts=tuple(self.texts[i] for i in order) if self.texts else (),
        )
        return out.trim() if trim else out

    def trim(self) -> RolloutBatch:
        """Without the columns at the end that are padding in every row (``[B, T]`` entries of ``extra`` too)."""
        T = self.input_ids.shape[1]
        width = int(self.lengths.max()) if len(self) else 0
        if width == T:
            return self
        return self._map(lambda x: x[:, :width] if x.ndim >= 2 and x.shape[1] == T else x)

    def with_extra(self, **tensors: Tensor) -> RolloutBatch:
        """The batch with more named ``[B, …]`` tensors in ``extra``.

        Raises:
            ValueError: If a tensor's first dimension is not B.
        """
        for name, value in tensors.items():
            if value.shape[:1] != (len(self),):
                raise ValueError(
                    f"extra[{name!r}] has shape {tuple(value.shape)}; its first dimension must be {len(self)}."
                )
        return dataclasses.replace(self, extra={**self.extra, **tensors})

    def _map(self, f: Any) -> RolloutBatch:
        changed: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changed[item.name] = f(value)
            elif item.name in ("reward_parts", "extra"):
                changed[item.name] = {k: f(v) for k, v in value.items()}
        return dataclasses.replace(self, **changed)


def collate(
    groups: Sequence[Group],
    pad_id: int,
    rewards: Sequence[Sequence[float | None]] | None = None,
    reward_parts: Mapping[str, Sequence[Sequence[float | None]]] | None = None,
    sampling: Sampling | None = None,
    timings: Mapping[str, float] | None = None,
    counts: Mapping[str, float] | None = None,
    numbers: Sequence[int] | None = None,
) -> RolloutBatch:
    """Stack groups into one right-padded :class:`RolloutBatch`.

    Args:
        groups: Prompts with completions; sizes may differ.
        pad_id: Token id written into padding (it is never attended to nor trained on).
        rewards: Per group, per completion; None = could not be scored (becomes NaN).
        reward_parts: The same, by name.
        sampling: How the completions were drawn.
        timings: Seconds per phase.
        counts: What was counted meanwhile.
        numbers: The groups' numbers, default 0, 1, …; sampled and given responses to one prompt share theirs.

    Raises:
        ValueError: If there is no row, or rewards do not match the completions in number.
    """
    rows = [(g, i, c) for g, group in enumerate(groups) for i, c in enumerate(group.completions)]
    if not rows:
        raise ValueError("cannot collate an empty batch: no group has a completion.")
    B = len(rows)
    T = max(len(groups[g].prompt.ids) + len(c.ids) for g, _, c in rows)
    input_ids = torch.full((B, T), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((B, T), dtype=torch.bool)
    response_mask = torch.zeros((B, T), dtype=torch.bool)
    logprobs = torch.zeros((B, T), dtype=torch.float32)
    for b, (g, _, c) in enumerate(rows):
        start = len(groups[g].prompt.ids)
        end = start + len(c.ids)
        input_ids[b, :start] = torch.tensor(groups[g].prompt.ids, dtype=torch.long)
        input_ids[b, start:end] = c.ids
        attention_mask[b, :end] = True
        response_mask[b, start:end] = True if c.written is None else c.written
        logprobs[b, start:end] = c.logprobs
    return RolloutBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        response_mask=response_mask,
        sampler_logprobs=logprobs,
        rewards=_flatten(rewards, groups, "rewards"),
        reward_parts={
            k: _flatten(v, groups, f"reward_parts[{k!r}]") for k, v in (reward_parts or {}).items()
        },
        group=torch.tensor([g if numbers is None else numbers[g] for g, _, _ in rows]),
        finished=torch.tensor([c.finish != "length" for _, _, c in rows]),
        on_policy=torch.tensor([groups[g].on_policy for g, _, _ in rows]),
        policy_version=torch.tensor([c.version if groups[g].on_policy else -1 for g, _, c in rows]),
        prompts=tuple(groups[g].prompt for g, _, _ in rows),
        texts=tuple(c.text for _, _, c in rows),
        sampling=sampling,
        timings=dict(timings or {}),
        counts=dict(counts or {}),
    )


def _flatten(values: Sequence[Sequence[float | None]] | None, groups: Sequence[Group], name: str) -> Tensor:
    sizes = [len(g.completions) for g in groups]
    if values is None:
        return torch.full((sum(sizes),), float("nan"))
    if [len(v) for v in values] != sizes:
        raise ValueError(
            f"{name} has {[len(v) for v in values]} scores per group; the groups have {sizes} completions."
        )
    return torch.tensor(
        [float("nan") if x is None else float(x) for v in values for x in v], dtype=torch.float32
    )
