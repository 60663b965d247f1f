"""Programs and answers that mean harm: what each tries, and which wall stops it.

To add a program, append a ``Hostile`` to ``PROGRAMS``; to add an answer to a verifier of texts, a string to
``ANSWERS``. Everything here must stay harmless *where no wall stands at all*: loops end with the deadline of their
test or after a fixed count, what is forked sleeps and ends by itself, the network is this machine's loopback, files
are canaries of the test, and signals go to processes that the test started (0 to anybody else).

A program whose success would be an effect sets ``reached``; it then prints the right answer, so that a score above 0
*is* the proof that it got through.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from lightning_onpolicy.datamodules.rewards.sandbox_process import LOADER
from lightning_onpolicy.datamodules.rewards.tiers import Tier, Wall

SECRET = f"onpolicy-{secrets.token_hex(16)}"  # an expected output that cannot be computed, only found
SQUARE: list[dict[str, Any]] = [{"stdin": "7", "stdout": "49"}]
FUNCTION: list[dict[str, Any]] = [{"function": "square", "args": [7], "expected": 49}]
HIDDEN: list[dict[str, Any]] = [{"stdin": "1", "stdout": SECRET}]
HIDDEN_FUNCTION: list[dict[str, Any]] = [{"function": "find", "args": [1], "expected": SECRET}]
LINES: list[dict[str, Any]] = [{"stdin": "3", "stdout": "1\n2\n3\n"}]

HONEST = "print(int(input()) ** 2)"
HONEST_FUNCTION = "def square(x):\n    return x * x"


class Needs(Enum):
    """What has to stand around a program for this attempt to fail."""

    NOTHING = "every tier"
    PROCESS_LIMIT = "a limit on processes, which does not bind root"
    ANOTHER_USER = "namespaces, or a user id of its own"
    NAMESPACES = "namespaces"

    def met(self, wall: Wall) -> bool:
        """Whether that wall has it."""
        namespaces = wall.tier is Tier.BUBBLEWRAP
        return {
            Needs.NOTHING: True,
            Needs.PROCESS_LIMIT: not wall.unlimited_forks,
            Needs.ANOTHER_USER: namespaces or wall.fresh_user,
            Needs.NAMESPACES: namespaces,
        }[self]


@dataclass(frozen=True)
class Hostile:
    """One attempt.

    Args:
        name: For the test's id.
        source: The program. ``@PORT@`` (TCP and UDP) and ``@LISTEN@`` (unused) are ports, ``@UNIX@`` is an abstract
            socket's name, ``@PUBLIC@`` a file that all may read and write, ``@PRIVATE@`` one that only this user may,
            ``@FOLDER@`` where the canaries are, ``@PID@`` the test's process, ``@SITE@`` where our package is.
        tests: The row's tests.
        needs: What it takes to stop it.
        certain: Whether it succeeds wherever it is not stopped; else that depends on the machine.
    """

    name: str
    source: str
    tests: Any = None
    needs: Needs = Needs.NOTHING
    certain: bool = True


def tries(name: str, body: str, needs: Needs, certain: bool = True) -> Hostile:
    """An attempt whose success is an effect: ``body`` runs to its end, or sets ``reached`` to false."""
    lines = "".join(f"    {line}\n" for line in body.strip().split("\n"))
    source = f"reached = True\ntry:\n{lines}except Exception:\n    reached = False\n"
    return Hostile(name, source + "print(int(input()) ** 2 if reached else 'no')", SQUARE, needs, certain)


# How a thief recognises an expected output wherever it lies. Split, so as not to find itself.
LOOK = """
import re
def look(text):
    for token in re.findall('onpolicy' + '-[0-9a-f]{32}', text):
        print(token); raise SystemExit
