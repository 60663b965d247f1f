"""How a model makes logits of hidden states, and whether the head that grades tokens does the same."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from lightning_onpolicy.kernels import LogProbHead


def logit_scale(config: Any) -> float:
    """What the model's own forward pass multiplies its head's products by."""
    if getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        return float(config.lm_head_multiplier)
    if getattr(config, "logits_mup_width_multiplier", None):  # Inkling
        return 1.0 / float(config.logits_mup_width_multiplier)
    if getattr(config, "logits_scaling", None):  # HyperCLOVA X multiplies by it, Granite divides
        scaling = float(config.logits_scaling)
        return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    scale = getattr(config, "logit_scale", None)  # Cohere
    return 1.0 if scale is None else float(scale)


class _Body(BaseModelOutputWithPast):  # type: ignore[misc]
    """What a body without a body returns: hidden states, and None for whatever else a family asks for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@torch.no_grad()
def check_head(model: Any, head: LogProbHead) -> None:
    """Refuse a model that makes logits of hidden states in another way than its head here would.

    Two made-up hidden states go through the model's own forward pass, whose body is left out, and through the head.
    Where that cannot be done, two tokens go through the whole model.

    Raises:
        ValueError: If the two differ.
    """
    if head.weight.is_meta or isinstance(head.weight, DTensor):
        return
    training = model.training
    model.eval()
    try:
        hidden, theirs = _without_body(model, head) or _with_body(model, head)
    except Exception as error:  # a family whose forward pass wants more than token ids
        rank_zero_warn(
            f"{type(model).__name__}: the output head could not be compared with the model's own logits "
            f"({type(error).__name__}: {error}). Look at mismatch metrics, and at exports in plain transformers."
        )
        return
    finally:
        model.train(training)
    if hidden.shape[-1] != head.in_features:
        raise ValueError(
            f"{type(model).__name__}: its head reads {head.in_features} numbers per token, and its body gives "
            f"{hidden.shape[-1]}: something between them is not known here. Please report the architecture."
        )
    ours = head.logits(hidden)
    known = torch.isfinite(ours)
    gap, size = float((ours - theirs)[known].abs().max()), float(theirs[known].abs().max())
    if not gap <= 0.02 * max(size, 1e-3):
        raise ValueError(
            f"{type(model).__name__} makes logits in a way that is not known here: they are up to {gap:.2g} off the "
            f"head's products (of at most {size:.2g}) with scale {head.logit_scale:g} and soft-cap {head.soft_cap}. "
            "Training would follow another distribution than the model's; please report the architecture."
        )


def _without_body(model: Any, head: LogProbHead) -> tuple[Tensor, Tensor] | None:
    """``[2, H]`` hidden states and the ``[2, V]`` logits that the model makes of them; None if it asks another body."""
    numbers = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, head.in_features, generator=numbers).to(head.weight.device, head.weight.dtype)
    asked = []

    def body(*args: Any, **kwargs: Any) -> _Body:
        asked.append(True)
        return _Body(last_hidden_state=hidden)

    model.base_model.forward = body
    try:
        logits = model(**_tokens(head)).logits
    except Exception:  # it needs what only its body has: the whole model says more
        return None
    finally:
        del model.base_model.forward
    return (hidden[0], logits[0].float()) if asked else None


def _with_body(model: Any, head: LogProbHead) -> tuple[Tensor, Tensor]:
    """The same, of two tokens."""
    tokens = _tokens(head)
    hidden = model.base_model(**tokens, use_cache=False).last_hidden_state
    return hidden[0], model(**tokens).logits[0].float()


def _tokens(head: LogProbHead) -> dict[str, Tensor]:
    ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
