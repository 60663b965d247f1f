"""What runs inside a sandbox: a small server that forks one process per test and sends its output home.

Started as ``python -I -S -c <loader> <fd> <this file, compiled>`` by
:mod:`~lightning_onpolicy.datamodules.rewards.sandbox_process`, behind whatever wall the tier has. It runs as the same
user as the program it tests, so nothing it says is believed: the other side holds the deadlines and bounds what it
reads. It never learns an expected output.

The wire, over one socket: both sides send frames, a 4-byte big-endian length and that many bytes. In:
``marshal`` of the :class:`dict` of settings, then one tuple per test, ``("run", stdin)`` or ``("call", function,
args as JSON, nonce)``. Out: an empty frame when ready, then per test the exit code (4 bytes, signed; negative:
killed by that signal; ``TOO_MUCH``: wrote more than it may) and what it wrote.
"""

# ruff: noqa: SIM105 (contextlib.suppress would cost every sandbox the import)
from __future__ import annotations

import fcntl
import gc
import marshal
import os
import resource
import select
import signal
import sys
import time

TYPE_CHECKING = False  # the module typing takes as long to import as everything else here
if TYPE_CHECKING:
    from typing import Any

TOO_MUCH = 1000  # no exit code
PR_SET_CHILD_SUBREAPER = 36
SWEEP_S = 1.0


def main(wire: int) -> None:
    """Serve tests until the other end closes the wire; then kill everything that the tests left."""
    settings: Any = marshal.loads(_frame(wire) or b"")
    if settings["folder"] is not None:
        os.chdir(settings["folder"])  # before: its parents may be closed to others
    if settings["uid"] is not None:  # for good: without CAP_SETUID there is no way back
        os.setgroups([])
        os.setgid(settings["uid"])
        os.setuid(settings["uid"])
    if settings["sweeps"]:
        adopt_orphans()
        settings["limits"]["NPROC"] += _tasks_of(os.getuid())  # the limit counts all processes of the user
    gc.freeze()  # a test's last garbage collection would copy every page that holds an object of ours
    _send(wire, b"")
    while (frame := _frame(wire)) is not None:
        test: Any = marshal.loads(frame)
        if not _serve(wire, test, settings):
            return  # this is the forked process, after the program: the interpreter ends as it always does
    if settings["sweeps"]:
        sweep()
        if os.getppid() != settings["parent"]:  # nobody else is left to do it
            import shutil

            shutil.rmtree(settings["folder"], ignore_errors=True)
    os._exit(0)


def _serve(wire: int, test: Any, settings: Any) -> bool:
    """Run one test; False in the process that was the test."""
    if test[0] == "call":
        import json  # noqa: F401 (here, so that the forks have it already)
    inlet, outlet = os.pipe()
    given = os.memfd_create("stdin")
    with open(os.dup(given), "wb") as file:
        file.write(test[1] if test[0] == "run" else b"")
    pid = os.fork()
    if pid == 0:
        _become(test[0], given, outlet, settings["limits"])
        if test[0] == "run":
            _run(settings["source"], "__main__")
        else:
            _call(settings["source"], *test[1:])
        return False
    os.close(outlet)
    os.close(given)
    code, output = _collect(wire, pid, inlet, settings["output_bytes"])
    os.close(inlet)
    try:
        _send(wire, code.to_bytes(4, "big", signed=True) + output)
    except ConnectionError:  # the other end has gone: the next read says so too
        pass
    return True


def _collect(wire: int, pid: int, inlet: int, most: int) -> tuple[int, bytes]:
    """Exit code and output of a process. Only the process itself is waited for: whoever else holds its pipe is
    not."""
    os.set_blocking(inlet, False)
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(wire, 0)  # a hang-up is always reported
    poll.register(inlet, select.POLLIN)
    poll.register(ended, select.POLLIN)
    output = bytearray()
    running = open_ = True
    while running and len(output) <= most:
        ready = dict(poll.poll())
        if wire in ready:
            break
        running = ended not in ready
        while open_ and (inlet in ready or not running) and len(output) <= most:
            try:
                data = os.read(inlet, 2**16)
            except BlockingIOError:
                break
            output += data
            if not data:
                open_ = False
                poll.unregister(inlet)
    os.close(ended)
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except OSError:  # it ended, or has not made its group yet
            pass
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return (TOO_MUCH if len(output) > most else code), bytes(output[:most])


