"""The two sides of `distill_step.py`: settings, models, rollouts, and a ready trainer of each library.

Legend: ``B`` sequences, ``P`` and ``R`` tokens of the longest prompt and response.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, Sampling, collate
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.onpolicy import LoopSpec, adamw
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.teachers import FrozenPolicy

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


def build_rollouts(setting: Setting) -> RolloutBatch:
    """Random tokens. Ragged lengths are a quarter of the longest response on average, and one is the longest."""
    g = torch.Generator().manual_seed(1)

    def ids(length: int) -> Tensor:
        return torch.randint(2, setting.vocab, (length,), generator=g)

    prompts = torch.full((setting.rows,), setting.prompt)
    responses = torch.full((setting.rows,), setting.response)
    if setting.ragged:
        shortest = max(1, setting.prompt // 4), max(1, setting.response // 56)
        prompts = torch.randint(shortest[0], setting.prompt + 1, (setting.rows,), generator=g)
        tail = -torch.rand(setting.rows, generator=g).clamp(min=1e-6).log() * setting.response / 4
        responses = tail.long().clamp(shortest[1], setting.response)
        prompts[0], responses[0] = setting.prompt, setting.response
    groups = []
    for i, (p, r) in enumerate(zip(prompts.tolist(), responses.tolist(), strict=True)):
        logps = torch.full((r,), -math.log(setting.vocab))
        completion = Completion(ids(r), logps, "length")
        groups.append(Group(Prompt(tuple(ids(p).tolist()), "", uid=str(i)), (completion,)))
    return collate(groups, PAD, sampling=Sampling(max_new_tokens=setting.response))


def trl_rollouts(batch: RolloutBatch) -> dict[str, Tensor]:
    """The rollouts in the form TRL generates them in: prompts padded on the left, responses on the right."""
    prompt_lengths, response_lengths = batch.lengths - batch.response_lengths, batch.response_lengths
    P, R = int(prompt_lengths.max()), int(response_lengths.max())
    shape = (len(batch), P), (len(batch), R)
    out = {
        "prompt_ids": torch.full(shape[0], PAD),
        "prompt_mask": torch.zeros(shape[0], dtype=torch.long),
        "completion_ids": torch.full(shape[1], PAD),
        "completion_mask": torch.zeros(shape[1], dtype=torch.long),
        "num_items_in_batch": response_lengths.sum(),
    }
    for b, (p, r) in enumerate(zip(prompt_lengths.tolist(), response_lengths.tolist(), strict=True)):
        out["prompt_ids"][b, P - p :] = batch.input_ids[b, :p]
        out["prompt_mask"][b, P - p :] = 1
        out["completion_ids"][b, :r] = batch.input_ids[b, p : p + r]
        out["completion_mask"][b, :r] = 1
    return out


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """What a run does at the end of every step, and before every update of the weights."""

    after_step: Callable[[], None] = _nothing
    before_update: Callable[[], None] = _nothing


class LightningHooks(pl.Callback):
    """Hooks of our side."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks

    def on_before_optimizer_step(self, *_: Any) -> None:
        """All gradients are there."""
        self.hooks.before_update()

    def on_train_batch_end(self, *_: Any) -> None:
        """One step is done."""
        self.hooks.after_step()


class TransformersHooks(TrainerCallback):
    """Hooks of TRL's side."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """All gradients are there."""
        self.hooks.before_update()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """One step is done."""
        self.hooks.after_step()


@dataclass(frozen=True)
class Side:
    """A trainer that is ready.

    Args:
        model: The student.
        run: Train to the end.
        loss: The loss of a run of one step, afterwards.
    """

    model: Any
    run: Callable[[], None]
    loss: Callable[[], float]


class Repeated:
    """The same batch ``count`` times."""

    def __init__(self, batch: RolloutBatch, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[RolloutBatch]:
        return iter([self.batch] * self.count)


def our_side(setting: Setting, device: str, steps: int, hooks: Hooks, clip: float | None) -> Side:
    """`OnPolicyDistill` in a Lightning Trainer, with its default optimizer.

    Args:
        setting: Model and rollouts.
        device: ``"cpu"`` or ``"cuda"``.
        steps: Optimizer steps to train for.
        hooks: What to do on the way.
        clip: Largest gradient norm, or None.
    """
    tokenizer = build_tokenizer(setting.vocab)
    student, teacher = (build_model(setting, seed, device) for seed in (0, 1))
    module = OnPolicyDistill(
        Policy(student, tokenizer),
        FrozenPolicy(teacher, tokenizer),
        optimizer=adamw,
        loop=LoopSpec(micro_batch_tokens=setting.positions, max_grad_norm=clip),
    )
    trainer = pl.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[LightningHooks(hooks)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = Repeated(build_rollouts(setting).to(device), steps)
    return Side(
        student,
        lambda: trainer.fit(module, train_dataloaders=loader),
        lambda: float(trainer.callback_metrics["train/loss"]),
    )


def trl_side(setting: Setting, device: str, steps: int, hooks: Hooks, clip: float | None) -> Side:
    """TRL's `DistillationTrainer` in its loop, with its default AdamW and our hyper-parameters.

    Args:
        setting: Model and rollouts.
        device: ``"cpu"`` or ``"cuda"``.
        steps: Optimizer steps to train for.
        hooks: What to do on the way.
        clip: Largest gradient norm, or None.
    """
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class GivenRollouts(DistillationTrainer):  # type: ignore[misc]
        """Trains on finished rollouts, for which TRL 1.16 has no public way: what it generates is replaced."""

        def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Tensor]:
            return dict(rollouts)

    rollouts = {name: value.to(device) for name, value in trl_rollouts(build_rollouts(setting)).items()}
    student, teacher = (build_model(setting, seed, device) for seed in (0, 1))
    rows = setting.rows_per_micro_batch
    defaults = adamw([torch.nn.Parameter(torch.zeros(1))]).defaults
    trainer = GivenRollouts(
        model=student,
        teacher_model=teacher,
        processing_class=build_tokenizer(setting.vocab),
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(setting.rows * steps)]}),
        args=DistillationConfig(
            output_dir=str(Path(tempfile.gettempdir()) / "distill-step"),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=setting.rows // rows,
            max_steps=steps,
            learning_rate=defaults["lr"],
            adam_beta1=defaults["betas"][0],
            adam_beta2=defaults["betas"][1],
            adam_epsilon=defaults["eps"],
            weight_decay=defaults["weight_decay"],
            lr_scheduler_type="constant",
            max_grad_norm=clip or 0.0,
            beta=1.0,
            gradient_checkpointing=False,
            bf16=False,  # no autocast: the weights are bfloat16 where the device is CUDA, as on our side
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            logging_steps=1 if steps == 1 else 10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        callbacks=[TransformersHooks(hooks)],
    )

    def run() -> None:
        trainer.train()

    return Side(
        student,
        run,
        lambda: float(next(x["loss"] for x in trainer.state.log_history if "loss" in x)),
    )


BUILDERS = {"ours": our_side, "trl": trl_side}
