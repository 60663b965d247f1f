"""Is one optimizer step of full-vocabulary distillation faster than TRL's `DistillationTrainer`, in less memory?

Both sides get the same models (a Llama with random weights, tied embeddings; the teacher has the student's shape)
and the same rollouts, and take the same step: teacher forward, student forward, reverse KL over the whole
vocabulary, token mean over the step, backward, clipping at 1, AdamW. Generation is left out on both sides: TRL
receives the finished rollouts where it would generate them. Neither checkpoints activations (TRL would by default),
both compute in the same dtype, and each makes micro-batches its own way from one budget of positions: ours sorts by
length, TRL splits the batch as it was padded, prompts left and responses right.

`trainer.fit` and `trainer.train` really run, each in a thread of its own, and hand each other the turn after every
optimizer step; what is timed is the whole turn, with loader, hooks and logging. Before that, one step from the same
weights must give the same loss and gradient. Memory is measured in a fresh process per side, over models and data:
`peak_mib` includes gradients and the optimizer's state, `working_mib` is the peak less these (which both need).

    python benchmarks/distill_step.py --settings tiny,ragged,vocab50k --repeats 9 --threads 2
    python benchmarks/distill_step.py --device cuda

Needs `pip install trl==1.16.0`. Writes `distill-step-DEVICE.json` (every step), `.csv` (one line per setting and
side) and, where matplotlib is installed, `.png`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
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

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import PeakMemory, hardware, quantiles, synchronize, write_results  # noqa: E402

SIDES = ("ours", "trl")
WARM_UP = 2
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
        shortest = min(16, setting.prompt), min(8, setting.response)
        prompts = torch.randint(shortest[0], setting.prompt + 1, (setting.rows,), generator=g)
        tail = -torch.rand(setting.rows, generator=g).clamp(min=1e-6).log() * setting.response / 4
        responses = tail.long().clamp(shortest[1], setting.response)
        prompts[0], responses[0] = setting.prompt, setting.response
    groups = []
    for i, (p, r) in enumerate(zip(prompts.tolist(), responses.tolist(), strict=True)):
        logps = torch.full((r,), -torch.log(torch.tensor(float(setting.vocab))))
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


class Hooks:
    """What a run is asked to do at the end of every step, and before its first optimizer step."""

    def __init__(
        self,
        after_step: Callable[[], None] = lambda: None,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        self.after_step, self.before_update = after_step, before_update


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
    """A trainer that is ready: ``run()`` trains, then ``loss()`` is that of the last logged step."""

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
    """`OnPolicyDistill` in a Lightning Trainer."""
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
    """TRL's `DistillationTrainer` in its loop, given the rollouts it would otherwise generate."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class GivenRollouts(DistillationTrainer):  # type: ignore[misc]
        """Private to TRL as of 1.16, which has no public way to train on finished rollouts."""

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
            output_dir=tempfile.mkdtemp(prefix="distill-step-"),
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
    return Side(
        student,
        lambda: trainer.train() and None,
        lambda: float(next(x["loss"] for x in trainer.state.log_history if "loss" in x)),
    )


BUILDERS = {"ours": our_side, "trl": trl_side}


def agreement(setting: Setting, device: str) -> dict[str, float]:
    """Loss and gradient of one step from the same weights, unclipped, on both sides.

    Raises:
        ValueError: If the two sides do not compute the same thing.
    """
    losses, gradients = {}, {}
    for name in SIDES:
        found: dict[str, Tensor] = {}

        def keep(found: dict[str, Tensor] = found) -> None:
            found.update({k: p.grad.float().cpu().clone() for k, p in side.model.named_parameters()})

        side = BUILDERS[name](setting, device, 1, Hooks(before_update=keep), None)
        side.run()
        losses[name], gradients[name] = side.loss(), found
        del side
        _free(device)
    a, b = (torch.cat([gradients[name][k].flatten() for k in sorted(gradients["ours"])]) for name in SIDES)
    out = {
        "loss_ours": losses["ours"],
        "loss_trl": losses["trl"],
        "gradient_cosine": float(torch.dot(a, b) / (a.norm() * b.norm())),
        "gradient_norm_ratio": float(a.norm() / b.norm()),
    }
    tolerance = 1e-3 if device == "cpu" else 1e-2
    same_loss = abs(losses["ours"] / losses["trl"] - 1) < tolerance
    if not (same_loss and out["gradient_cosine"] > 0.999 and abs(out["gradient_norm_ratio"] - 1) < tolerance):
        raise ValueError(f"the two sides do not take the same step, so that times cannot be compared: {out}")
    return out


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


