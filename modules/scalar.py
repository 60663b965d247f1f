"""A causal LM's body with a head of one scalar: PPO's critic, an adversarial discriminator, a meta reward model.

Legend: ``B`` sequences, ``T`` positions, ``H`` hidden size, ``N`` selected tokens, ``K`` positions that are read.

One forward pass reads the states at given positions of right-padded rows; attention is causal, so that real tokens
never see padding. ``values`` reads the state before each selected token, as ``Policy.hidden`` does; ``scores`` the
state after a row's last real token, found by the attention mask and never by an id.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.utils import cached_file

from lightning_onpolicy.modules.paths import resolve_model
from lightning_onpolicy.modules.policy import Policy, frozen_names, recompute_activations
from lightning_onpolicy.modules.saving import merged_copy
from lightning_onpolicy.modules.specs import LoraSpec, ModelSpec

HEAD_FILE = "scalar_head.pt"
_SAVED_HEAD = "onpolicy_scalar_head"  # in the body's config.json: the file that holds the head


class ScalarHead(nn.Module):
    """``w · h + b`` in float32, whatever the dtype of ``h``, of autocast, or of a cast of the module around it.

    Args:
        hidden_size: H.
        std: Standard deviation of ``w``; 0 makes every output 0 (where a critic starts; a discriminator needs more,
            say 0.02). ``b`` starts at 0.
        seed: Of ``w``: equal on all ranks, and no other random number moves.
    """

    def __init__(self, hidden_size: int, std: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if std < 0:
            raise ValueError(f"std of a scalar head must be >= 0, got {std}.")
        # Type and device by name: Lightning builds models under those of the Trainer as defaults.
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(1, hidden_size, generator=generator, device="cpu", dtype=torch.float32)
        self.weight = nn.Parameter(std * draw.to(torch.get_default_device()))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, hidden_KH: Tensor) -> Tensor:
        """``[K]`` float32."""
        with torch.autocast(hidden_KH.device.type, enabled=False):
            return F.linear(hidden_KH.float(), self.weight, self.bias)[..., 0]

    def _apply(self, fn: Any, recurse: bool = True) -> ScalarHead:
        """Move, but never round: ``precision=bf16-true`` casts every parameter of a LightningModule."""

        def wide(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self


class ScalarModel(nn.Module):
    """A transformer body with a scalar head.

    It shares no storage with any other model, unless :meth:`beside` made it. Values and scores are as the mode has
    them: score in :func:`~lightning_onpolicy.datamodules.engines.modes.eval_mode`, update in train mode.

    Args:
        body: A Hugging Face model that returns ``last_hidden_state`` and attends causally.
        tokenizer: Its tokenizer, saved along.
        lora: Adapters to add; the body is then frozen, the head is not.
        spec: Where the body came from.
        std: Standard deviation of the head's weight; 0 makes every output 0 (:class:`ScalarHead`).
        seed: Of the head's weight.

    Example:
        >>> import torch
        >>> from lightning_onpolicy.modules import ModelSpec, ScalarModel
        >>> policy = ModelSpec("onpolicy://quickstart/models/student").load()
        >>> critic = ScalarModel.copy_of(policy)
        >>> ids = torch.tensor([policy.tokenizer("1 2 3")["input_ids"]])
        >>> critic.scores(ids, torch.ones_like(ids)).tolist()
        [0.0]
    """

    def __init__(
        self,
        body: Any,
        tokenizer: Any,
        *,
        lora: LoraSpec | None = None,
        spec: ModelSpec | None = None,
        std: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.spec = spec
        self.body = body
        self.head = ScalarHead(body.config.get_text_config().hidden_size, std, seed)
        if lora is not None:
            lora.add_to(body)
        elif spec is None or not spec.quantize:
            body.requires_grad_(True)
        else:
            raise ValueError(
                f"quantize={spec.quantize!r} of a scalar model needs lora: quantised weights cannot be trained."
            )
        if spec is not None and spec.gradient_checkpointing:
            recompute_activations(body)
        self.train()

    @classmethod
    def copy_of(
        cls, policy: Policy, *, lora: LoraSpec | None = None, std: float = 0.0, seed: int = 0
    ) -> ScalarModel:
        """The policy's body, copied, adapters merged into the copy. Before the policy is sharded.

        Args:
            policy: What to copy; it does not change.
            lora: Adapters to train over the copy, which is then frozen.
            std: Of the head's weight.
            seed: Of the head's weight.

        Raises:
            ValueError: If the policy's weights are quantised.
        """
        base = policy.model.base_model
        if policy.spec is not None and policy.spec.quantize:
            raise ValueError(
                f"the policy's weights are quantised ({policy.spec.quantize}), and a merged copy would round them "
                "again: name a model of its own for the critic or discriminator."
            )
        body = merged_copy(base) if policy.has_adapters else copy.deepcopy(base)
        device = next(base.parameters()).device
        spec = policy.spec and dataclasses.replace(policy.spec, lora=lora)
        return cls(body.to(device), policy.tokenizer, lora=lora, spec=spec, std=std, seed=seed).to(device)

    @classmethod
    def beside(cls, policy: Policy, *, lora: LoraSpec, std: float = 0.0, seed: int = 0) -> ScalarModel:
        """Adapters and a head of its own over the policy's frozen base, which both read: one copy of the weights.

        The policy's adapters are not seen, so it starts from the base. Quantised bases can be shared. Not for FSDP2,
        which would have to shard one tensor in two trees.

        Args:
            policy: A policy with adapters.
            lora: The model's own.
            std: Of the head's weight.
            seed: Of the head's weight.

        Raises:
            ValueError: If the policy has no adapters: its weights train, and cannot be shared.
        """
        from peft.tuners.lora import LoraLayer

        if not policy.has_adapters:
            raise ValueError(
                "the policy's own weights train, so no other model may share them: give it lora."
            )
        base = policy.model.base_model
        shared: dict[int, Any] = {id(p): p for p in base.parameters() if not p.requires_grad}
        body = copy.deepcopy(base, shared)
        for name, layer in list(body.named_modules()):
            if isinstance(layer, LoraLayer):
                owner, _, leaf = name.rpartition(".")
                setattr(body.get_submodule(owner), leaf, layer.base_layer)
        spec = policy.spec and dataclasses.replace(policy.spec, lora=lora)
        device = next(base.parameters()).device
        return cls(body, policy.tokenizer, lora=lora, spec=spec, std=std, seed=seed).to(device)

    @classmethod
    def from_pretrained(
        cls, source: str | ModelSpec | Mapping[str, Any], *, std: float = 0.0, seed: int = 0
    ) -> ScalarModel:
        """From a causal LM's folder or hub name, with a new head; or from what :meth:`save_pretrained` wrote.

        Args:
            source: A path, or a spec with what else there is to say.
            std: Of a new head's weight.
            seed: Of a new head's weight.
        """
        spec = ModelSpec.of(source)
        body = spec.load_model(AutoModel)
        model = cls(body, spec.load_tokenizer(), lora=spec.lora, spec=spec, std=std, seed=seed)
        saved = getattr(body.config, _SAVED_HEAD, None)
        if saved is not None and not spec.from_scratch:
            file = cached_file(resolve_model(spec.path), saved, revision=spec.revision)
            model.head.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return model

    # -- forward passes ---------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, at: Tensor) -> Tensor:
        """``[K]`` float32 scalars of the states after the tokens at some positions.

        Everything comes through here, so that what shards the model sees every pass.

        Args:
            input_ids: ``[B, T]`` int64, right-padded.
            at: ``[B, T]`` bool: positions to read, in row-major order.
        """
        hidden_BTH: Tensor = self.body(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(hidden_BTH[at])  # type: ignore[no-any-return]

    def values(self, input_ids: Tensor, select: Tensor) -> Tensor:
        """``[N]`` scalars of the states before the selected tokens, aligned as in ``Policy.forward``.

        Args:
            input_ids: ``[B, T]`` int64, right-padded.
            select: ``[B, T]`` bool; position 0 has no state before it and is ignored.
        """
        return self(input_ids[:, :-1], select[:, 1:])  # type: ignore[no-any-return]

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model takes, in tokens, if it says."""
        return getattr(self.body.config.get_text_config(), "max_position_embeddings", None)

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[B]`` scalars of whole rows: of the state after each row's last real token.

        Rows are packed to the left first. Whatever lies under the mask, on whichever side and however much of it, the
        body sees real tokens at positions 0, 1, ….

        Args:
            input_ids: ``[B, T]``; ids outside the mask may be anything.
            attention_mask: ``[B, T]`` bool or 0/1: real tokens.

        Raises:
            ValueError: If a row has no real token, or more than the model has positions: beyond them nothing fails by
                itself, and scores mean nothing.
        """
        packed_BT, lengths_B = pack_left(input_ids, attention_mask)
        longest, room = int(lengths_B.max()), self.max_positions
        if room is not None and longest > room:
            raise ValueError(
                f"a row of {longest} tokens is longer than the scalar model's {room} positions: shorten prompts "
                "(another template, max_prompt_tokens) or replies, or take a model of longer context."
            )
        if not bool((lengths_B > 0).all()):
            empty = (lengths_B == 0).nonzero()[:, 0].tolist()
            raise ValueError(
                f"rows {empty[:5]} have no token to score: their attention mask is 0 throughout."
            )
        places_T = torch.arange(packed_BT.shape[1], device=packed_BT.device)
        return self(packed_BT, places_T == lengths_B[:, None] - 1)  # type: ignore[no-any-return]

    # -- checkpoints and saving -------------------------------------------------------------------

    @property
    def has_adapters(self) -> bool:
        """Whether low-rank adapters are trained over a frozen body."""
        return bool(getattr(self.body, "peft_config", None))

    def frozen_names(self) -> set[str]:
        """Names of tensors that never change (the body under adapters); checkpoints leave them out."""
        return frozen_names(self)

    def sharded_apart(self) -> list[nn.Module]:
        """What FSDP2 must shard by itself: the head, because of its dtype."""
        return [self.head]

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write body (adapters merged into a copy), head and tokenizer, for :meth:`from_pretrained`.

        ``transformers.AutoModel`` loads the body alone.

        Args:
            folder: Destination.
            state_dict: Full (gathered) weights named as in ``self``, where parameters are sharded.

        Raises:
            ValueError: If adapters would be merged into quantised weights.
        """
        state = dict(self.state_dict() if state_dict is None else state_dict)
        parts: dict[str, dict[str, Tensor]] = {"body": {}, "head": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value.detach()
        body = merged_copy(self.body, parts["body"]) if self.has_adapters else self.body
        setattr(body.config, _SAVED_HEAD, HEAD_FILE)
        body.save_pretrained(folder, state_dict=None if body is not self.body else parts["body"])
        torch.save({k: v.cpu().clone() for k, v in parts["head"].items()}, Path(folder) / HEAD_FILE)
        self.tokenizer.save_pretrained(folder)


def pack_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Real tokens moved to the left in their order, 0 behind them, cut to the longest row.

    Args:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]`` bool or 0/1.

    Returns:
        ``[B, longest]`` ids and ``[B]`` lengths.
    """
    mask_BT = attention_mask.bool()
    lengths_B = mask_BT.sum(1)
    width = int(lengths_B.max()) if len(lengths_B) else 0
    order_BT = (~mask_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return input_ids.gather(1, order_BT).masked_fill(~mask_BT.gather(1, order_BT), 0), lengths_B
