"""The tiers of the sandbox: what each is made of, what it stops and what it does not, in plain words."""

from __future__ import annotations

import enum
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

TMP_BYTES = 16 * 2**20  # of /tmp in a bubblewrap sandbox
SPARE_IDS = (
    0x70000000,
    2**28 - 1,
)  # first and number of user ids that no distribution or container manager gives out
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")


class Tier(enum.IntEnum):
    """Kinds of wall, weakest first."""

    SUBPROCESS = 1
    """A process of its own with resource limits."""
    BUBBLEWRAP = 2
    """Its own process, network, IPC and mount namespaces on top."""

    @classmethod
    def of(cls, name: str, key: str) -> Tier:
        """The tier of that name.

        Raises:
            ValueError: If there is none; the message names ``key``.
        """
        for tier in cls:
            if tier.label == name:
                return tier
        raise ValueError(f"{key} must be one of {[tier.label for tier in cls]}, got {name!r}.")

    @property
    def label(self) -> str:
        """Its name in configurations."""
        return self.name.lower()


@dataclass(frozen=True)
class Wall:
    """A tier as a machine offers it.

    Args:
        tier: Which one.
        command: What the interpreter's command line is appended to.
        fresh_user: Whether each program runs as a user id that nobody else has. Only root can do that.
        unlimited_forks: Whether the limit on processes has no effect, as it has none on root.
    """

    tier: Tier
    command: tuple[str, ...] = ()
    fresh_user: bool = False
    unlimited_forks: bool = False

    def user(self) -> int | None:
        """The id to change to, another one each time, or None."""
        return SPARE_IDS[0] + secrets.randbelow(SPARE_IDS[1]) if self.fresh_user else None

    def statement(self) -> str:
        """What it stops and what it does not."""
        stops = ["runaway time, memory per process, output and file size"]
        leaves = ["bugs of the kernel", "the use of CPU time within the limits"]
        (leaves if self.unlimited_forks else stops).append("fork bombs")
        if self.tier is Tier.BUBBLEWRAP:
            stops += ["network", "files other than /usr and the interpreter, read-only", "other processes"]
        else:
            leaves.append("network")
            if self.fresh_user:
                stops += ["signals to other processes", "files that are not open to all users"]
                leaves.append("files that all users can read or write")
            else:
                leaves.append("this user's files and processes, which programs can read, change and kill")
        return (
            f"Sandbox tier in use: {self.tier.label}. It stops: {'; '.join(stops)}. "
            f"It does not stop: {'; '.join(leaves)}."
        )


def plain(*, root: bool, fresh_user: bool) -> Wall:
    """The floor: a process with limits."""
    return Wall(Tier.SUBPROCESS, fresh_user=fresh_user, unlimited_forks=root and not fresh_user)


def bubblewrap(path: str, *, root: bool, fresh_user: bool) -> Wall:
    """Namespaces by ``bwrap``: nothing to see but the interpreter, the system's libraries, an empty /dev and a
    small /tmp. There is no /proc.

    Args:
        path: Of the ``bwrap`` program.
        root: Whether it is run by root, whom a user namespace of his own does not bind: processes are not limited.
        fresh_user: Make the namespaces with root's rights, and let the program change to a user id of its own.
    """
    user = (
        ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        if fresh_user
        else ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    )
    command = [path, *user, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--die-with-parent", "--new-session"]
    prefixes = dict.fromkeys([sys.base_prefix, sys.base_exec_prefix, str(interpreter().parent.parent)])
    outside = [p for p in prefixes if not any(Path(p).is_relative_to(s) for s in _SYSTEM)]
    # bwrap closes the parents of a mount to others where the originals are closed, as /root is.
    for folder in sorted({str(f) for p in outside for f in list(Path(p).parents)[:-1]}):
        command += ["--perms", "0755", "--dir", folder]
    for folder in _SYSTEM:
        command += ["--ro-bind-try", folder, folder]
    for folder in outside:
        command += ["--ro-bind", folder, folder]
    command += ["--dev", "/dev", "--remount-ro", "/dev"]
    command += ["--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp"]
    command += ["--remount-ro", "/", "--chdir", "/tmp", "--"]
    return Wall(
        Tier.BUBBLEWRAP, tuple(command), fresh_user=fresh_user, unlimited_forks=root and not fresh_user
    )


def interpreter() -> Path:
    """The Python that programs run with: this one, without its virtual environment."""
    return Path(sys.executable).resolve()
