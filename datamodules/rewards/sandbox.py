"""A sandbox for one untrusted Python program at a time, behind the strongest wall that this machine offers.

Tiers, weakest first (``tiers.py`` has what each stops, and the log says it once):

- ``subprocess``: the program runs as ``python -I -S`` in its own session, without environment, under limits on
  time, address space, output, file size, open files and processes. For accidents; a program that means harm
  gets to the network and to whatever this user can.
- ``bubblewrap``: the same inside process, network, mount and IPC namespaces made by ``bwrap``: no network, no
  process but its own, no file but the interpreter and the system's libraries, a small ``/tmp`` of its own.

Run by root, either tier gives each program a user id that nobody else has, where the interpreter can be read by
such a user: limits on the number of processes do not bind root.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

from lightning_onpolicy.datamodules.rewards.sandbox_process import (
    Limits,
    Outcome,
    SandboxError,
    SandboxProcess,
)
from lightning_onpolicy.datamodules.rewards.tiers import SPARE_IDS, Tier, Wall, bubblewrap, plain

log = logging.getLogger(__name__)


class TierError(RuntimeError):
    """This machine does not offer the tier that is asked for; the text says what to install or enable."""


class Sandbox:
    """Runs untrusted Python programs, standard library only.

    In the lower tier, a program that kills the server of its sandbox leaves its processes to this one, if that has
    called ``sandbox_child.adopt_orphans`` as ``CodeReward``'s workers do, and otherwise to the system, where they run
    until their limits end them.

    Args:
        tier: ``"auto"`` (the strongest that works here), ``"bubblewrap"`` or ``"subprocess"``.
        minimum_tier: Refuse to start with less than this.
        limits: What a program may use.

    Raises:
        TierError: If this machine does not offer the tier; the message says what to install or enable.
        ValueError: If a tier is unknown, or ``tier`` is below ``minimum_tier``.

    Example:
        >>> sandbox = Sandbox()
        >>> sandbox.run("print(int(input()) + 1)", "41").output
        b'42\\n'
        >>> with sandbox.open("def double(x): return 2 * x") as program:
        ...     program.call("double", "[21]").output
        b'42'
    """

    def __init__(
        self, tier: str = "auto", minimum_tier: str = "subprocess", limits: Limits | None = None
    ) -> None:
        self.wall = choose(tier, minimum_tier)
        self.limits = limits or Limits()
        _say(self.wall)

    def open(self, source: str) -> Program:
        """A program to test several times, as a context manager."""
        return Program(self.wall, self.limits, source)

    def run(self, source: str, stdin: str = "") -> Outcome:
        """Run a program once.

        Raises:
            SandboxError: If the sandbox failed by itself.
        """
        with self.open(source) as program:
            return program.run(stdin)


class Program:
    """An untrusted program in a sandbox, started on first use and again after a test that took the sandbox down.

    Args:
        wall: What stands around it.
        limits: Of each test.
        source: Its text.
        guardian: As for ``SandboxProcess``.
    """

    def __init__(self, wall: Wall, limits: Limits, source: str, guardian: bool = False) -> None:
        self.wall, self.limits, self.source, self.guardian = wall, limits, source, guardian
        self._process: SandboxProcess | None = None

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.alive:
            self._process.close()

    def run(self, stdin: str = "") -> Outcome:
        """Run it with that standard input.

        Raises:
            SandboxError: If the sandbox failed by itself.
        """
        return self._started().run(stdin)

    def call(self, function: str, args: str) -> Outcome:
        """Call a function of it, or ``Class.method``, with arguments as a JSON list; the output is the result as JSON.

        Raises:
            SandboxError: If the sandbox failed by itself.
        """
        return self._started().call(function, args)

    def _started(self) -> SandboxProcess:
        if self._process is None or not self._process.alive:
            self._process = SandboxProcess(self.wall, self.limits, self.source, guardian=self.guardian)
        return self._process


def choose(tier: str = "auto", minimum_tier: str = "subprocess") -> Wall:
    """The wall to use on this machine.

    Args:
        tier: ``"auto"`` for the strongest that works here, or a tier's name.
        minimum_tier: The weakest one to put up with.

    Raises:
        TierError: If no tier that works here will do; the message says what to install or enable.
        ValueError: If a name is unknown, or ``tier`` is below ``minimum_tier``.
    """
    least = Tier.of(minimum_tier, "minimum_tier")
    wanted = sorted(Tier, reverse=True) if tier == "auto" else [Tier.of(tier, "tier")]
    if wanted[0] < least:
        raise ValueError(f"tier={tier!r} is below minimum_tier={minimum_tier!r}.")
    reasons = []
    for candidate in wanted:
        if candidate >= least:
            found = find(candidate)
            if isinstance(found, Wall):
                return found
            reasons.append(f"{candidate.label}: {found}")
    raise TierError(
        f"no sandbox for tier={tier!r} and minimum_tier={minimum_tier!r} on this machine. {' '.join(reasons)}"
    )


@functools.cache
def find(tier: Tier) -> Wall | str:
    """The wall of that tier, or why there is none. A trivial program runs behind it to find out: user namespaces
    may be refused in containers, the interpreter may lie where others cannot read it."""
    if sys.platform != "linux":
        return "the sandbox needs Linux."
    root = os.geteuid() == 0
    bwrap = shutil.which("bwrap")
    if tier is Tier.BUBBLEWRAP and bwrap is None:
        return "bwrap is not installed (Debian and Ubuntu: apt-get install bubblewrap)."
    problem = ""
    for fresh_user in (True, False) if root and _owns(SPARE_IDS[0]) else (False,):
        if bwrap is not None and tier is Tier.BUBBLEWRAP:
            wall = bubblewrap(bwrap, root=root, fresh_user=fresh_user)
        else:
            wall = plain(root=root, fresh_user=fresh_user)
        problem = probe(wall)
        if not problem:
            return wall
    if tier is Tier.BUBBLEWRAP:
        problem += (
            " It needs bubblewrap 0.8 and user namespaces. In containers they need a seccomp profile that allows "
            "unshare and mount (docker run --security-opt seccomp=unconfined); on Ubuntu 24.04, sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0 or an AppArmor profile for bwrap."
        )
    return f"a trivial program did not run: {problem}"


def probe(wall: Wall) -> str:
    """Run a trivial program behind a wall; what went wrong, or nothing."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = SandboxProcess(
                wall, Limits(wall_s=20.0), "import json\nprint(int(input()) + 1)", errors
            )
            outcome = process.run("41")
            process.close()
        except (SandboxError, OSError) as error:
            errors.seek(0)
            said = " ".join(errors.read(2000).decode(errors="replace").split())
            return said or str(error)
    return "" if outcome.output == b"42\n" else f"it ended with {outcome}."


def _owns(user: int) -> bool:
    """Whether that id exists in this user namespace, for users and for groups."""
    maps = [Path(f"/proc/self/{kind}_map").read_text().splitlines() for kind in ("uid", "gid")]
    ranges = [[[int(n) for n in line.split()] for line in lines] for lines in maps]
    return all(any(first <= user < first + count for first, _, count in rows) for rows in ranges)


@functools.cache
def _say(wall: Wall) -> None:
    """Once per process: which tier is in use, and what it does not stop."""
    log.warning("%s", wall.statement())
