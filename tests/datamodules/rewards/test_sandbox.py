"""The sandbox: which tier, under which limits, and what it says."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import alive, eventually

from lightning_onpolicy.datamodules.rewards import sandbox, scratch
from lightning_onpolicy.datamodules.rewards.sandbox import Sandbox, TierError, choose, find
from lightning_onpolicy.datamodules.rewards.sandbox_process import Limits, SandboxError, SandboxProcess
from lightning_onpolicy.datamodules.rewards.tiers import Tier, Wall


@pytest.fixture(params=list(Tier), ids=[tier.label for tier in Tier])
def box(request: pytest.FixtureRequest) -> Sandbox:
    found = find(request.param)
    if not isinstance(found, Wall):
        pytest.skip(f"tier {request.param.label}: {found}")
    return Sandbox(request.param.label, limits=Limits(wall_s=2.0, memory_bytes=2**28, output_bytes=1000))


@pytest.fixture
def forgetful():
    """What is found out about the machine does not outlive the test."""
    find.cache_clear()
    yield
    find.cache_clear()


def test_a_program_gets_its_input_and_gives_its_output(box: Sandbox) -> None:
    assert box.run("print(input()[::-1], input())", "abc\n1").output == b"cba 1\n"
    assert box.run("print(open(0).read())", "1\n2").output == b"1\n2\n"
    assert box.run("import sys; print(len(sys.stdin.read()))", "x" * 3_000_000).output == b"3000000\n"
    assert box.run("print('é', input())", "ü").output == "é ü\n".encode()


def test_the_server_is_out_of_a_programs_sight(box: Sandbox) -> None:
    assert box.run("import sys; print(sys.argv, 'marshal' in globals())").output == b"['solution.py'] False\n"
    # What the server made is not collected at a program's end, which would copy its pages.
    assert box.run("import gc; print(gc.get_freeze_count() > 1000)").output == b"True\n"


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("pass", "ok"),
        ("raise SystemExit(3)", "error"),
        ("1 / 0", "error"),
        ("import os; os.kill(os.getpid(), 9)", "error"),
        ("print('x' * 1001)", "output"),
        ("import time; time.sleep(60)", "timeout"),
        ("import os; os.kill(os.getppid(), 9); import time; time.sleep(1)", "broken"),
        ("x = bytearray(2 ** 29)", "error"),
        ("open('f', 'wb').write(bytes(2 ** 24)); open('f', 'ab').write(b'x')", "error"),
        ("[open('/dev/null') for _ in range(100)]; x = [open('/dev/null') for _ in range(100)]", "error"),
    ],
)
def test_how_it_ends(box: Sandbox, source: str, status: str) -> None:
    assert box.run(source).status == status


def test_cpu_time_has_a_limit_of_its_own(box: Sandbox) -> None:
    patient = Sandbox(box.wall.tier.label, limits=Limits(wall_s=20.0, cpu_s=1))
    start = time.monotonic()
    assert patient.run("while True: pass").status == "error"
    assert time.monotonic() - start < 15


def test_output_before_the_end_is_kept_and_threads_are_waited_for(box: Sandbox) -> None:
    source = "import threading, time\ndef work(): time.sleep(0.1); print('late')\nthreading.Thread(target=work).start()"
    assert box.run(source).output == b"late\n"


def test_tests_of_one_program_do_not_share_their_memory(box: Sandbox) -> None:
    with box.open("seen = []\ndef add(x): seen.append(x); return seen") as program:
        assert [program.call("add", f"[{i}]").output for i in range(2)] == [b"[0]", b"[1]"]


def test_a_program_goes_on_after_a_test_that_took_the_sandbox_down(box: Sandbox) -> None:
    source = "import os\nn = int(input())\nif n == 1: os.kill(os.getppid(), 9)\nwhile n == 2: pass\nprint(n)"
    with box.open(source) as program:
        assert [program.run(str(n)).status for n in range(4)] == ["ok", "broken", "timeout", "ok"]


def test_calls(box: Sandbox) -> None:
    source = """
import sys
class Solution:
    def __init__(self): self.base = 10
    def add(self, x, y): print("noise"); return [self.base + x + y, None, {"k": (1.5,)}]
