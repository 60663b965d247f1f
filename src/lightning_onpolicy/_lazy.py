"""Attributes that import their module on first use, so that importing a package costs nothing.

A verifier's worker process imports ``lightning_onpolicy.datamodules.rewards.…`` and must not pay for torch;
``import lightning_onpolicy.kernels`` must not need Lightning.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attach(
    package: str, where: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` for a package (PEP 562).

    Args:
        package: The package's ``__name__``.
        where: Public name → sub-module that defines it.
    """

    def getattr_(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{where[name]}"), name)

    names = sorted(where)
    return getattr_, lambda: names, names
