"""Toy tokenizers, models and batches that tests share. Everything is made here; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, Sampling, collate

WORDS = 20
TEMPLATE = (
    "{% for m in messages %}{{ 't0 ' if m['role'] == 'user' else 't1 ' }}{{ m['content'] }}"
    "{{ ' <eos> ' if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}t1{% endif %}"
)


def tokenizer(words: int = WORDS, template: str | None = TEMPLATE) -> Any:
    """Word-level tokenizer: t0 … t{words-1}, <pad>, <bos>, <eos>, <unk>."""
    vocab = {f"t{i}": i for i in range(words)}
    for special in ("<pad>", "<bos>", "<eos>", "<unk>"):
        vocab[special] = len(vocab)
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    out.chat_template = template
    return out


def llama(
    seed: int = 0, *, vocab: int = 32, hidden: int = 32, tie: bool = True, scale: float = 1.0, **config: Any
) -> Any:
    """A random Llama of two layers; ``vocab`` may exceed the tokenizer's (padded rows)."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tie,
        **config,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    tok_eos = 22
    model.generation_config.eos_token_id = tok_eos
    model.generation_config.pad_token_id = 20
    if scale != 1.0:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
    return model


def policy(seed: int = 0, **config: Any) -> Any:
    """A policy over :func:`llama` and :func:`tokenizer`."""
    from lightning_onpolicy.modules.policy import Policy

    return Policy(llama(seed, **config), tokenizer())


def save_model(folder: Any, seed: int = 0, **config: Any) -> str:
    """A model folder that ``ModelSpec`` loads."""
    llama(seed, **config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def batch(
    seed: int = 0,
    *,
    groups: int = 3,
    size: int = 2,
    max_prompt: int = 5,
    max_response: int = 7,
    version: int = 0,
) -> RolloutBatch:
    """Random ragged rollouts with random sampler log-probabilities."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(0, WORDS, (n,), generator=g).tolist()

    def length(n: int) -> int:
        return int(torch.randint(1, n + 1, (), generator=g))

    made = []
    for i in range(groups):
        prompt = Prompt(tuple(draw(length(max_prompt))), text=f"prompt {i}", uid=f"p{i}", source="toy")
        completions = []
        for _ in range(size):
            ids = torch.tensor(draw(length(max_response)))
            logprobs = -3.0 + 0.3 * torch.randn(len(ids), generator=g)
            completions.append(Completion(ids, logprobs, "eos", version, text="t1"))
        made.append(Group(prompt, tuple(completions)))
    rewards = [[float(x) for x in torch.rand(size, generator=g)] for _ in range(groups)]
    return collate(made, pad_id=20, rewards=rewards, sampling=Sampling(max_new_tokens=max_response))
