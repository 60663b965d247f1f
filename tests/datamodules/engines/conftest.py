"""Tiny random models of the supported families behind the engine's Decoder protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

V = 48
_COMMON = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # tied random models repeat their input
    "initializer_range": 0.4,  # far from uniform, so that greedy decoding has no near-ties
}
_WINDOW: dict[str, Any] = {"num_hidden_layers": 2, "head_dim": 8, "sliding_window": 6}
_WINDOW["layer_types"] = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_hidden_layers": 2}),
    "qwen2": ("Qwen2Config", {"num_hidden_layers": 2}),
    "qwen3": ("Qwen3Config", {"num_hidden_layers": 2, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        _WINDOW
        | {
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "attn_implementation": "eager",
        },
    ),
    "gemma3": ("Gemma3TextConfig", _WINDOW),
    "gpt2": ("GPT2Config", {"num_hidden_layers": 2}),
    # linear attention and full attention: no layer-by-layer cache of ours, so transformers' own is used
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
}


class TinyDecoder(nn.Module):
    """A Hugging Face model as a Decoder that counts what it is asked for."""

    def __init__(self, model: Any, eos: tuple[int, ...] = (1,), pad: int = 0, eos_bias: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.eos_token_ids = eos
        self.pad_token_id = pad
        self.eos_bias = eos_bias
        self.calls: list[tuple[int, int, int]] = []  # rows, new columns, attended new tokens
        self.fail_at: int | None = None

    @property
    def max_positions(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def decode(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        if self.fail_at == len(self.calls):
            raise ZeroDivisionError("asked to fail")
        S = input_ids.shape[1]
        self.calls.append((*input_ids.shape, int(attention_mask[:, -S:].sum())))
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return self.bias(out.logits[:, -1])

    def bias(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        logits[..., self.eos_token_ids[0]] += self.eos_bias
        return logits

    def new_cache(self) -> Any:
        return transformers.DynamicCache(config=self.model.config)

    @torch.no_grad()
    def fresh_logits(self, prompt: list[int], response: Tensor) -> Tensor:
        """``[L, V]`` logits of each response token by one forward pass without cache or padding."""
        ids = torch.cat([torch.tensor(prompt), response])[None]
        return self.bias(self.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1])


def build(family: str = "llama", config: dict[str, Any] | None = None, **kwargs: Any) -> TinyDecoder:
    """A decoder in evaluation mode with always the same weights; ``kwargs`` are TinyDecoder's."""
    config_name, extra = FAMILIES[family]
    extra = dict(_COMMON | extra | (config or {}))
    attention = extra.pop("attn_implementation", "sdpa")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        full = getattr(transformers, config_name)(**extra)
        model = transformers.AutoModelForCausalLM.from_config(full, attn_implementation=attention)
    return TinyDecoder(model.eval(), **kwargs)


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., TinyDecoder]:
    """The function :func:`build`."""
    return build
