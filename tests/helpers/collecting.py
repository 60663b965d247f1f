"""``onpolicy collect`` in processes of their own, and what they leave behind: what its command-line tests share."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

from teacher_server import TeacherServer

KEY = "sk-test-0123456789abcdef"
ROWS, SAMPLES, CONCURRENCY = 8, 2, 3
MAIN = "from lightning_onpolicy.cli import main\nmain()\n"


def prompts_in(folder: Path) -> Path:
    """The folder, with prompts in it."""
    rows = [{"prompt": f"question {i}"} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(folder: Path, server: TeacherServer, *more: str) -> list[str]:
    """The command's arguments."""
    return [
        "collect",
        f"--prompts={folder}/rows.jsonl",
        f"--out={folder}/out.jsonl",
        "--model=teacher",
        f"--base_url={server.url}",
        f"--samples={SAMPLES}",
        "--seed=0",
        "--max_tokens=16",
        f"--concurrency={CONCURRENCY}",
        *more,
    ]


def start(code: str, args: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    with (folder / "said").open("ab") as said:
        return subprocess.Popen([sys.executable, "-c", code, *args], stdout=said, stderr=said, env=os.environ)


def answered(folder: Path) -> set[tuple[str, int]]:
    """Prompt and seed of every answer that a dead process had committed."""
    copies = folder / "copies"  # reading mends what a killed process left; that is the next run's to do
    copies.mkdir(exist_ok=True)
    for file in folder.glob("out.cache.sqlite*"):
        shutil.copy(file, copies)
    db = sqlite3.connect(copies / "out.cache.sqlite")
    tables = db.execute("SELECT name FROM sqlite_master WHERE name = 'answers'").fetchall()
    requests = [json.loads(text) for (text,) in db.execute("SELECT request FROM answers")] if tables else []
    db.close()
    shutil.rmtree(copies)
    return {(r["messages"][-1]["content"], r["seed"]) for r in requests}


def asked(server: TeacherServer, since: int = 0) -> Counter[tuple[str, int]]:
    """How often each prompt and seed was asked for."""
    return Counter((r["prompt"], r["seed"]) for r in server.requests[since:])


def check_complete(folder: Path, server: TeacherServer) -> None:
    """Every row once, in order, each answer from a request of its own."""
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["uid"] for row in rows] == [f"rows/{i}" for i in range(ROWS)]
    texts = [text for row in rows for text in row["responses"]]
    assert len(set(texts)) == ROWS * SAMPLES
    for row in rows:
        for seed, text in enumerate(row["responses"]):
            number = int(text.split()[1])
            sent = server.requests[number]
            assert (sent["prompt"], sent["seed"]) == (row["messages"][-1]["content"], seed)
