"""The policy: a Hugging Face causal LM whose output head computes token statistics instead of logits.

Legend: ``B`` sequences, ``T`` positions, ``H`` hidden size, ``V`` vocabulary, ``N`` selected tokens.

Token ``t`` is graded by the hidden state at ``t - 1``; only selected tokens reach the head, so ``[B, T, V]``
logits never exist. Batches are right-padded and attention is causal, hence real tokens never see padding and no
attention mask is needed in the training forward.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from lightning_onpolicy.kernels import LogProbHead, TeacherHead, TokenStats
from lightning_onpolicy.modules.logits import check_head, logit_scale
from lightning_onpolicy.modules.specs import LoraSpec as LoraSpec
from lightning_onpolicy.modules.specs import ModelSpec as ModelSpec


class Policy(nn.Module):
    """A causal LM that grades tokens (``forward``) and decodes (``decode``) without full logits.

    Args:
        model: A Hugging Face causal LM. Its output head is replaced by a
            :class:`~lightning_onpolicy.kernels.LogProbHead` that shares the weight, so ``model.generate`` and
            ``model.save_pretrained`` go on working.
        tokenizer: Its tokenizer.
        lora: Adapters to add; the base is then frozen.
        spec: Where the model came from, for checkpoints and model cards.

    Example:
        >>> import torch
        >>> from lightning_onpolicy.modules import ModelSpec
        >>> policy = ModelSpec("onpolicy://quickstart/models/student").load()
        >>> ids = torch.tensor([policy.tokenizer("1 2 3")["input_ids"]])
        >>> policy(ids, torch.ones_like(ids, dtype=torch.bool)).logp.shape[0] == ids.shape[1] - 1
        True
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, lora: LoraSpec | None = None, spec: ModelSpec | None = None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.spec = spec
        self.config = model.config
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output head: a causal language model is needed.")
        rows = head.weight.shape[0]
        vocab_size = 1 + max(
            tokenizer.get_vocab().values()
        )  # ids may have holes: len(tokenizer) can be too small
        if vocab_size > rows:
            raise ValueError(
                f"the tokenizer's ids go up to {vocab_size - 1}, the model's head has only {rows} rows: "
                "this is not the model's tokenizer."
            )
        text = model.config.get_text_config()
        model.set_output_embeddings(
            LogProbHead(
                head.weight,
                getattr(head, "bias", None),
                soft_cap=getattr(text, "final_logit_softcapping", None),
                logit_scale=logit_scale(text),
                vocab_size=vocab_size,
            )
        )
        check_head(model, model.get_output_embeddings())
        self.model = model
        if lora is not None:
            lora.add_to(model)
        if spec is not None and spec.gradient_checkpointing:
            recompute_activations(model)
        model.train()

    # -- what it is -------------------------------------------------------------------------------

    @property
    def head(self) -> LogProbHead:
        """The output head."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, LogProbHead)
        return head

    @property
    def has_adapters(self) -> bool:
        """Whether low-rank adapters are trained over a frozen base."""
        return bool(getattr(self.model, "peft_config", None))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the generation config's and the tokenizer's."""
        ids = self.model.generation_config.eos_token_id
        ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        if self.tokenizer.eos_token_id is not None and self.tokenizer.eos_token_id not in ids:
            ids.append(self.tokenizer.eos_token_id)
        if not ids:
            raise ValueError(
                "neither the generation config nor the tokenizer has an EOS id: set eos_token_id."
            )
        return tuple(int(i) for i in ids)

    @property
    def pad_token_id(self) -> int:
        """Id written into padding (the EOS id if the tokenizer has none; masks tell them apart)."""
        pad = self.tokenizer.pad_token_id
        return int(self.eos_token_ids[0] if pad is None else pad)

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model takes, in tokens, if it says."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    # -- forward passes ---------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, select: Tensor, **head: Any) -> TokenStats:
        """Statistics of the selected tokens.

        Args:
            input_ids: ``[B, T]`` int64, right-padded.
            select: ``[B, T]`` bool: tokens to grade. Position 0 has no context and must be False or is ignored.
            **head: Arguments of :func:`~lightning_onpolicy.kernels.token_stats`: ``outputs``, ``temperature``,
                ``teacher``, ….

        Returns:
            Statistics ``[N]``, in row-major order of ``select[:, 1:]``.
        """
        hidden_NH = self.hidden(input_ids, select)
        stats: TokenStats = self.head(hidden_NH, input_ids[:, 1:][select[:, 1:]], **head)
        return stats

    def hidden(self, input_ids: Tensor, select: Tensor) -> Tensor:
        """``[N, H]`` hidden states that predict the selected tokens (arguments as in :meth:`forward`).

        Raises:
            ValueError: If rows are longer than the model takes.
        """
        room = self.max_positions
        if room is not None and input_ids.shape[1] > room:
            raise ValueError(
                f"a row of {input_ids.shape[1]} tokens is longer than the model's {room} positions: bound prompts and "
                "responses (max_prompt_tokens, max_response_tokens, sampling.max_new_tokens), or take a model that "
                "takes more."
            )
        hidden_BTH: Tensor = self.model.base_model(
            input_ids=input_ids[:, :-1], use_cache=False
        ).last_hidden_state
        return hidden_BTH[select[:, 1:]]

    def decode(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """``[B, V]`` float32 next-token logits of the last position; ids the tokenizer lacks are -inf.

        See :class:`~lightning_onpolicy.datamodules.engines.Decoder`.
        """
        out = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return self.head.logits(out.last_hidden_state[:, -1])

    def new_cache(self) -> Any:
        """An empty key-value cache that fits the model.

        Raises:
            ValueError: If the model has none: its state would be lost from one token to the next.
        """
        body = self.model.base_model
        if "past_key_values" not in inspect.signature(body.forward).parameters:
            raise ValueError(
                f"{type(body).__name__} keeps no key-value cache (its forward takes no past_key_values), so this "
                "engine cannot sample from it: take another architecture, or an engine of a server that can."
            )
        return DynamicCache(config=self.config)

    def teacher_head(self, hidden_NH: Tensor) -> TeacherHead:
        """This model's view of tokens as a teacher: hidden states with the head that reads them."""
        head = self.head
        return TeacherHead(
            hidden_NH,
            head.weight,
            bias=head.bias,
            soft_cap=head.soft_cap,
            logit_scale=head.logit_scale,
            vocab_size=head.vocab_size,
        )

    # -- adapters and saving ----------------------------------------------------------------------

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The base model, as it was before adapters were added; restored also after an exception."""
        if not self.has_adapters:
            raise ValueError(
                "the policy has no adapters, so its base cannot be seen with adapters off: set lora."
            )
        self.model.disable_adapters()
        try:
            yield
        finally:
            self.model.enable_adapters()

    def frozen_names(self) -> set[str]:
        """Names of tensors that never change (the base under adapters); checkpoints leave them out.

        What quantised weights keep beside themselves is among them. Frozen adapters are not: those of a resettable
        reference change at a reset.
        """
        return frozen_names(self)

    def save_pretrained(
        self, folder: str | Path, *, merge: bool = True, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write weights, tokenizer and generation config as plain transformers (or peft) loads them.

        Args:
            folder: Destination.
            merge: With adapters: True adds them to a scratch copy of the weights and saves a whole model; False
                saves the adapters alone.
            state_dict: Full (gathered) weights named as in ``self.model``, where parameters are sharded.

        Raises:
            ValueError: If adapters would be merged into quantised weights.
        """
        from lightning_onpolicy.modules.saving import merged_copy

        if self.has_adapters and merge:
            plain = merged_copy(self.model, state_dict)
            plain.generation_config = self.model.generation_config
            plain.save_pretrained(folder)
        else:
            self.model.save_pretrained(folder, state_dict=dict(state_dict) if state_dict else None)
        self.tokenizer.save_pretrained(folder)

    def extra_repr(self) -> str:
        return f"spec={dataclasses.asdict(self.spec)}" if self.spec else ""


def recompute_activations(model: Any) -> None:
    """Activation checkpointing under its name of transformers 5.23 or, before it, the older one."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def frozen_names(module: nn.Module) -> set[str]:
    """Names in the state dict of tensors that no training changes, adapters aside."""
    every = module.named_parameters(remove_duplicate=False)  # a tied head has a second name
    trained = {name for name, p in every if p.requires_grad}
    return {name for name in module.state_dict() if name not in trained and ".lora_" not in name}