def _become(kind: str, given: int, outlet: int, limits: dict[str, int]) -> None:
    """Turn a fork of the server into the process of a test: streams, no other descriptors, limits."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.lseek(given, 0, os.SEEK_SET)
    last = 2
    if kind == "run":
        streams = [given, outlet, null]
    else:  # a channel of its own for the result, so that printing is harmless
        streams, last = [null, null, null, outlet], 3
    # Out of the way first: a stream may sit on the number that another one gets.
    for number, stream in enumerate([fcntl.fcntl(s, fcntl.F_DUPFD, 10) for s in streams]):
        os.dup2(stream, number)
    os.closerange(last + 1, 2**16)
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _run(source: str, name: str) -> dict[str, Any]:
    """Execute a program in a module of that name and return what it defines."""
    module = type(sys)(name)
    sys.modules[name] = module
    sys.argv = ["solution.py"]
    exec(compile(source, "solution.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _call(source: str, function: str, args: str, nonce: bytes) -> None:
    """Call a function of the program; write the nonce and its result as JSON. ``Class.method``: on ``Class()``."""
    import json

    names = function.split(".")
    target: Any = _run(source, "solution")[names[0]]
    for name in names[1:]:
        target = getattr(target() if isinstance(target, type) else target, name)
    result = nonce + json.dumps(target(*json.loads(args))).encode()
    while result:
        result = result[os.write(3, result) :]
    os._exit(0)


def adopt_orphans() -> None:
    """Make this process the parent of all its descendants whose own parents end, so that ``sweep`` finds them."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def sweep(seconds: float = SWEEP_S) -> None:
    """Kill and reap every descendant of this process, in whatever session it is.

    Args:
        seconds: How long to try.

    Raises:
        RuntimeError: If some are still there in the end.
    """
    end = time.monotonic() + seconds
    while family := kill_descendants(os.getpid()):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if time.monotonic() > end:
            raise RuntimeError(f"processes {sorted(family)} could not be killed within {seconds:g} s.")
        time.sleep(0.001)


def kill_descendants(root: int) -> set[int]:
    """Kill all descendants of a process; who they were."""
    family: set[int] = set()
    # Stop them all before the first is killed: what is being killed one by one may fork faster than that.
    while (new := _descendants(root)) - family:
        _signal(new - family, signal.SIGSTOP)
        family |= new
    _signal(family, signal.SIGKILL)
    return family


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:  # it has just ended
            pass


def _descendants(root: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid, stat in _proc("stat"):
        children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(pid)
    found, todo = set(), [root]
    while todo:
        new = children.get(todo.pop(), [])
        found.update(new)
        todo += new
    return found


def _tasks_of(uid: int) -> int:
    count = 0
    for _, status in _proc("status"):
        fields = dict(line.partition(":")[::2] for line in status.splitlines())
        count += int(fields.get("Threads", 1)) if int(fields["Uid"].split()[0]) == uid else 0
    return count


def _proc(name: str) -> list[tuple[int, str]]:
    """``(process id, text of that file)`` of every process."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/{name}", errors="replace") as file:
                found.append((int(pid), file.read()))
        except OSError:  # it has just ended
            pass
    return found


def _send(wire: int, data: bytes) -> None:
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(wire, data) :]


def _frame(wire: int) -> bytes | None:
    head = _exactly(wire, 4)
    return None if head is None else _exactly(wire, int.from_bytes(head, "big"))


def _exactly(wire: int, size: int) -> bytes | None:
    """``size`` bytes, or None if the other end has gone."""
    parts = bytearray()
    while len(parts) < size:
        try:
            part = os.read(wire, min(size - len(parts), 2**20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)


if __name__ == "__main__":
    main(int(sys.argv[1]))
