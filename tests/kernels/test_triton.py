"""The Triton epilogue without a GPU: in the interpreter, through the compiler, and when it is taken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_onpolicy.kernels import epilogues

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@needs_triton
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is not None
    and release("triton") < (3, 7)
    and release("numpy") >= (2, 4),
    reason="the interpreter of Triton 3.6 cannot run loops with NumPy 2.4",
)
@pytest.mark.slow
def test_in_the_interpreter():
    """In a process of its own: Triton decides at import whether it interprets, and torch imports it early."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    path = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)],
        env=env | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 40
    assert not re.search(r"skipped|failed|error", done.stdout)


FLOATS = ("scale", "cap", "teacher_scale", "teacher_cap", "beta", "alpha")


def build(kernel, target, *, block=(1, 4), absent=(), dtype="fp32", aligned=True, **constants):
    """A kernel compiled for ``sm_<target>``."""
    import triton
    from triton.backends.compiler import GPUTarget

    signature, attributes = {}, {}
    constants = {"BLOCK": block[0], **constants, **dict.fromkeys(absent)}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            element = {"index_ptr": "i64", "argmax_ptr": "i64", "dz_ptr": dtype}.get(name, "fp32")
            signature[name] = f"*{element}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        divisible = name.endswith("_ptr") or name in ("columns", "dz_stride")
        if name not in constants and divisible and aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": block[1]})


def compiled(kernel, target, **options):
    """Registers and spilled bytes. A compiled kernel reports them on a device only; ptxas does here."""
    from triton import knobs

    built = build(kernel, target, **options)
    assert built.asm["cubin"][:4] == b"\x7fELF"
    name = f"sm_{target}{'a' if target == 90 else ''}"
    done = subprocess.run(
        [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", "-o", os.devnull, "/dev/stdin"],
        input=built.asm["ptx"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    return int(registers[1]), int(spilled[1]) + int(spilled[2])


def ptxas_is_there() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    try:
        return Path(knobs.nvidia.ptxas.path).exists()
    except RuntimeError:  # what Triton raises where it finds none
        return False


needs_ptxas = pytest.mark.skipif(not ptxas_is_there(), reason="Triton with its ptxas is not installed")
ALONE = ("t_ptr", "teacher_bias_ptr", "teacher_m_ptr", "teacher_log_s_ptr")  # absent without a teacher
HEADS = {
    "student": {"absent": (*ALONE, "bias_ptr", "inverse_ptr")},
    "biased": {"absent": ALONE},
    "capped": {"absent": ALONE, "CAPPED": True},
    "folded": {"FOLDED": True, "TEACHER_FOLDED": True},
    "teacher": {"absent": ("bias_ptr", "teacher_bias_ptr", "inverse_ptr")},
    "both capped": {"CAPPED": True, "TEACHER_CAPPED": True},
}


@needs_ptxas
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("target", [80, 90])
def test_compiles_without_spills(target, heads, tmp_path, monkeypatch, record_property):
    """Every kernel in each block size, with and without ids, for Ampere and Hopper."""
    from lightning_onpolicy.kernels import triton_curves, triton_gradient, triton_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    flags = dict.fromkeys(("CAPPED", "FOLDED", "TEACHER_CAPPED", "TEACHER_FOLDED"), False)
    flags = {**flags, **HEADS[heads]}
    absent = flags.pop("absent", ())
    no_ids = (*absent, "index_ptr", "picked_ptr", "sparse_ptr", "spare_ptr", "argmax_ptr")
    curves = 0 if "t_ptr" in absent else 15
    moments, gradients = triton_rows.row_moments, triton_gradient.row_gradients
    found = {}
    for block in (triton_rows.NARROW, triton_rows.WIDE):
        common = {**flags, "block": block}
        found["moments", block] = compiled(moments, target, absent=absent, IDS=64, **common)
        found["gradients", block] = compiled(
            gradients, target, absent=absent, dtype="bf16", CURVES=curves, IDS=64, **common
        )
        if curves:
            found["curves", block] = compiled(
                triton_curves.row_curves, target, absent=absent, CURVES=15, **common
            )
    found["fp16 gradients"] = compiled(
        gradients, target, absent=absent, dtype="fp16", CURVES=curves, IDS=64, **common
    )
    common["aligned"] = False
    found["bare moments"] = compiled(moments, target, absent=no_ids, IDS=1, **common)
    found["bare gradients"] = compiled(gradients, target, absent=no_ids, CURVES=0, IDS=1, **common)
    if heads == "student":
        found["equal ids"] = compiled(triton_gradient.sum_equal_ids, target, IDS=64)
    for name, (registers, _) in found.items():
        record_property(str(name), registers)
    assert {name: spilled for name, (_, spilled) in found.items() if spilled} == {}
    assert max(registers for registers, _ in found.values()) <= 128


@needs_ptxas
@pytest.mark.parametrize("ids", [False, True])
def test_a_barrier_lies_between_loads_and_stores(ids, tmp_path, monkeypatch):
    """A gradient written over its logits needs it, and the interpreter would not miss it."""
    from lightning_onpolicy.kernels import triton_gradient, triton_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    flags = dict.fromkeys(("CAPPED", "FOLDED", "TEACHER_CAPPED", "TEACHER_FOLDED"), False)
    absent = HEADS["student"]["absent"] + (() if ids else ("index_ptr", "sparse_ptr", "spare_ptr"))
    options = {"absent": absent, "dtype": "bf16", "block": triton_rows.WIDE, "CURVES": 0, "IDS": 64}
    built = build(triton_gradient.row_gradients, 90, **options, **flags)
    steps = re.findall(r"(ld|st)\.global|(bar)rier\.|(bar)\.sync", built.asm["ptx"])
    order = [step for step, _ in itertools.groupby("".join(found) for found in steps)]
    row, picked = ["ld", "bar", "st"], ["bar", "ld", "st"]
    assert order == (["ld", "st", *row, *picked] if ids else row)


def test_which_epilogue_a_call_takes():
    installed = importlib.util.find_spec("triton") is not None
    assert epilogues.choose("cpu", torch.float32) == "eager"
    assert epilogues.choose("cuda", torch.float64) == "eager"
    assert epilogues.choose("cuda", torch.float32) == ("triton" if installed else "eager")
    with epilogues.forced("eager"):
        assert epilogues.choose("cuda", torch.float32) == "eager"
        with epilogues.forced("triton"):
            assert epilogues.choose("cpu", torch.float32) == "triton"
        assert epilogues.choose("cuda", torch.float32) == "eager"
    assert epilogues.choose("cpu", torch.float32) == "eager"
    with pytest.raises(ValueError, match="epilogue must be one of"), epilogues.forced("fast"):
        pass


def test_compiled_code_notices_a_forced_epilogue():
    def number(x):
        return x + epilogues.NAMES.index(epilogues.choose(x.device.type, x.dtype))

    run = torch.compile(number, fullgraph=True, backend="aot_eager")
    assert run(torch.zeros(())).item() == 0
    with epilogues.forced("triton"):
        assert run(torch.zeros(())).item() == 1
    assert run(torch.zeros(())).item() == 0
