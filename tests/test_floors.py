"""What each floor may import, shown in processes that lack the rest; `lint-imports` reads the arrows statically."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("callbacks", "configs", "datamodules", "kernels", "modules")
# Packages that some of our modules use, but only once the feature is used.
ON_DEMAND = ("bitsandbytes", "math_verify", "matplotlib", "openai", "reasoning_gym", "triton", "trl", "vllm")
ABOVE_TORCH = (
    *ON_DEMAND,
    *("datasets", "jsonargparse", "lightning", "lightning_utilities", "peft", "pytorch_lightning"),
    *("rich", "tokenizers", "torchmetrics", "transformers", "yaml"),
)
# Hidden packages are not found, neither their modules nor their metadata, as if they were not installed. An import
# that raised would be another world, because libraries look for a package before they use it.
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden!r} else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        found = super().find_distributions(*args, **kwargs)
        return (d for d in found if d.metadata["Name"].lower().replace("-", "_") not in {hidden!r})

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""
IMPORT_ALL = """
import importlib, pkgutil

def import_all(package):
    def stop(name):
        raise
    root = importlib.import_module(package)
    # What only worker processes import (…_worker) needs its verifier's package at once; what only a CUDA tensor
    # loads (triton_…) needs Triton.
    names = [m.name for m in pkgutil.walk_packages(root.__path__, package + ".", stop)]
    names = [name for name in names if not name.endswith("_worker") and ".triton_" not in name]
    for name in names:
        importlib.import_module(name)
    return names
"""


def python(code: str, hidden: tuple[str, ...] = (), **env: str) -> str:
    """Standard output of a new interpreter from the repository root; its last error line if it fails."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | env
    done = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden) + code],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_kernels_import_with_torch_alone() -> None:
    code = IMPORT_ALL + "print(len(import_all('lightning_onpolicy.kernels')))"
    assert int(python(code, hidden=ABOVE_TORCH, PYTHONSAFEPATH="1")) > 5


def test_token_stats_loads_no_triton_kernel_without_a_cuda_tensor() -> None:
    code = (
        "import sys, torch\nfrom lightning_onpolicy.kernels import token_stats\n"
        "token_stats(torch.ones(1, 2), torch.ones(3, 2), outputs=('lse',))\n"
        "print([m for m in sys.modules if '.kernels.triton_' in m])"
    )
    assert python(code, hidden=ABOVE_TORCH, PYTHONSAFEPATH="1") == "[]"
    assert python(code, PYTHONSAFEPATH="1") == "[]"


def test_losses_import_with_torch_alone() -> None:
    code = IMPORT_ALL + "print(len(import_all('lightning_onpolicy.modules.losses')))"
    assert int(python(code, hidden=ABOVE_TORCH, PYTHONSAFEPATH="1")) > 0


@pytest.mark.slow  # a new process imports torch, Lightning and transformers
def test_every_module_imports_without_what_is_used_on_demand() -> None:
    code = IMPORT_ALL + "print(len(import_all('lightning_onpolicy')))"
    assert int(python(code, hidden=ON_DEMAND, PYTHONSAFEPATH="1")) > 40


def test_a_hidden_package_is_missed() -> None:
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        python("import lightning_onpolicy.kernels.reference", hidden=("torch",), PYTHONSAFEPATH="1")


def test_importing_the_package_and_asking_for_help_loads_no_torch() -> None:
    code = (
        "import sys, lightning_onpolicy.datamodules.rewards, lightning_onpolicy.cli as cli; cli.main(['ls'])\n"
        "print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    assert python(code, PYTHONSAFEPATH="1").splitlines()[-1] == "[]"


def test_a_verifier_worker_loads_no_torch() -> None:
    code = (
        "import sys, lightning_onpolicy.datamodules.rewards.worker_main\n"
        "print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    assert python(code, PYTHONSAFEPATH="1") == "[]"


def test_root_folders_refuse_to_be_imported_from_the_repository_root() -> None:
    # `python -c` puts the working directory on sys.path, as `python -m` and a script in the root do.
    code = f"""
for name in {FOLDERS!r}:
    try:
        __import__(name)
    except ImportError as error:
        print(name, f"lightning_onpolicy.{{name}}" in str(error))
"""
    assert python(code).splitlines() == [f"{name} True" for name in FOLDERS]


def private_names(path: Path, roots: tuple[str, ...]) -> list[str]:
    """Imports of names or modules with a leading underscore from these packages."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [n for n in names if n.split(".")[0] in roots and any(p[0] == "_" for p in n.split("."))]
    return found


def test_no_private_name_of_the_libraries_above_torch_is_imported() -> None:
    roots = ("lightning", "pytorch_lightning", "transformers", "vllm", "peft")
    files = [p for folder in (*FOLDERS, "src") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 40
    private = {str(p.relative_to(ROOT)): names for p in files if (names := private_names(p, roots))}
    assert private == {}


def test_private_names_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("from lightning._a import b\nimport torch._c\nfrom transformers.d import _e, f\n")
    assert private_names(path, ("lightning", "transformers")) == ["lightning._a.b", "transformers.d._e"]
