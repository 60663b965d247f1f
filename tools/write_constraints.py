"""Write the versions of the running environment as pip constraints: ``make constraints``.

Only names and public versions: no paths, no URLs, no local suffix such as ``+cpu`` (a constraint on 2.13.0 admits
2.13.0+cpu, and each machine takes the build that suits it).
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

HEADER = "# The versions this library is tested with. `make constraints` writes this file.\n"
LEFT_OUT = {"lightning-onpolicy", "pip"}


def pins() -> list[str]:
    """``name==version`` for every installed distribution, sorted, without ourselves and pip."""
    found = {canonicalize_name(d.metadata["Name"]): Version(d.version).public for d in distributions()}
    return [f"{name}=={found[name]}" for name in sorted(found) if name not in LEFT_OUT]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    lines = pins()
    target.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{target}: {len(lines)} pins")
