"""What the benchmarks of one optimizer step are measured on: settings, models and rollouts.

Legend: ``B`` sequences, ``P`` and ``R`` tokens of the longest prompt and response.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, Sampling, collate

PAD, EOS = 0, 1


@dataclass(frozen=True)
class Setting:
    """A model and its rollouts.

    Args:
        vocab: Vocabulary size.
        hidden: Hidden size.
        layers: Layers.
        heads: Attention heads, and key-value heads.
        inner: Width of the MLP.
        rows: Sequences.
        prompt: Tokens of the longest prompt.
        response: Tokens of the longest response.
        ragged: Draw lengths with a long tail, instead of all sequences being of the longest.
        positions: Budget of a micro-batch, in positions.
        group: Responses per prompt.
    """

    vocab: int
    hidden: int
    layers: int
    heads: tuple[int, int]
    inner: int
    rows: int
    prompt: int
    response: int
    ragged: bool = False
    positions: int = 8192
    group: int = 1

    @property
    def rows_per_micro_batch(self) -> int:
        """TRL's `per_device_train_batch_size`: the most rows that fit the budget and divide the batch."""
        fits = (n for n in range(1, self.rows + 1) if n * (self.prompt + self.response) <= self.positions)
        return max(n for n in fits if self.rows % n == 0)


SETTINGS = {
    "tiny": Setting(268, 128, 4, (4, 4), 344, rows=256, prompt=16, response=16),
    "ragged": Setting(8192, 256, 4, (4, 4), 688, rows=64, prompt=64, response=448, ragged=True),
    "vocab50k": Setting(50304, 512, 4, (8, 8), 1376, rows=8, prompt=32, response=128),
    "qwen0.5b": Setting(151936, 896, 24, (14, 2), 4864, rows=16, prompt=256, response=768),
    "qwen1.5b": Setting(151936, 1536, 28, (12, 2), 8960, rows=16, prompt=256, response=768),
}


def build_model(setting: Setting, seed: int, device: str) -> Any:
    """A random Llama: float32 on the CPU, bfloat16 on CUDA."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        intermediate_size=setting.inner,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads[0],
        num_key_value_heads=setting.heads[1],
        max_position_embeddings=setting.prompt + setting.response,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(torch.float32 if device == "cpu" else torch.bfloat16)


def build_tokenizer(vocab: int) -> Any:
    """One word per id: both trainers ask for a tokenizer, neither uses it in a step."""
    words = {"<pad>": PAD, "<eos>": EOS, **{f"t{i}": i for i in range(2, vocab)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def _lengths(setting: Setting, g: torch.Generator) -> tuple[list[int], list[int]]:
    """Tokens of each row's prompt and response: ragged ones have a quarter of the longest response on average."""
    prompts = torch.full((setting.rows,), setting.prompt)
    responses = torch.full((setting.rows,), setting.response)
    if setting.ragged:
        shortest = max(1, setting.prompt // 4), max(1, setting.response // 56)
        prompts = torch.randint(shortest[0], setting.prompt + 1, (setting.rows,), generator=g)
        tail = -torch.rand(setting.rows, generator=g).clamp(min=1e-6).log() * setting.response / 4
        responses = tail.long().clamp(shortest[1], setting.response)
        prompts[0], responses[0] = setting.prompt, setting.response
    return prompts.tolist(), responses.tolist()


def build_rollouts(setting: Setting) -> RolloutBatch:
    """Random tokens, sampled with equal probabilities, and random rewards. One ragged row has the longest lengths."""
    g = torch.Generator().manual_seed(1)

    def ids(length: int) -> Tensor:
        return torch.randint(2, setting.vocab, (length,), generator=g)

    prompts, responses = _lengths(setting, g)
    groups = []
    for first in range(0, setting.rows, setting.group):
        completions = tuple(
            Completion(ids(r), torch.full((r,), -math.log(setting.vocab)), "length")
            for r in responses[first : first + setting.group]
        )
        prompt = Prompt(tuple(ids(prompts[first]).tolist()), "", uid=str(first))
        groups.append(Group(prompt, completions))
    rewards = torch.rand(len(groups), setting.group, generator=g).tolist()
    return collate(groups, PAD, rewards, sampling=Sampling(max_new_tokens=setting.response))
