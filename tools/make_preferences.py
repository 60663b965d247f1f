"""Write pairs teacher ≻ student for the quickstart: the teacher's text against what the small reader samples.

Usage: python tools/make_preferences.py --out configs/quickstart/preferences.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lightning_onpolicy.datamodules import FileSource, PromptStream, RolloutMaker, Sampling
from lightning_onpolicy.datamodules.engines import TransformersEngine
from lightning_onpolicy.modules import ModelSpec

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
STUDENT = "onpolicy://quickstart/models/reader"
SAMPLING = Sampling(temperature=1.0, max_new_tokens=24)
CHUNK = 256


def main(argv: Sequence[str] | None = None) -> None:
    """Sample and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=QUICKSTART / "preferences.jsonl")
    parser.add_argument("--teacher", type=Path, default=QUICKSTART / "teacher_text.jsonl")
    parser.add_argument("--samples", type=int, default=2)
    args = parser.parse_args(argv)
    student = ModelSpec(STUDENT, dtype="float32").load()
    source = FileSource(args.teacher, response_key="responses")
    stream = PromptStream(source, student.tokenizer, shuffle=False)
    engine = TransformersEngine(student)
    maker = RolloutMaker(engine, student.tokenizer, group_size=args.samples, sampling=SAMPLING)
    with args.out.open("w", encoding="utf-8") as out:
        for number in range(-(-len(source) // CHUNK)):
            for group in maker.sample(stream.take(min(CHUNK, len(source) - number * CHUNK)), seed=number):
                chosen = group.prompt.row["response"]
                rejected = [
                    c.text for c in group.completions if c.finish != "length" and c.text not in chosen
                ]
                if rejected:
                    asked = group.prompt.row["messages"][0]["content"]
                    row = {
                        "source": group.prompt.source,
                        "prompt": asked,
                        "chosen": chosen,
                        "rejected": rejected,
                    }
                    out.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
