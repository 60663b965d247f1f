"""Verifier processes: whatever an item does, the others are scored and nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from processes import alive, eventually

from lightning_onpolicy.datamodules.phases import Phases, PhaseTimeout
from lightning_onpolicy.datamodules.rewards.workers import WorkerPool

VERIFIERS = """
import ctypes, json, os, socket, subprocess, sys, time

hoard = []

def double(x): return 2.0 * x
def pid(x): return os.getpid()
def value(x): return x

def act(item):
    what, argument = item if isinstance(item, tuple) else (item, None)
    if what == "loop":
        while True: pass
    if what == "bignum": return len(str(9 ** (9 ** 9)))
    if what == "sleep": time.sleep(argument or 3600)
    if what == "exit": os._exit(0)
    if what == "sysexit": sys.exit(0)
    if what == "segfault": ctypes.string_at(0)
    if what == "memory":
        while True: hoard.append(bytearray(2 ** 24))
    if what == "raise": raise ValueError("no such answer")
    if what == "stop": os.kill(os.getpid(), 19)
    if what == "print":
        print("[1.0]", flush=True); os.write(1, b"x" * 10 ** 6)
    if what == "read": return float(len(sys.stdin.read()))
    if what == "child":
        process = subprocess.Popen(["sleep", "3600"])
        open(argument, "w").write(str(process.pid))
        time.sleep(3600)
    if what == "write":
        open(argument, "wb").write(bytes(2 ** 27))
    if what == "environ": return float(os.environ.get("WORKER_TEST_TOKEN") is not None)
    if what == "forge":
        for fd in range(3, 64):
            try: socket.socket(fileno=os.dup(fd)).sendall(argument)
            except OSError: pass
        time.sleep(3600)
    return 1.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module of verifiers; workers find it through the parent's ``sys.path``."""
    name = f"verifiers_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(VERIFIERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.fixture
def act(module: str):
    """Makes pools over ``act`` that are closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            WorkerPool(f"{module}:act", **{"workers": 1, "deadline_s": 0.8, **settings})
        )


def test_results_come_in_order(module: str) -> None:
    with WorkerPool(f"{module}:double", workers=2, chunk=3) as pool:
        items = [float(i) for i in range(50)]
        assert pool.map(items) == [2 * x for x in items]
        assert pool.map([]) == []
        assert not pool.failures


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ("loop", "timeout"),
        ("bignum", "timeout"),
        ("sleep", "timeout"),
        ("stop", "timeout"),
        ("exit", "died"),
        ("segfault", "died"),
        ("sysexit", "error"),
        ("memory", "error"),
        ("raise", "error"),
    ],
)
def test_a_bad_item_is_none_and_the_others_are_scored(act, item: str, kind: str) -> None:
    pool = act(memory_bytes=2**28)
    start = time.monotonic()
    assert pool.map(["ok", item, "ok", "ok"]) == [1.0, None, 1.0, 1.0]
    assert pool.failures == {kind: 1}
    assert time.monotonic() - start < 5
    assert pool.map(["ok"]) == [1.0]


def test_one_stuck_item_does_not_hold_up_the_other_worker(act) -> None:
    pool = act(workers=2, deadline_s=1.0, chunk=1)
    pool.start()
    start = time.monotonic()
    assert pool.map(["loop", *["ok"] * 20]) == [None, *[1.0] * 20]
    assert time.monotonic() - start < 5


def test_every_item_has_a_deadline_of_its_own(act) -> None:
    pool = act()
    assert pool.map([("sleep", 0.3)] * 4) == [1.0] * 4  # 1.2 seconds in all, in one message


def test_a_timeout_kills_what_the_verifier_started(act, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    assert act().map([("child", str(note))]) == [None]
    assert eventually(lambda: not alive(int(note.read_text())))


def test_printing_and_reading_do_not_reach_the_wire(act) -> None:
    assert act().map(["print", "read", "ok"]) == [1.0, 0.0, 1.0]


def test_secrets_stay_with_the_parent(act, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_TEST_TOKEN", "secret")
    assert act().map(["environ"]) == [0.0]


def test_files_have_a_limit(act, tmp_path: Path) -> None:
    assert act(deadline_s=3.0).map([("write", str(tmp_path / "big"))]) == [None]
    assert (tmp_path / "big").stat().st_size <= 2**26


@pytest.mark.parametrize(
    "forged",
    [
        b'["guess", 0, 1.0, null, false]\n',
        b"[null, 0, 1.0, null]\n",
        b"1.0\n",
        b"[" * 10_000 + b"\n",
        pickle.dumps(1.0) + b"\n",
        b"x" * 2**18,
    ],
    ids=["token", "shape", "number", "nested", "pickle", "endless"],
)
def test_forged_answers_are_not_believed(act, forged: bytes) -> None:
    pool = act()
    assert pool.map([("forge", forged), "ok"]) == [None, 1.0]
    assert pool.failures == {"died": 1}


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (1, 1.0),
        (True, 1.0),
        (None, None),
        (float("nan"), None),
        (float("inf"), None),
        (10**400, None),
        ("x", None),
    ],
)
def test_only_finite_numbers_are_scores(module: str, value: object, score: float | None) -> None:
    with WorkerPool(f"{module}:value", workers=1) as pool:
        assert pool.map([value]) == [score]


def test_workers_are_replaced_after_max_tasks(module: str) -> None:
    with WorkerPool(f"{module}:pid", workers=1, max_tasks=3) as pool:
        pids = pool.map([None] * 7)
    assert [pids.count(p) for p in dict.fromkeys(pids)] == [3, 3, 1]


def test_messages_may_be_larger_than_any_pipe(module: str) -> None:
    with WorkerPool(f"{module}:act", workers=1) as pool:
        assert pool.map([("ok", "x" * 3_000_000)] * 2) == [1.0, 1.0]


def test_nothing_is_left_after_close(module: str) -> None:
    pool = WorkerPool(f"{module}:pid", workers=2, chunk=1)
    pool.start()
    pids = {int(p) for p in pool.map([None] * 40)}
    assert all(map(alive, pids))
    pool.close()
    assert not any(Path(f"/proc/{p}").exists() for p in pids)  # not even as zombies
    assert pool.map([None])[0] not in pids  # and it may be used again
    pool.close()


def test_a_forgotten_pool_ends_its_workers(module: str) -> None:
    pool = WorkerPool(f"{module}:pid", workers=1)
    pid = int(pool.map([None])[0])
    del pool
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()


def test_a_worker_killed_while_idle_is_replaced(module: str) -> None:
    with WorkerPool(f"{module}:pid", workers=1) as pool:
        pid = int(pool.map([None])[0])
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not alive(pid))
        assert pool.map([None, None])[1] not in (pid, None)
        assert not pool.failures


def test_an_interrupt_leaves_the_pool_usable(act) -> None:
    pool = act(deadline_s=30.0)
    pool.start()
    timer = threading.Timer(0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pool.map(["ok", "sleep", "ok"])
    timer.join()
    assert pool.map(["ok", "raise"]) == [1.0, None]


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_a_killed_parent(module: str, tmp_path: Path, busy: bool) -> None:
    note = tmp_path / "child"
    script = f"""
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        from lightning_onpolicy.datamodules.rewards.workers import WorkerPool
        pool = WorkerPool("{module}:act", workers=1, deadline_s=60)
        pool.start()
        print(pool._live[0].process.pid, flush=True)
        pool.map([("child", {str(note)!r})]) if {busy} else input()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    if busy:
        assert eventually(lambda: note.exists() and bool(note.read_text()))
    parent.kill()
    parent.communicate()
    assert eventually(lambda: not alive(worker))
    assert not busy or eventually(lambda: not alive(int(note.read_text())))