"""
WORKER = """
import os
server = os.getppid()
worker = int(open(f'/proc/{server}/stat').read().rpartition(')')[2].split()[1])
assert b'worker_main' in open(f'/proc/{worker}/cmdline', 'rb').read()
"""

EXHAUSTING = [
    Hostile("endless loop", "while True: pass"),
    Hostile("sleep", "import time; time.sleep(60)"),
    Hostile(
        "deaf loop",
        "import signal\nfor n in (1, 2, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile 1: pass",
    ),
    Hostile(
        "frozen clock", "import time\ntime.time = time.monotonic = lambda: 0\nwhile time.time() < 1: pass"
    ),
    Hostile("memory bomb", "hoard = []\nwhile True: hoard.append(bytearray(2 ** 24))"),
    Hostile("one huge object", "print(len('x' * 10 ** 12))"),
    Hostile("power tower", "print(9 ** 9 ** 9 ** 9)"),
    Hostile("power tower in two steps", "n = 9 ** 9\nprint(len(str(9 ** n)))"),
    Hostile(
        "zip bomb",
        "import zlib\nc = zlib.compressobj(1)\n"
        "data = b''.join(c.compress(bytes(2 ** 20)) for _ in range(300)) + c.flush()\n"
        "print(len(zlib.decompress(data)))",
    ),
    Hostile("output bomb", "while True: print('x' * 65536)"),
    Hostile("output without end of line", "import os\nwhile True: os.write(1, b'x' * 65536)"),
    Hostile("error output bomb", "import os\nwhile True: os.write(2, b'x' * 65536)"),
    Hostile(
        "file bomb",
        "f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(2 ** 20)); f.flush()\nprint(49)",
    ),
    Hostile("many files", "for i in range(1000): open(f'f{i}', 'w').close()\nprint('done')"),
    Hostile("open files", "hoard = [open('/dev/null') for _ in range(1000)]\nprint(49)"),
    Hostile(
        "deep folders",
        "import os\nfor _ in range(1500): os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)\nprint('done')",
    ),
    Hostile("exploding regex", "import re\nprint(re.match(r'(a+)+$', 'a' * 60 + 'b'))"),
    Hostile("recursion", "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()"),
    Hostile("parser bomb", "(" * 100_000),
    Hostile("operator bomb", "x = " + "-" * 200_000 + "1"),
    Hostile("constant bomb", "x = " + "('x' * 10 ** 4) * 10 ** 4 + " * 200 + "''\nprint('done')"),
    Hostile("number of many digits", "print(int('9' * 10 ** 6) ** 1000)"),
    tries(
        "fork bomb",
        "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        time.sleep(1); os._exit(0)",
        Needs.PROCESS_LIMIT,
    ),
    tries(
        "fork bomb of doublings",
        "import os, time\nfirst = os.getpid()\nfor _ in range(6): os.fork()\n"
        "if os.getpid() != first:\n    time.sleep(1); os._exit(0)",
        Needs.PROCESS_LIMIT,
    ),
    tries(
        "thread bomb",
        "import threading, time\nthreading.stack_size(2 ** 16)\n"
        "for _ in range(40): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()",
        Needs.PROCESS_LIMIT,
    ),
]

LINGERING = [
    Hostile(
        "detached child",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)",
    ),
    Hostile(
        "detached child that prints",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        for _ in range(6000): os.write(1, b'50'); time.sleep(0.01)",
    ),
    Hostile(
        "child that outlives SIGTERM",
        "import os, signal, time\nsignal.signal(15, signal.SIG_IGN)\nif os.fork() == 0: os.setsid(); time.sleep(60)",
    ),
    Hostile(
        "detached child of a killed server",
        "import os, time\nserver = os.getppid()\nif os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0: time.sleep(60)\nelse: time.sleep(0.2); os.kill(server, 9)",
    ),
    Hostile("exit that hangs", "import atexit, time\natexit.register(time.sleep, 60)\nprint(49)"),
    Hostile(
        "thread that hangs",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nprint(49)",
    ),
    Hostile("stopped", "import os; os.kill(os.getpid(), 19)"),
]

EXITS = [
    Hostile("sys.exit(0)", "import sys; sys.exit(0)"),
    Hostile("os._exit(0)", "import os; os._exit(0)"),
    Hostile("sys.exit(0) in a function", "import sys\ndef square(x): sys.exit(0)", FUNCTION),
    Hostile("os._exit(0) in a function", "import os\ndef square(x): os._exit(0)", FUNCTION),
    Hostile("os._exit(0) on import", "import os; os._exit(0)", FUNCTION),
    Hostile("right answer, then an error", "print(49); raise SystemExit(3)"),
    Hostile("another program", "import os; os.execv('/usr/bin/true', ['true'])"),
    Hostile("killed by itself", "import os; os.kill(os.getpid(), 9)"),
    Hostile("segmentation fault", "import ctypes; ctypes.string_at(0)"),
    Hostile("closed output", "import os; os.close(1)"),
    Hostile("null bytes", "print(49)\x00"),
    Hostile("half a character", "print('\ud800')"),
    Hostile("not UTF-8", "import os; os.write(1, bytes(range(128, 256)))"),
]

CHEATING = [
    Hostile("a prefix", "print(1)", LINES),
    Hostile("nothing, a prefix of everything", "", LINES),
    Hostile("too many lines", "print(*range(1, 100), sep='\\n')", LINES),
    Hostile("every number", "print(*range(1000))"),
    Hostile(
        "equal to everything",
        "class Any(int):\n    __eq__ = lambda *_: True\n    __hash__ = int.__hash__\ndef square(x): return Any()",
        FUNCTION,
    ),
    Hostile(
        "its own type",
        "class Any(str):\n    __eq__ = lambda *_: True\ndef square(x): return Any('49')",
        FUNCTION,
    ),
    Hostile("true for one", "def square(x): return True", [FUNCTION[0] | {"args": [1], "expected": 1}]),
    Hostile("not a number", "def square(x): return float('nan')", FUNCTION),
    Hostile(
        "nested without end",
        "import json\njson.dumps = lambda x: '[' * 10 ** 5\ndef square(x): pass",
        FUNCTION,
    ),
    Hostile(
        "digits without end",
        "import json\njson.dumps = lambda x: '4' * 10 ** 5\ndef square(x): pass",
        FUNCTION,
    ),
    Hostile("result without end", "def square(x): return list(range(10 ** 6))", FUNCTION),
    Hostile(
        "result without the nonce", "import os\ndef square(x): os.write(3, b'49'); os._exit(0)", FUNCTION
    ),
    Hostile(
        "result on standard output", "import os\ndef square(x): print(49, flush=True); os._exit(0)", FUNCTION
    ),
    Hostile(
        "patched builtins",
        "import builtins, json\nbuiltins.print = builtins.open = builtins.exec = builtins.len = lambda *a, **k: None\n"
        "json.dumps = json.loads = lambda *a: 'true'\ndef square(x): return None",
        FUNCTION,
    ),
    Hostile(
        "patched __eq__ of the grader",
        "import sys, types\nmodule = types.ModuleType('cases')\nmodule.same = lambda *a: True\n"
        "for name in list(sys.modules): sys.modules[name] = module\ndef square(x): return 0",
        FUNCTION,
    ),
    Hostile(
        "nonce from the stack",
        "import os, sys\ndef square(x):\n    nonce = sys._getframe(1).f_locals['nonce']\n"
        '    os.write(3, nonce + b\'{"passed": true, "score": 1.0}\'); os._exit(0)',
        FUNCTION,
    ),
    Hostile(
        "forged frames on every descriptor",
        "import os\nfor fd in range(1, 64):\n    try: os.write(fd, (6).to_bytes(4, 'big') + bytes(4) + b'49')\n"
        "    except OSError: pass",
    ),
    Hostile(
        "expected output on the stack",
        LOOK
        + "import sys\nframe = sys._getframe()\nwhile frame:\n    look(repr(frame.f_locals) + repr(frame.f_globals))\n"
        "    frame = frame.f_back",
        HIDDEN,
    ),
    Hostile(
        "expected output on the stack of a call",
        "import re, sys\ndef find(x):\n    frame, text = sys._getframe(), ''\n    while frame:\n"
        "        text += repr(frame.f_locals) + repr(frame.f_globals); frame = frame.f_back\n"
        "    return (re.findall('onpolicy' + '-[0-9a-f]{32}', text) or [''])[0]",
        HIDDEN_FUNCTION,
    ),
    Hostile("expected output among all objects", LOOK + "import gc\nlook(repr(gc.get_objects()))", HIDDEN),
    Hostile(
        "expected output in arguments, environment, folder",
        LOOK
        + "import os, sys\nlook(repr(sys.argv) + repr(sys.orig_argv) + repr(os.environ) + repr(sys.modules))\n"
        "for name in os.listdir('.'): look(name + open(name).read())",
        HIDDEN,
    ),
    Hostile(
        "expected output in its own memory",
        LOOK + "memory = open('/proc/self/mem', 'rb')\nfor line in open('/proc/self/maps'):\n"
        "    a, b = (int(x, 16) for x in line.split()[0].split('-'))\n    if 'rw' in line:\n"
        "        memory.seek(a)\n        look(memory.read(min(b - a, 2 ** 24)).decode('latin'))",
        HIDDEN,
    ),
]

REACHING = [
    Hostile(
        "expected output in the worker's memory",
        LOOK
        + WORKER
        + "memory = open(f'/proc/{worker}/mem', 'rb')\nfor line in open(f'/proc/{worker}/maps'):\n"
        "    a, b = (int(x, 16) for x in line.split()[0].split('-'))\n    if 'rw' in line:\n"
        "        memory.seek(a)\n        look(memory.read(min(b - a, 2 ** 24)).decode('latin'))",
        HIDDEN,
        Needs.ANOTHER_USER,
        certain=False,
    ),
    tries("command line of the test", "open('/proc/@PID@/cmdline').read()", Needs.NAMESPACES),
    tries("world-readable file", "open('/etc/passwd').read()", Needs.NAMESPACES),
    tries("public canary, read", "open('@PUBLIC@').read()", Needs.NAMESPACES),
    tries("private canary, read", "open('@PRIVATE@').read()", Needs.ANOTHER_USER),
    tries("public canary, written", "open('@PUBLIC@', 'w').write('changed')", Needs.NAMESPACES),
    tries("private canary, written", "open('@PRIVATE@', 'w').write('changed')", Needs.ANOTHER_USER),
    tries("canary, deleted", "import os\nos.unlink('@FOLDER@/deleted')", Needs.ANOTHER_USER),
    tries(
        "canary, through a link",
        "import os\nos.symlink('@FOLDER@/linked', 'l')\nopen('l', 'a').write('x')",
        Needs.ANOTHER_USER,
    ),
    Hostile(
        "links for who cleans up",
        "import os\nos.symlink('@FOLDER@', 'l')\nos.symlink('@PRIVATE@', 'f')\nprint('done')",
    ),
    tries(
        "the system's programs, written",
        "open('/usr/onpolicy-canary', 'x')",
        Needs.ANOTHER_USER,
        certain=False,
    ),
    tries(
        "shared memory of the host",
        "open('/dev/shm/onpolicy-canary', 'w').write('x')",
        Needs.NAMESPACES,
        certain=False,
    ),
    tries(
        "our package",
        "import sys\nsys.path += ['@SITE@']\nimport lightning_onpolicy",
        Needs.NAMESPACES,
        certain=False,
    ),
    tries("TCP", "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), 1)", Needs.NAMESPACES),
    tries(
        "UDP",
        "import socket, time\ns = socket.socket(type=socket.SOCK_DGRAM)\ns.connect(('127.0.0.1', @PORT@))\n"
        "for _ in range(2): s.send(b'x'); time.sleep(0.1)  # the second one fails where nobody listens",
        Needs.NAMESPACES,
    ),
    tries(
        "abstract socket",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0@UNIX@')",
        Needs.NAMESPACES,
    ),
    Hostile(
        "server left behind",
        "import os, socket, time\ns = socket.socket()\ns.bind(('127.0.0.1', @LISTEN@)); s.listen()\n"
        "if os.fork() == 0: os.setsid(); time.sleep(60)",
    ),
    Hostile("its server, killed", "import os; os.kill(os.getppid(), 9)"),
    Hostile("its server, stopped", "import os, time; os.kill(os.getppid(), 19); time.sleep(60)"),
    Hostile(
        "its server, traced",
        "import ctypes, os, time; ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0); time.sleep(60)",
    ),
    Hostile("its worker, killed", WORKER + "os.kill(worker, 9)"),
    tries("signal to the test", "import os; os.kill(@PID@, 0)", Needs.ANOTHER_USER),
    tries(
        "limits, raised",
        "import resource as r\nfor n in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE): r.setrlimit(n, (-1, -1))",
        Needs.ANOTHER_USER,
        certain=False,
    ),
    tries(
        "root",
        "import os\nos.setuid(0)\nreached = os.stat('/').st_uid == 0 == os.getuid()",
        Needs.ANOTHER_USER,
        certain=False,
    ),
    tries(
        "a disk",
        "import os, stat\ndevices = map('/dev/{}'.format, os.listdir('/dev'))\n"
        "disks = [d for d in devices if stat.S_ISBLK(os.stat(d).st_mode)]\n"
        "reached = bool([open(d, 'rb', 0) for d in disks])",
        Needs.ANOTHER_USER,
        certain=False,
    ),
    tries("chroot", "import os\nos.chroot('.')", Needs.ANOTHER_USER, certain=False),
]

PROGRAMS = [*EXHAUSTING, *LINGERING, *EXITS, *CHEATING, *REACHING]

# Answers to verifiers of texts. @MARK@ is a file that must not appear.
ANSWERS = [
    "open('@MARK@', 'w')",
    "__import__('os').system('touch @MARK@')",
    "__import__('pathlib').Path('@MARK@').touch()",
    "[open('@MARK@', 'w')]",
    "(lambda: open('@MARK@', 'w'))()",
    "x.__class__.__base__.__subclasses__()[open('@MARK@', 'w')]",
    "().__class__.__mro__[1].__subclasses__()",
    "exec(\"open('@MARK@', 'w')\")",
    "eval(compile(\"open('@MARK@', 'w')\", '', 'eval'))",
    "sympy.sympify(\"open('@MARK@', 'w')\")",
    'S(\'__import__("os").system("touch @MARK@")\')',
    "\uff45\uff56\uff41\uff4c(\"open('@MARK@', 'w')\")",
    "{{ cycler.__init__.__globals__.os.system('touch @MARK@') }}",
    "$(touch @MARK@); `touch @MARK@`",
    "\\input{/etc/passwd}\\write18{touch @MARK@}",
    "exit()",
    "9**9**9**9",
    "2^(2^(2^(2^(2^(2^2)))))",
    "factorial(10**9)",
    "10**10**8 - 10**10**8",
    "(x+1)**(10**6)",
    "exp(exp(exp(exp(9))))",
    "1e999999999",
    "9" * 100_000,
    "(" * 20_000 + "1" + ")" * 20_000,
    "-" * 50_000 + "1",
    "[" * 20_000 + "]" * 20_000,
    "\\frac{1}{" * 5_000 + "1" + "}" * 5_000,
    "\\sqrt" * 50_000,
    "a" * 50_000 + "!",
    "1 + " * 20_000 + "1",
    "\\boxed{" * 10_000,
    "\ud800\x00\u202e" * 100,
]


def left_behind() -> list[str]:
    """Processes of sandboxes that no live worker and no test looks after any more."""
    processes: dict[int, tuple[int, bytes]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            processes[int(stat.parent.name)] = parent, (stat.parent / "cmdline").read_bytes()

    def looked_after(pid: int) -> bool:
        while pid in processes:
            pid, command = processes[pid]
            if b"worker_main" in command or b"pytest" in command:
                return True
        return False

    found = [pid for pid, (_, line) in processes.items() if LOADER.encode() in line]
    mine = [pid for pid, (parent, _) in processes.items() if parent == os.getpid() and pid in found]
    return [str(processes[pid]) for pid in found if pid in mine or not looked_after(pid)]
