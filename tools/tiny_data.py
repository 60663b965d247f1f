"""The tasks, the split and the tokenizer of the quickstart: everything the tiny models read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2.sandbox
import reasoning_gym
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, UNK, BOS, EOS = "<|pad|>", "<|unk|>", "<|bos|>", "<|end|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# reasoning-gym seeds item i with `seed + i`, so streams whose seeds are close share their items.
TRAIN_STREAM, HELDOUT_STREAM, STREAM_STRIDE = 0, 1, 1_000_000_000


def split_of(prompt: str) -> str:
    """Return ``"heldout"`` for one prompt in ten, by the CRC-32 of its UTF-8 text, else ``"train"``."""
    return "heldout" if zlib.crc32(prompt.encode("utf-8")) % 10 == 0 else "train"


@dataclass(frozen=True)
class Item:
    """One task item: the compact prompt, the reference answer and the entry its verifier scores."""

    task: str
    prompt: str
    answer: str
    entry: dict[str, Any]


@dataclass
class Task:
    """One reasoning-gym task of the mix with its compact prompt."""

    name: str
    weight: float
    config: dict[str, Any]
    prompt: str
    render: Callable[[dict[str, Any]], str] = field(init=False)

    def __post_init__(self) -> None:
        template = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(
            self.prompt
        )
        self.render = lambda entry: template.render(question=entry["question"], metadata=entry["metadata"])

    def dataset(self, seed: int, size: int) -> Any:
        """Return the reasoning-gym dataset of this task."""
        return reasoning_gym.create_dataset(self.name, seed=seed, size=size, **self.config)

    def items(self, split: str, seed: int, size: int) -> Iterator[Item]:
        """Yield the items of one split among ``size`` generated ones."""
        stream = HELDOUT_STREAM if split == "heldout" else TRAIN_STREAM
        dataset = self.dataset(seed * 10_000_000 + stream * STREAM_STRIDE, size)
        for index in range(size):
            entry = dataset[index]
            prompt = self.render(entry)
            if split_of(prompt) == split:
                yield Item(self.name, prompt, str(entry["answer"]), entry)


def load_tasks(path: Path) -> list[Task]:
    """Read a task mix."""
    mix = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Task(name, **settings) for name, settings in mix.items()]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Split ``total`` in proportion to ``weights``; the last share takes what rounding leaves."""
    counts = [int(total * weight / sum(weights)) for weight in weights]
    counts[-1] += total - sum(counts)
    return counts


def heldout_items(tasks: Sequence[Task], seed: int, total: int) -> list[Item]:
    """Return ``total`` held-out items with distinct prompts, in the proportions of the mix."""
    chosen: list[Item] = []
    for task, count in zip(tasks, shares([task.weight for task in tasks], total), strict=True):
        seen: dict[str, Item] = {}
        for item in task.items("heldout", seed, count * 100):
            if len(seen) == count:
                break
            seen.setdefault(item.prompt, item)
        chosen.extend(seen.values())
    return chosen


def make_tokenizer(
    texts: Sequence[str], vocab_size: int = 272, pieces: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every letter and digit stays a token of its own or, with ``pieces``, does not."""
    turns = [f"<|{role}|>" for role in ROLES]
    core = Tokenizer(models.BPE(unk_token=UNK))
    letters = [] if pieces else [pre_tokenizers.Split(Regex(r"[A-Za-z0-9]"), behavior="isolated")]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*letters, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pieces)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=10,
        special_tokens=[PAD, UNK, BOS, EOS, *turns],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=turns,
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Encode user prompts with the chat template, ready for the assistant's answer."""
    chat = [{"role": "user", "content": "{}"}]
    frame = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    texts = [frame.replace("{}", prompt) for prompt in prompts]  # much faster than rendering each chat
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


def check_round_trip(tokenizer: Any, texts: Sequence[str]) -> None:
    """Raise unless every text survives encoding and decoding."""
    for text in texts:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        if back != text:
            raise ValueError(f"the tokenizer turns {text!r} into {back!r}")