def test_a_fork_of_the_parent_starts_its_own_workers(module: str) -> None:
    with WorkerPool(f"{module}:pid", workers=1) as pool:
        mine = pool.map([None])[0]
        child = os.fork()
        if child == 0:
            theirs = pool.map([None])[0]
            pool.close()
            os._exit(0 if theirs not in (mine, None) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert pool.map([None])[0] == mine


def test_a_copy_starts_its_own_workers(module: str) -> None:
    with WorkerPool(f"{module}:pid", workers=1) as pool, pickle.loads(pickle.dumps(pool)) as copy:
        assert pool.map([None]) != copy.map([None])


def test_functions_are_found_by_name() -> None:
    with WorkerPool(os.path.getsize, workers=1) as pool:
        assert pool.map([os.devnull, "/nowhere"]) == [0.0, None]
    with pytest.raises(ValueError, match="importable module"):
        WorkerPool(lambda item: 1.0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:f", "did not start: ModuleNotFoundError.*no_such_module"),
        ("math:no_such_function", "did not start: AttributeError.*no_such_function"),
        ("math:pi", "did not start: TypeError.*not callable"),
    ],
)
def test_a_target_that_cannot_run_is_an_error(target: str, message: str) -> None:
    with WorkerPool(target, workers=1) as pool, pytest.raises(RuntimeError, match=message):
        pool.map([1.0])


def test_a_worker_that_never_starts_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(3600)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        WorkerPool("slow_to_import:f", workers=1, start_deadline_s=0.5) as pool,
        pytest.raises(RuntimeError, match=r"did not start: it took longer than 0\.5 s"),
    ):
        pool.map([1.0])


@pytest.mark.parametrize(
    "key", ["workers", "deadline_s", "memory_bytes", "max_tasks", "chunk", "start_deadline_s"]
)
def test_settings_are_checked(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be positive"):
        WorkerPool("math:sqrt", **{key: 0})
    with pytest.raises(ValueError, match="module:function"):
        WorkerPool("math.sqrt")


def test_neither_side_needs_torch() -> None:
    code = (
        "import sys, importlib; [importlib.import_module('lightning_onpolicy.datamodules.rewards.' + name) for name in "
        "'workers worker_main gym math stem instructions instruction_checks format composite lengths'.split()]; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_phase_deadline_reaches_a_waiting_pool(act) -> None:
    pool = act(deadline_s=30.0)
    pool.start()
    with pytest.raises(PhaseTimeout, match="reward"), Phases(0.3)("reward"):
        pool.map(["sleep"])
    assert pool.map(["ok"]) == [1.0]
