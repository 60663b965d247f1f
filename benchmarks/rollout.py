"""Does `TransformersEngine` sample faster than `model.generate`, and with how much memory?

Both get the same prompts (ragged, left-padded), draw n completions each from the same randomly initialised
model and run alternately in one process. Response lengths are geometric: the output head gives the EOS token
a constant logit, so that a response ends with the same probability at every step and has a third of
`--max-new-tokens` on average. Only real tokens count: those up to and including the EOS. The engine also
returns log-probabilities; `generate` is not asked for them. On CUDA, `--continuous` adds transformers'
continuous batching.

    python benchmarks/rollout.py --sizes tiny,small --repeats 5 --threads 1
    python benchmarks/rollout.py --sizes qwen-0.5b-like,qwen-1.5b-like --device cuda --dtype bfloat16
    --continuous

Writes `benchmarks/results/rollout-*.json` (every run) and `.csv` (one line per size and lane).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine

# hidden, layers, heads, key-value heads, intermediate, vocabulary; the last two have the shapes of Qwen2.5
SIZES = {
    "tiny": (64, 2, 4, 2, 128, 512),
    "small": (512, 8, 8, 2, 1408, 32000),
    "qwen-0.5b-like": (896, 24, 14, 2, 4864, 151936),
    "qwen-1.5b-like": (1536, 28, 12, 2, 8960, 151936),
}
EOS = 1


class Decoder(nn.Module):
    """The engine's view of a Hugging Face model."""

    eos_token_ids = (EOS,)
    pad_token_id = 0

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def decode(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Next-token logits of the last position."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()

    def new_cache(self) -> DynamicCache:
        """An empty cache."""
        return DynamicCache(config=self.model.config)


def build(size: str, device: str, dtype: torch.dtype, end_probability: float) -> Decoder:
    """A random model whose responses end with a given probability per token."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SIZES[size]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=intermediate,
            vocab_size=vocabulary,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    )
    head = nn.Linear(hidden, vocabulary, bias=True)
    nn.init.normal_(
        head.weight, std=0.5 / math.sqrt(hidden)
    )  # logits ~ N(0, 0.5²): normed states have size √hidden
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.weight[EOS] = 0
        odds = math.log(end_probability) - math.log1p(-end_probability)
        head.bias[EOS] = odds + math.log(vocabulary - 1) + 0.5**2 / 2  # log of the others' expected mass
    model.lm_head = head
    return Decoder(model.to(device=device, dtype=dtype).eval())


@contextmanager
def peak_memory(device: str) -> Any:
    """Yields a list that receives the bytes by which memory rose at most."""
    result: list[int] = []
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        torch.cuda.synchronize()
        result.append(torch.cuda.max_memory_allocated() - before)
        return
    page = os.sysconf("SC_PAGE_SIZE")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which the next run would then use unseen
    done = threading.Event()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before = highest = resident()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.01):
            highest = max(highest, resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield result
    done.set()
    thread.join()
    result.append(max(highest, resident()) - before)


def lanes(
    decoder: Decoder, args: argparse.Namespace
) -> dict[str, Callable[[list[list[int]], int], list[int]]]:
    """By name: a function from prompts and a seed to the real length of every completion."""
    device = args.device

    def engine(prompts: list[list[int]], seed: int) -> list[int]:
        groups = TransformersEngine(decoder, max_rows=args.rows or len(prompts) * args.n).generate(
            prompts, args.n, Sampling(max_new_tokens=args.max_new_tokens), seed
        )
        return [len(c.ids) for group in groups for c in group]

    def generate(prompts: list[list[int]], seed: int) -> list[int]:
        torch.manual_seed(seed)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = decoder.model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=args.n,
            max_new_tokens=args.max_new_tokens,
        )[:, width:]
        ended = (out == EOS).cumsum(1) > 0
        return (~ended).sum(1).add(ended.any(1)).tolist()

    def continuous(prompts: list[list[int]], seed: int) -> list[int]:
        torch.manual_seed(seed)
        config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=args.max_new_tokens, eos_token_id=EOS, pad_token_id=0
        )
        repeated = [p for p in prompts for _ in range(args.n)]
        out = decoder.model.generate_batch(repeated, generation_config=config)
        if len(out) != len(repeated):
            raise RuntimeError(f"continuous batching returned {len(out)} of {len(repeated)} requests.")
        return [len(x.generated_tokens) for x in out.values()]

    chosen = {"engine": engine, "generate": generate}
    return chosen | {"continuous": continuous} if args.continuous else chosen


def measure(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per run."""
    decoder = build(size, args.device, getattr(torch, args.dtype), 3 / args.max_new_tokens)
    generator = torch.Generator().manual_seed(1)
    widths = torch.randint(args.min_prompt, args.max_prompt + 1, (args.prompts,), generator=generator)
    vocabulary = SIZES[size][-1]
    prompts = [torch.randint(2, vocabulary, (int(w),), generator=generator).tolist() for w in widths]
    functions = lanes(decoder, args)
    for function in functions.values():  # warm-up: allocator, thread pool, kernels
        function(prompts[:2], 0)
    records = []
    for repeat in range(args.repeats):
        for name in sorted(functions, reverse=bool(repeat % 2)):  # whoever goes first changes
            with peak_memory(args.device) as memory:
                start, cpu_start = time.perf_counter(), time.process_time()
                lengths = functions[name](prompts, repeat)
                if args.device != "cpu":
                    torch.cuda.synchronize()
                seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            records.append(
                {
                    "size": size,
                    "lane": name,
                    "repeat": repeat,
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    "tokens": sum(lengths),
                    "tokens_per_s": sum(lengths) / seconds,
                    "tokens_per_cpu_s": sum(lengths) / cpu_seconds,
                    "mean_length": statistics.mean(lengths),
                    "peak_mib": memory[0] / 2**20,
                }
            )
            print(json.dumps(records[-1]), flush=True)
    return records


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians per size and lane, and ratios to `generate` of the same repeat: by wall clock and by CPU time.

    CPU time hardly changes when other processes use the machine, wall-clock time does.
    """
    rows = []
    for size in dict.fromkeys(r["size"] for r in records):
        runs = [r for r in records if r["size"] == size]
        base = {r["repeat"]: r for r in runs if r["lane"] == "generate"}
        for lane in dict.fromkeys(r["lane"] for r in runs):
            mine = [r for r in runs if r["lane"] == lane]
            wall, cpu = (
                [r[key] / base[r["repeat"]][key] for r in mine]
                for key in ("tokens_per_s", "tokens_per_cpu_s")
            )
            rows.append(
                {
                    "size": size,
                    "lane": lane,
                    "repeats": len(mine),
                    "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in mine), 1),
                    "ratio_to_generate": round(statistics.median(wall), 2),
                    "ratio_min": round(min(wall), 2),
                    "ratio_max": round(max(wall), 2),
                    "ratio_by_cpu_time": round(statistics.median(cpu), 2),
                    "mean_length": round(statistics.mean(r["mean_length"] for r in mine), 1),
                    "peak_mib": round(statistics.median(r["peak_mib"] for r in mine), 1),
                }
            )
    return rows


def hardware(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": None if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="tiny,small", help=f"comma-separated, of {', '.join(SIZES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--min-prompt", type=int, default=32, help="tokens of the shortest prompt")
    parser.add_argument("--max-prompt", type=int, default=128, help="tokens of the longest prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--rows", type=int, default=0, help="rows the engine decodes at once; 0 = all, as generate"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--continuous", action="store_true", help="add transformers' continuous batching")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--tag", default="", help="goes into the names of the result files")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    records = [record for size in args.sizes.split(",") for record in measure(size, args)]
    summary = summarise(records)
    for row in summary:
        print(row)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = "-".join(filter(None, ["rollout", args.device.replace(":", ""), args.tag]))
    command = "python benchmarks/rollout.py " + " ".join(sys.argv[1:])
    report = {"command": command.strip(), "hardware": hardware(args.device), "arguments": vars(args)}
    (folder / f"{name}.json").write_text(
        json.dumps(report | {"summary": summary, "runs": records}, indent=1) + "\n"
    )
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*summary[0], *hardware(args.device)])
        writer.writeheader()
        writer.writerows(row | hardware(args.device) for row in summary)


if __name__ == "__main__":
    main()