class Turns:
    """Two runs in two threads, of which one at a time moves: each hands over after every step.

    Args:
        device: Where to wait for finished work before a clock is read.
        steps: Steps of each run.
    """

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.steps = device, steps
        self.seconds: dict[str, list[float]] = {name: [] for name in SIDES}
        self.may_go = {name: threading.Semaphore(0) for name in SIDES}
        self.error: BaseException | None = None
        self._began = 0.0

    def take(self, name: str) -> None:
        """Wait for the turn."""
        self.may_go[name].acquire()
        if self.error is not None:
            raise RuntimeError("the other side failed.") from self.error
        self._began = time.perf_counter()

    def hand_over(self, name: str) -> None:
        """Note the time of the turn, let the other side go and, unless this was the last step, wait."""
        synchronize(self.device)
        self.seconds[name].append(time.perf_counter() - self._began)
        self.may_go[SIDES[1 - SIDES.index(name)]].release()
        if len(self.seconds[name]) < self.steps:
            self.take(name)

    def run(self, name: str, side: Side, threads: int) -> None:
        """Train to the end; a failure ends the other side too."""
        torch.set_num_threads(threads)  # OpenMP keeps this number per thread
        try:
            self.take(name)
            side.run()
        except BaseException as error:
            self.error = self.error or error
            for semaphore in self.may_go.values():
                semaphore.release()


def time_steps(setting: Setting, device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of ``repeats`` steps of each side, in turns, after the warm-up.

    Raises:
        RuntimeError: If a side failed.
    """
    steps = WARM_UP + repeats
    turns = Turns(device, steps)
    sides = {
        name: BUILDERS[name](setting, device, steps, Hooks(lambda name=name: turns.hand_over(name)), 1.0)
        for name in SIDES
    }
    threads = torch.get_num_threads()
    other = threading.Thread(target=turns.run, args=("trl", sides["trl"], threads))
    other.start()
    turns.may_go["ours"].release()
    turns.run("ours", sides["ours"], threads)  # Lightning installs signal handlers: main thread only
    other.join()
    if turns.error is not None:
        raise RuntimeError(f"a side failed after {turns.seconds}.") from turns.error
    return {name: seconds[WARM_UP:] for name, seconds in turns.seconds.items()}


def measure_memory(setting: Setting, device: str, name: str) -> dict[str, float]:
    """MiB by which one side's memory rises over models and data in its first steps; for a fresh process."""
    side = BUILDERS[name](setting, device, WARM_UP, Hooks(), 1.0)
    own = 3 * sum(p.numel() * p.element_size() for p in side.model.parameters())  # gradient and both moments
    memory = PeakMemory(device)
    side.run()
    peak = memory.rise()
    return {"peak_mib": peak / 2**20, "working_mib": (peak - own) / 2**20}


def memory_in_fresh_process(setting: str, args: argparse.Namespace, name: str) -> dict[str, float]:
    """:func:`measure_memory` in a process of its own."""
    command = [sys.executable, __file__, "--settings", setting, "--device", args.device, "--memory-of", name]
    command += ["--threads", str(args.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def summarise(
    setting: str, seconds: dict[str, list[float]], memory: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """One row per side. Ratios are TRL's over ours: above 1, ours is faster or smaller."""
    speed = quantiles([b / a for a, b in zip(seconds["ours"], seconds["trl"], strict=True)])
    rows = []
    for name in SIDES:
        low, median, high = quantiles(seconds[name])
        row = {
            "setting": setting,
            "side": name,
            "repeats": len(seconds[name]),
            "median_s": round(median, 4),
            "p20_s": round(low, 4),
            "p80_s": round(high, 4),
        }
        if name == "ours":
            row |= {
                "speedup": round(speed[1], 2),
                "speedup_p20": round(speed[0], 2),
                "speedup_p80": round(speed[2], 2),
            }
        else:
            row |= {"speedup": 1.0, "speedup_p20": 1.0, "speedup_p80": 1.0}
        for key in ("peak_mib", "working_mib"):
            row[key] = round(memory[name][key], 1)
            row[f"{key[:-4]}_share_of_trl"] = round(memory[name][key] / memory["trl"][key], 3)
        rows.append(row)
    return rows


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", default="", help=f"comma-separated, of {', '.join(SETTINGS)}")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps per side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--memory-of", choices=SIDES, help=argparse.SUPPRESS
    )  # what the fresh processes are for
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        print("skipped: trl is not installed here (pip install trl==1.16.0).")
        return
    torch.set_num_threads(args.threads)
    chosen = args.settings or ("tiny,ragged,vocab50k" if args.device == "cpu" else "qwen0.5b,qwen1.5b")
    names = chosen.split(",")
    if args.memory_of:
        print(json.dumps(measure_memory(SETTINGS[names[0]], args.device, args.memory_of)))
        return
    rows, runs = [], {}
    for name in names:
        same = agreement(SETTINGS[name], args.device)
        memory = {side: memory_in_fresh_process(name, args, side) for side in SIDES}
        seconds = time_steps(SETTINGS[name], args.device, args.repeats)
        _free(args.device)
        rows += summarise(name, seconds, memory)
        runs[name] = {"agreement": same, "seconds": seconds}
        print(*rows[-2:], same, sep="\n", flush=True)
    machine = hardware(args.device, "trl", "transformers", "lightning", "accelerate")
    write_results(args.out, f"distill-step-{args.device}", rows=rows, machine=machine, runs=runs)


if __name__ == "__main__":
    main()
