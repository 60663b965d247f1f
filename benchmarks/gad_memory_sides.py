"""What `gad_memory.py` is measured on: sizes, modes, and a GAD module with a batch of given rollouts.

Legend: ``G`` samples per prompt, beside which there is one answer of the teacher's.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from step_problem import EOS, PAD, build_tokenizer
from transformers import Qwen2Config

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, Sampling, collate
from lightning_onpolicy.modules import GAD
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.specs import Dtype, LoraSpec, ModelSpec

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
PRECISIONS: tuple[Precision, ...] = ("32-true", "bf16-mixed", "bf16-true")
RANK = 32
HEAD_BUDGET_MB = 64  # the library's default workspace of the output head


@dataclass(frozen=True)
class Size:
    """A model shaped like Qwen2 (embeddings tied) and its rollouts, all of the longest lengths.

    Args:
        vocab: Vocabulary size.
        hidden: Hidden size.
        layers: Layers.
        heads: Attention heads, and key-value heads.
        inner: Width of the MLP.
        prompts: Prompts.
        group: G.
        prompt: Tokens of a prompt.
        response: Tokens of a response.
        positions: Budget of a micro-batch, in positions.
    """

    vocab: int
    hidden: int
    layers: int
    heads: tuple[int, int]
    inner: int
    prompts: int = 2
    group: int = 4
    prompt: int = 64
    response: int = 128
    positions: int = 4096

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.response


SIZES = {
    "toy": Size(64, 32, 2, (2, 1), 64, group=2, prompt=4, response=6),  # of the tests
    "tiny": Size(16384, 384, 8, (6, 2), 1536),
    "small": Size(24576, 512, 8, (8, 2), 2048),
    "0.5b": Size(151936, 896, 24, (14, 2), 4864, prompts=4, prompt=128, response=384, positions=2560),
    "1.5b": Size(151936, 1536, 28, (12, 2), 8960, prompts=4, prompt=128, response=384, positions=2560),
}


@dataclass(frozen=True)
class Mode:
    """Which weights train, and whose they are.

    Args:
        adapters: Policy and discriminator train adapters over frozen weights; else all their weights.
        named: The discriminator is a model of its own, loaded by name; else made from the policy.
        says: For the table.
    """

    adapters: bool
    named: bool
    says: str

    @property
    def bases(self) -> int:
        """Copies of the frozen weights under adapters."""
        return (1 + self.named) if self.adapters else 0


MODES = {
    "full": Mode(False, False, "policy, reference and discriminator in full"),
    "full-named": Mode(False, True, "the same, the discriminator a model of its own"),
    "adapters-apart": Mode(True, True, "adapters, each player over a base of its own"),
    "adapters-shared": Mode(True, False, "adapters of both over one base"),
}


def possible(mode: Mode, precision: Precision) -> bool:
    """Whether the library trains so: adapters stay float32, which `bf16-true` would undo."""
    return not (mode.adapters and precision == "bf16-true")


def dtype_of(mode: Mode, precision: Precision) -> Dtype:
    """Of the weights as loaded: float32 where they train in mixed precision, bfloat16 where they are frozen there."""
    if precision == "32-true" or (precision == "bf16-mixed" and not mode.adapters):
        return "float32"
    return "bfloat16"


def save_shape(size: Size, folder: Path) -> None:
    """A configuration and a tokenizer, from which models with random weights are made.

    They are apart: beside a configuration of Qwen2's, transformers reads any tokenizer as Qwen2's.
    """
    config = Qwen2Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads[0],
        num_key_value_heads=size.heads[1],
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config.save_pretrained(folder)
    build_tokenizer(size.vocab).save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "llama"}))


def build_module(size: Size, mode: Mode, precision: Precision, folder: Path) -> GAD:
    """GAD with the paper's recipe, past its warm-up; models come into being when a Trainer starts.

    Args:
        size: Shape.
        mode: What trains.
        precision: The Trainer's.
        folder: Where :func:`save_shape` wrote.
    """
    lora = LoraSpec(r=RANK, alpha=RANK) if mode.adapters else None
    loop = LoopSpec(micro_batch_tokens=size.positions, head_budget_mb=HEAD_BUDGET_MB, deadline_s=None)
    words = str(folder / "tokenizer")
    spec = ModelSpec(str(folder), dtype_of(mode, precision), tokenizer=words, from_scratch=True)
    return GAD(
        dataclasses.replace(spec, lora=lora),
        discriminator=spec if mode.named else None,
        discriminator_lora=lora,
        loop=loop,
        discriminator_loop=loop,
    )


def build_rollouts(size: Size) -> RolloutBatch:
    """Random tokens; no response ends by itself, so that the discriminator reads as many of both sides."""
    g = torch.Generator().manual_seed(1)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(2, size.vocab, (length,), generator=g)

    def response(version: int) -> Completion:
        ids_L = ids(size.response)
        text = " ".join(f"t{i}" for i in ids_L.tolist())
        logprob = torch.tensor(1 / size.vocab).log() if version == 0 else torch.tensor(float("nan"))
        return Completion(ids_L, logprob.expand(size.response), "length", version, text)

    prompts = [Prompt(tuple(ids(size.prompt).tolist()), "", uid=str(n)) for n in range(size.prompts)]
    own = [Group(p, tuple(response(0) for _ in range(size.group))) for p in prompts]
    given = [Group(p, (response(-1),), on_policy=False) for p in prompts]
    return collate(
        own + given,
        PAD,
        sampling=Sampling(max_new_tokens=size.response),
        numbers=[*range(size.prompts), *range(size.prompts)],
    )
