"""Write what the quickstart's teacher answers: text only, as a black-box teacher gives it.

One sampled answer (temperature 1) to each of so many training prompts of the task mix, with what a file collected from
an endpoint holds beside it. Held-out prompts are not among them.

Usage: python tools/make_teacher_text.py --out configs/quickstart/teacher_text.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lightning_onpolicy.datamodules import GymSource, PromptStream, RolloutMaker, Sampling
from lightning_onpolicy.datamodules.engines import TransformersEngine
from lightning_onpolicy.modules import ModelSpec

TEACHER = "onpolicy://quickstart/models/teacher"
OUT = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "teacher_text.jsonl"
SAMPLING = Sampling(temperature=1.0, max_new_tokens=24)
CHUNK = 256


def main(argv: Sequence[str] | None = None) -> None:
    """Sample and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--prompts", type=int, default=2048)
    args = parser.parse_args(argv)
    teacher = ModelSpec(TEACHER, dtype="float32").load()
    source = GymSource("onpolicy://quickstart/tasks.yaml", size=3 * args.prompts, seed=3, split="train")
    stream = PromptStream(source, teacher.tokenizer, seed=0)
    maker = RolloutMaker(TransformersEngine(teacher), teacher.tokenizer, group_size=1, sampling=SAMPLING)
    seen: set[str] = set()
    with args.out.open("w", encoding="utf-8") as out:
        for number in range(3 * args.prompts // CHUNK):
            for group in maker.sample(stream.take(CHUNK), seed=number):
                asked, (answer,) = str(group.prompt.row["prompt"]), group.completions
                if asked in seen or not answer.text.strip() or len(seen) == args.prompts:
                    continue
                seen.add(asked)
                row = {
                    "source": group.prompt.source,
                    "messages": [{"role": "user", "content": asked}],
                    "responses": [answer.text],
                    "finish_reasons": ["length" if answer.finish == "length" else "stop"],
                    "model": "quickstart/teacher",
                    "sampling": {"temperature": SAMPLING.temperature, "max_tokens": SAMPLING.max_new_tokens},
                }
                out.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    if len(seen) < args.prompts:
        raise RuntimeError(f"only {len(seen)} of {args.prompts} prompts differ: lower --prompts.")


if __name__ == "__main__":
    main()