def fails(): return 1 / 0
def prints(): return {1, 2}
if __name__ == "__main__": sys.exit("run as a program")
"""
    with box.open(source) as program:
        assert program.call("Solution.add", "[1, 2]").output == b'[13, null, {"k": [1.5]}]'
        assert [program.call(f, "[]").status for f in ("fails", "prints", "missing", "Solution.add")] == [
            "error"
        ] * 4


def test_a_program_sees_nothing_of_ours(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    seen = eval(
        box.run("import os, sys; print((dict(os.environ), sys.argv, os.listdir('.'), sys.path))").output
    )
    assert set(seen[0]) <= {"TMPDIR", "PWD", "LC_CTYPE", "LD_LIBRARY_PATH"}
    assert seen[1:3] == (["solution.py"], [])
    assert not any("site-packages" in path for path in seen[3])


def test_temporary_files_work_and_go_away(box: Sandbox) -> None:
    outcome = box.run("import tempfile; f = tempfile.NamedTemporaryFile(delete=False); print(f.name)")
    assert outcome.status == "ok"
    assert not Path(outcome.output.decode().strip()).exists()


def test_it_works_in_threads_at_once(box: Sandbox) -> None:
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(box.run(f"print({i})").output)) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [f"{i}\n".encode() for i in range(6)]


def test_a_sandbox_ends_with_who_started_it(box: Sandbox, tmp_path: Path) -> None:
    script = (
        "from lightning_onpolicy.datamodules.rewards.sandbox import Sandbox, Limits\n"
        f"box = Sandbox({box.wall.tier.label!r}, limits=Limits(wall_s=60.0))\n"
        "program = box.open('print(1)').__enter__(); program.run()\n"
        "print(program._process.process.pid, flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.communicate()
    assert eventually(lambda: not alive(pid))


def test_auto_takes_the_strongest_tier() -> None:
    found = [wall for tier in Tier if isinstance(wall := find(tier), Wall)]
    assert choose() == found[-1]


def test_without_bubblewrap_the_floor_is_used_or_refused(
    monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert choose().tier is Tier.SUBPROCESS
    with pytest.raises(TierError, match=r"bubblewrap: bwrap is not installed.*apt-get install bubblewrap"):
        Sandbox(minimum_tier="bubblewrap")
    with pytest.raises(TierError, match="tier='bubblewrap'"):
        Sandbox("bubblewrap")


def test_bubblewrap_that_is_refused_says_why_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert choose().tier is Tier.SUBPROCESS
    with pytest.raises(TierError, match=r"No permissions to create new namespace.*seccomp.*AppArmor"):
        choose(minimum_tier="bubblewrap")


def test_a_sandbox_that_does_not_start_is_an_error() -> None:
    with pytest.raises(SandboxError, match="did not start"):
        SandboxProcess(Wall(Tier.BUBBLEWRAP, ("/bin/false",)), Limits(), "")


def test_other_systems_are_told(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(TierError, match="needs Linux"):
        choose()


def test_tiers_are_checked() -> None:
    with pytest.raises(
        ValueError, match=r"minimum_tier must be one of \['subprocess', 'bubblewrap'\], got 'vm'"
    ):
        Sandbox(minimum_tier="vm")
    with pytest.raises(ValueError, match="tier must be one of"):
        Sandbox("docker")
    with pytest.raises(ValueError, match="tier='subprocess' is below minimum_tier='bubblewrap'"):
        Sandbox("subprocess", "bubblewrap")


@pytest.mark.parametrize(
    "key", ["wall_s", "cpu_s", "memory_bytes", "output_bytes", "file_bytes", "processes", "files"]
)
def test_limits_are_checked(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be positive, got 0"):
        Limits(**{key: 0})


def test_the_statement_is_made_once_and_names_what_is_not_stopped(caplog: pytest.LogCaptureFixture) -> None:
    sandbox._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        Sandbox("subprocess")
        Sandbox("subprocess")
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Sandbox tier in use: subprocess. It stops: ")
    assert "network" in caplog.messages[0].split("It does not stop: ")[1]


@pytest.mark.parametrize(
    ("wall", "stopped", "not_stopped"),
    [
        (Wall(Tier.SUBPROCESS), "fork bombs", "this user's files and processes"),
        (Wall(Tier.SUBPROCESS, unlimited_forks=True), "output", "fork bombs"),
        (Wall(Tier.SUBPROCESS, fresh_user=True), "files that are not open to all", "network"),
        (Wall(Tier.BUBBLEWRAP), "network", "bugs of the kernel"),
    ],
)
def test_statements(wall: Wall, stopped: str, not_stopped: str) -> None:
    stops, _, leaves = wall.statement().partition("It does not stop: ")
    assert stopped in stops and stopped not in leaves
    assert not_stopped in leaves and not_stopped not in stops


def test_folders_of_any_shape_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "canary").write_text("x")
    folder = scratch.make(None)
    (Path(folder) / "link").symlink_to(tmp_path / "outside")
    (Path(folder) / "closed").mkdir()
    (Path(folder) / "closed" / "file").write_text("x")
    (Path(folder) / "closed").chmod(0)
    here = os.open(folder, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    scratch.remove(folder)
    assert not list((tmp_path / "tmp").iterdir())
    assert (tmp_path / "outside" / "canary").read_text() == "x"
