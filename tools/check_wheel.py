"""What a stranger gets from ``pip install``: checks the sdist and the wheel that ``python -m build`` left in a folder.

The sdist holds real files where the repository has symlinks; the wheel holds exactly the files of the package, and
nothing else at its top; a clean environment that sees the wheel and our dependencies, but not the repository, imports
every module, lists the packaged configurations and runs the command.

    python -m build --no-isolation --outdir dist . && python tools/check_wheel.py dist
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGE = "lightning_onpolicy"
SOURCE = Path(__file__).parents[1] / "src"

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
from importlib.resources import files
import lightning_onpolicy

def stop(name): raise  # walk_packages swallows ImportError without this

names = [m.name for m in pkgutil.walk_packages(lightning_onpolicy.__path__, "lightning_onpolicy.", stop)]
for name in names:
    importlib.import_module(name)
outside = [n for n, m in sys.modules.items() if n.startswith("lightning_onpolicy") and sys.prefix not in m.__file__]
assert not outside, f"imported from elsewhere: {outside}"
yaml = [p for p in files("lightning_onpolicy.configs").rglob("*.yaml")]
assert yaml, "no packaged configuration"
print(f"{len(names)} modules, {len(yaml)} YAML files")
"""


def only(folder: Path, pattern: str) -> Path:
    """The one file that matches."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(
            f"{folder} holds {len(found)} files like {pattern}, not one: `make wheel` builds afresh."
        )
    return found[0]


def source_files() -> set[str]:
    """Every file of the package, as a path from ``src``, symlinked folders followed."""
    found = set()
    for folder, inner, names in os.walk(SOURCE / PACKAGE, followlinks=True):
        inner[:] = [name for name in inner if name != "__pycache__"]
        found |= {(Path(folder) / name).relative_to(SOURCE).as_posix() for name in names if name[0] != "."}
    return found


def compare(what: str, expected: set[str], found: set[str]) -> None:
    """Stop with the differences, if there are any."""
    if expected != found:
        lines = [f"  missing: {name}" for name in sorted(expected - found)]
        lines += [f"  not ours: {name}" for name in sorted(found - expected)]
        raise SystemExit(f"{what} does not hold what the package holds:\n" + "\n".join(lines))


def check_sdist(path: Path) -> None:
    """Real files only, and all of the package."""
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    links = [m.name for m in members if not (m.isfile() or m.isdir())]
    if links:
        raise SystemExit(f"{path.name} holds links, which unpack to nothing elsewhere: {links}")
    inside = {m.name.split("/", 1)[1] for m in members if m.isfile()}
    packaged = {name.removeprefix("src/") for name in inside if name.startswith(f"src/{PACKAGE}/")}
    compare(path.name, source_files(), packaged)


def check_wheel(path: Path) -> None:
    """The package, its metadata, and nothing beside them."""
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = "-".join(path.name.split("-")[:2]) + ".dist-info"
    compare(f"the top of {path.name}", {PACKAGE, metadata}, {name.split("/", 1)[0] for name in names})
    compare(path.name, source_files(), {name for name in names if name.startswith(f"{PACKAGE}/")})


def check_installed(wheel: Path) -> str:
    """Install without dependencies in a new environment that borrows ours, and use the package there."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        environment = venv.EnvBuilder(symlinks=os.name != "nt")
        environment.create(home / "env")
        python = Path(environment.ensure_directories(home / "env").env_exe)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([*pip, str(wheel)], check=True)
        scheme = {"base": str(home / "env"), "platbase": str(home / "env")}
        site = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
        top = {entry.name for entry in site.iterdir()}
        compare("site-packages", {PACKAGE, "-".join(wheel.name.split("-")[:2]) + ".dist-info"}, top)
        # A folder named in a .pth file is searched after this one, and its own .pth files (our editable install) are
        # not read: the dependencies come, the repository does not.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        seen = subprocess.run(
            [python, "-I", "-c", IMPORT_EVERYTHING], check=True, cwd=home, stdout=subprocess.PIPE, text=True
        ).stdout
        command = python.with_name("onpolicy.exe" if os.name == "nt" else "onpolicy")
        listed = subprocess.run(
            [command, "ls"], check=True, cwd=home, stdout=subprocess.PIPE, text=True
        ).stdout
        if not listed.strip():
            raise SystemExit("`onpolicy ls` of the installed wheel lists nothing.")
        return f"{seen.strip()}, {len(listed.splitlines())} configurations in `onpolicy ls`"


if __name__ == "__main__":
    dist = Path(sys.argv[1])
    sdist, built = only(dist, "*.tar.gz"), only(dist, "*.whl")
    check_sdist(sdist)
    check_wheel(built)
    print(f"{built.name} ({built.stat().st_size / 1e6:.1f} MB), from the sdist: {check_installed(built)}")
