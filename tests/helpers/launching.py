"""How a test starts one of the scripts beside this file on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def on_two_ranks(
    script: ModuleType, *arguments: object, timeout_s: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Run a helper as a script under ``torchrun``, each rank with one thread.

    Args:
        script: The helper, as imported.
        arguments: Of the script, as text.
        timeout_s: Seconds after which both ranks are killed.

    Returns:
        What the ranks said.

    Raises:
        AssertionError: If a rank failed, with the end of what it said.
        subprocess.TimeoutExpired: If they were not done in time.
    """
    path = Path(str(script.__file__))
    env = {
        **os.environ,
        # No empty entry: it would be the working folder.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(path.parent), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    # Files and no pipes: whatever process outlives its rank would hold the end of a pipe, and reading it never ends.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        words = [*command, str(path), *map(str, arguments)]
        done = subprocess.run(words, env=env, stdout=out, stderr=err, text=True, timeout=timeout_s)
        for file in (out, err):
            file.seek(0)
        done.stdout, done.stderr = out.read(), err.read()
    assert done.returncode == 0, done.stderr[-4000:]
    return done
