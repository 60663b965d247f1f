"""The trusted end of one sandbox: starts it, holds the deadlines, believes nothing that comes out of it."""

from __future__ import annotations

import functools
import marshal
import math
import os
import secrets
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from lightning_onpolicy.datamodules.rewards import scratch
from lightning_onpolicy.datamodules.rewards.sandbox_child import TOO_MUCH, kill_descendants, sweep
from lightning_onpolicy.datamodules.rewards.tiers import Tier, Wall, interpreter

LOADER = (
    "import marshal, sys; exec(marshal.loads(bytes.fromhex(sys.argv[2])))  # a sandbox of lightning-onpolicy"
)
START_S = 20.0
STOP_S = 2.0  # more than the server takes to sweep


class SandboxError(RuntimeError):
    """A sandbox did not start or failed by itself: no fault of the program, which gets no score for it."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        wall_s: Seconds per test, on the clock.
        cpu_s: CPU seconds per process; None: ``wall_s``, rounded up, and one more, so that a busy thread meets the
            clock first and its test ends as ``timeout``.
        memory_bytes: Address space of each process.
        output_bytes: Most it may write to its standard output.
        file_bytes: Largest file it may write.
        processes: Processes and threads at a time, itself included.
        files: Open files of each process.

    Raises:
        ValueError: If one is not positive.
    """

    wall_s: float = 5.0
    cpu_s: int | None = None
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**20
    file_bytes: int = 8 * 2**20
    processes: int = 16
    files: int = 64

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{key} must be positive, got {value!r}.")

    def resources(self) -> dict[str, int]:
        """The same as names and values of ``setrlimit``."""
        return {
            "CORE": 0,
            "CPU": self.cpu_s or math.ceil(self.wall_s) + 1,
            "AS": self.memory_bytes,
            "FSIZE": self.file_bytes,
            "NOFILE": self.files,
            "NPROC": self.processes,
        }


@dataclass(frozen=True)
class Outcome:
    """How a test ended.

    Args:
        status: ``ok``: exit code 0. ``error``: another one, a signal, or a function that did not return. ``timeout``:
            longer than ``wall_s``. ``output``: more than ``output_bytes``. ``broken``: it took the sandbox down.
        output: What it wrote to its standard output or, after a call, the result as JSON. Not to be trusted.
    """

    status: Literal["ok", "error", "timeout", "output", "broken"]
    output: bytes = b""


