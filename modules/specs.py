"""What a model is made of, as configurations say it: where it comes from, how it is loaded, which adapters train."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lightning_onpolicy.modules.paths import resolve_model

if TYPE_CHECKING:  # the policy is made from a spec, and needs to know what one is
    from lightning_onpolicy.modules.policy import Policy

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters (peft), in float32 also over weights in half precision, where small steps would round away.

    Args:
        r: Rank.
        alpha: Scale numerator; the update is multiplied by ``alpha / r``.
        dropout: Dropout on the adapters' input.
        target_modules: ``"all-linear"`` (every linear layer but the head) or names of modules.
    """

    r: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.r < 1:
            raise ValueError(f"lora.r must be >= 1, got {self.r}.")
        if "lm_head" in self.target_modules:
            raise ValueError(
                "lora.target_modules names lm_head: adapters on the output head are not supported."
            )

    def add_to(self, model: Any) -> None:
        """Add adapters to a Hugging Face model, in place; all else in it is frozen."""
        from peft import LoraConfig

        has_head = model.get_output_embeddings() is not None
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        model.add_adapter(
            LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=targets,
                exclude_modules=["lm_head"] if targets == "all-linear" and has_head else None,
                task_type="CAUSAL_LM",
            )
        )
        adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
        lost = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in adapted)]
        if not isinstance(targets, str) and lost:
            raise ValueError(f"lora.target_modules names {lost}, and the model has no such linear module.")
        for name, parameter in model.named_parameters():
            if ".lora_" in name and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()


@dataclass(frozen=True)
class ModelSpec:
    """Where a causal LM comes from and how it is loaded.

    Args:
        path: Folder or hub name; ``onpolicy://quickstart/models/student`` and the like ship with the library.
        dtype: Type of the weights; ``auto`` keeps the checkpoint's.
        quantize: Load linear layers in 4 bit (nf4) or 8 bit through bitsandbytes.
        lora: Train low-rank adapters over frozen weights.
        tokenizer: Folder or hub name of the tokenizer; default: ``path``.
        revision: Hub revision.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, …; default: transformers' choice.
        gradient_checkpointing: Recompute activations in the backward pass.
        from_scratch: Random weights from the folder's configuration (for tests and timing).
        trust_remote_code: Run code that comes with the checkpoint. Only for sources you trust.
    """

    path: str
    dtype: Dtype = "auto"
    quantize: Literal["4bit", "8bit"] | None = None
    lora: LoraSpec | None = None
    tokenizer: str | None = None
    revision: str | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    from_scratch: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.lora, Mapping):
            object.__setattr__(self, "lora", LoraSpec(**self.lora))
        if not self.path:
            raise ValueError("a model's path is empty: give a folder, a hub name or onpolicy://PATH.")
        if self.quantize and self.from_scratch:
            raise ValueError(
                "quantize and from_scratch exclude each other: random weights have nothing to quantise."
            )

    @classmethod
    def of(cls, value: str | ModelSpec | Mapping[str, Any]) -> ModelSpec:
        """A spec from a path, a spec or its plain dict (as stored in checkpoints)."""
        if isinstance(value, ModelSpec):
            return value
        return cls(value) if isinstance(value, str) else cls(**value)

    def load_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            OSError: If it cannot be found; the message names the path.
        """
        path = resolve_model(self.tokenizer or self.path)
        with _naming("tokenizer", path):
            return AutoTokenizer.from_pretrained(
                path, revision=self.revision, trust_remote_code=self.trust_remote_code
            )

    def load_model(self, kind: Any = AutoModelForCausalLM) -> Any:
        """The Hugging Face model, quantised if asked, without adapters.

        Args:
            kind: The auto class that makes it; ``AutoModel`` gives the body without its output head.
        """
        path = resolve_model(self.path)
        kwargs: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        if self.attn_implementation:
            kwargs["attn_implementation"] = self.attn_implementation
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if self.from_scratch:
            from transformers import AutoConfig

            with _naming("model", path):
                config = AutoConfig.from_pretrained(
                    path, revision=kwargs.pop("revision"), trust_remote_code=self.trust_remote_code
                )
            return kind.from_config(
                config, dtype=config.dtype or torch.float32 if dtype == "auto" else dtype, **kwargs
            )
        if self.quantize:
            kwargs["quantization_config"] = _quantization(self.quantize)
        with _naming("model", path):
            return kind.from_pretrained(path, dtype=dtype, **kwargs)

    def load(self) -> Policy:
        """The policy."""
        from lightning_onpolicy.modules.policy import Policy

        return Policy(self.load_model(), self.load_tokenizer(), lora=self.lora, spec=self)


@contextmanager
def _naming(what: str, path: str) -> Iterator[None]:
    """Put the path into errors about files that are not found; transformers names the hub alone when offline."""
    try:
        yield
    except OSError as error:
        made = re.fullmatch(r"runs/(\w+)/export", path)
        if made and not Path(path).exists():
            raise OSError(
                f"{what} {path!r} does not exist yet: a quickstart reads what another one exports there. "
                f"Run `onpolicy fit -c quickstart/{made[1]}` first."
            ) from None
        raise OSError(f"{what} {path!r} cannot be loaded: {error}") from error


def _quantization(bits: Literal["4bit", "8bit"]) -> BitsAndBytesConfig:
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