class SandboxProcess:
    """One sandbox with one program, started at once. Tests run in it one after the other, each in a process of its
    own; once one was ``broken`` or ran out of time, the sandbox is over (``alive``).

    Args:
        wall: What stands around it.
        limits: Of each test.
        source: The program.
        errors: Where the sandbox itself (not the program) may write why it fails.
        guardian: Whether this process has called ``adopt_orphans`` and has no other children, so that in the lower
            tier everything below it can be killed in the end.

    Raises:
        SandboxError: If it does not start.
    """

    def __init__(
        self,
        wall: Wall,
        limits: Limits,
        source: str,
        errors: IO[bytes] | None = None,
        guardian: bool = False,
    ) -> None:
        self.wall, self.limits, self.guardian, self.alive = wall, limits, guardian, True
        uid = wall.user()
        self.folder = scratch.make(uid) if wall.tier is Tier.SUBPROCESS else None
        self.wire, far = socket.socketpair()
        with far:
            self.process = subprocess.Popen(
                [
                    *wall.command,
                    str(interpreter()),
                    "-I",
                    "-S",
                    "-X",
                    "utf8",
                    "-c",
                    LOADER,
                    str(far.fileno()),
                    _child(),
                ],
                pass_fds=[far.fileno()],
                start_new_session=True,
                env=_environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors or subprocess.DEVNULL,
            )
        settings = {
            "uid": uid,
            "source": source,
            "folder": self.folder,
            "parent": os.getpid(),
            "sweeps": wall.tier is Tier.SUBPROCESS,
            "limits": limits.resources() | {"NPROC": limits.processes + self._servers()},
            "output_bytes": limits.output_bytes,
        }
        try:
            self._send(marshal.dumps(settings), START_S)
            self._receive(time.monotonic() + START_S, 0)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise SandboxError(f"a sandbox ({wall.tier.label}) did not start: {error}.") from error
            raise

    def _servers(self) -> int:
        """How many processes of ours count against the limit on the program's."""
        if self.wall.tier is Tier.SUBPROCESS:
            return 0  # the server counts, itself included
        return 1 if self.wall.fresh_user else 2  # bwrap's init is root's, or the same user's

    def run(self, stdin: str = "") -> Outcome:
        """Run the program with that standard input.

        Raises:
            SandboxError: If the sandbox failed by itself.
        """
        return self._test(("run", stdin.encode(errors="surrogatepass")))

    def call(self, function: str, args: str) -> Outcome:
        """Call a function that the program defines, with arguments given as JSON.

        The result comes on a channel of its own behind a number made for this call, so that a program which
        prints, exits early or ends its process has not returned anything.

        Raises:
            SandboxError: If the sandbox failed by itself.
        """
        nonce = secrets.token_hex(16).encode()
        outcome = self._test(("call", function, args, nonce))
        if outcome.status != "ok":
            return outcome
        if not outcome.output.startswith(nonce):
            return Outcome("error")
        return Outcome("ok", outcome.output[len(nonce) :])

    def _test(self, test: tuple[Any, ...]) -> Outcome:
        end = time.monotonic() + self.limits.wall_s
        try:
            self._send(marshal.dumps(test), self.limits.wall_s)
            answer = self._receive(end, 4 + self.limits.output_bytes)
        except TimeoutError:
            self.close()
            return Outcome("timeout")
        except OSError as error:
            code = self.close()
            if code == 1:  # an exception in the server: it has no other way to end with this code
                raise SandboxError(f"a sandbox ({self.wall.tier.label}) failed by itself.") from error
            return Outcome("broken")
        code = int.from_bytes(answer[:4], "big", signed=True)
        output = answer[4:]
        return Outcome("output" if code == TOO_MUCH else "error" if code else "ok", output)

    def close(self) -> int:
        """End the sandbox and all that is in it; its exit code."""
        self.alive = False
        if self.wall.tier is Tier.BUBBLEWRAP:
            self.process.kill()  # the namespace's init dies with it, and everything with that
            self._until_closed()
        else:
            self.process.send_signal(signal.SIGCONT)  # the program may have stopped it
        self.wire.close()  # on this the server of the lower tier kills what its tests left, and ends
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:  # a test has stopped it for good, by tracing it for example
            kill_descendants(self.process.pid)
            os.killpg(self.process.pid, signal.SIGKILL)
            code = self.process.wait()
        if self.folder is not None:
            if self.guardian:
                sweep()
            scratch.remove(self.folder)
        return code

    def _until_closed(self) -> None:
        """Wait until nobody is left at the other end, so that the machine is free when the next program starts."""
        self.wire.settimeout(1.0)
        try:
            while self.wire.recv(2**16):
                pass
        except OSError:
            pass

    def _send(self, data: bytes, seconds: float) -> None:
        self.wire.settimeout(seconds)
        self.wire.sendall(len(data).to_bytes(4, "big") + data)

    def _receive(self, end: float, most: int) -> bytes:
        """One frame of at most that many bytes, before that time on the monotonic clock."""
        size = int.from_bytes(self._exactly(end, 4), "big")
        if size > most:
            raise ConnectionError(f"the server announced {size} bytes")
        return self._exactly(end, size)

    def _exactly(self, end: float, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self.wire.settimeout(max(end - time.monotonic(), 1e-3))
            part = self.wire.recv(min(size - len(parts), 2**20))
            if not part:
                raise ConnectionError("its process ended")
            parts += part
        return bytes(parts)


@functools.cache
def _child() -> str:
    """The server's code, compiled here: the same interpreter runs it, and compiling takes as long as starting."""
    source = Path(__file__).with_name("sandbox_child.py")
    code = compile(source.read_text(encoding="utf-8"), source.name, "exec", dont_inherit=True)
    return marshal.dumps(code).hex()


def _environment(folder: str | None) -> dict[str, str]:
    """Nothing of ours but what the interpreter may need to start, and where temporary files go."""
    names = {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH"), "TMPDIR": folder}
    return {key: value for key, value in names.items() if value}
