"""The ``onpolicy`` command: ``fit``, ``validate``, ``test``, ``predict``, ``ls``, ``cp``.

Everything after the sub-command is LightningCLI's; ``-c NAME`` also finds packaged configurations.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_onpolicy._configs import copy_config, find_config, list_configs

USAGE = """usage: onpolicy COMMAND …

  fit, validate, test, predict   run a configuration: onpolicy fit -c quickstart/opd
                                 (-c takes a file or a name from `onpolicy ls`; several are merged in order;
                                 --help and --print_config show every option)
  ls                             list the packaged configurations
  cp NAME DEST                   copy one for editing
"""

COMMANDS = ("fit", "validate", "test", "predict")
USAGE_RUN = "onpolicy {} -c CONFIG [-c CONFIG …] [--KEY VALUE …] [--print_config] [--help]"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 0: done; 1: it failed, for the reason printed; 2: the command line is wrong."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(args)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("ONPOLICY_TRACEBACK"):
            raise
        print(f"onpolicy: error: {_chain(error)}\n(ONPOLICY_TRACEBACK=1 shows where.)", file=sys.stderr)
        raise SystemExit(1) from None


def _run(args: list[str]) -> None:
    command = args[0] if args else ""
    if command in ("", "-h", "--help"):
        print(USAGE)
        return
    if command == "ls":
        for name, what in list_configs().items():
            print(f"{name:<28} {what}")
        return
    if command == "cp":
        if len(args) != 3:
            print("usage: onpolicy cp NAME DEST", file=sys.stderr)
            raise SystemExit(2)
        print(copy_config(args[1], args[2]))
        return
    if command not in COMMANDS:
        print(f"onpolicy: error: unknown command {command!r}\n{USAGE}", file=sys.stderr)
        raise SystemExit(2)
    args = resolve_configs(args)
    check_checkpoint(_value(args, "--ckpt_path"))
    _lightning_cli(args)


def _lightning_cli(args: list[str]) -> Any:
    # Imported here, so that `ls`, `cp` and usage errors answer at once.
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    import lightning_onpolicy.callbacks as callbacks
    import lightning_onpolicy.datamodules as datamodules
    import lightning_onpolicy.datamodules.rewards as rewards
    import lightning_onpolicy.modules as modules

    for package in (modules, datamodules, rewards, callbacks):  # short class names need imported classes
        for name in package.__all__:
            getattr(package, name)

    _quiet()

    class OnPolicyCLI(LightningCLI):
        """LightningCLI with completions written to a file by ``predict``."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(callbacks.CompletionWriter, "completions")

    before, sys.argv = (
        sys.argv,
        ["onpolicy", *args],
    )  # LightningCLI warns when its args differ from sys.argv's
    try:
        return OnPolicyCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={name: {"usage": USAGE_RUN.format(name)} for name in COMMANDS},
        )
    finally:
        sys.argv = before


def _quiet() -> None:
    """Leave out other libraries' messages that a user can do nothing about."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per file of weights
    # lightning 2.6.6 with torch 2.13; lightning 2.6.6 with jsonargparse 4.49 and later; frozen teachers are in eval mode.
    for message in (".*LeafSpec.*", ".*was deprecated in v4.49.0.*", r"Found \d+ module\(s\) in eval mode.*"):
        warnings.filterwarnings("ignore", message=message)


def resolve_configs(args: Sequence[str]) -> list[str]:
    """The arguments with every ``-c NAME``, ``--config NAME`` and ``--config=NAME`` turned into a file's path."""
    out: list[str] = []
    for i, arg in enumerate(args):
        if i and args[i - 1] in ("-c", "--config"):
            out.append(find_config(arg))
        elif arg.startswith("--config="):
            out.append(f"--config={find_config(arg.removeprefix('--config='))}")
        else:
            out.append(arg)
    return out


def _value(args: Sequence[str], flag: str) -> str | None:
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(flag + "="):
            return arg.removeprefix(flag + "=")
    return None


def check_checkpoint(path: str | None) -> None:
    """Say in one sentence that a checkpoint cannot be read, before anything else is built.

    Raises:
        FileNotFoundError: If it is a path that does not exist.
        ValueError: If the file is not a readable checkpoint.
    """
    if path is None or path in ("best", "last", "hpc", "registry", "null") or "://" in path:
        return
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"--ckpt_path {path!r} does not exist.")
    if file.is_dir():  # a sharded (distributed) checkpoint
        return
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"--ckpt_path {path!r} is not a readable checkpoint ({reason}). Nothing was changed."
        ) from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"--ckpt_path {path!r} is not a Lightning checkpoint: it has no state_dict.")


def _chain(error: BaseException) -> str:
    """The message, with that of its direct cause.

    Where a class refuses its arguments, jsonargparse tells it inside the list of all types it tried and of all
    settings; only what the class said is kept.
    """
    message = str(error) or type(error).__name__
    if "Does not validate against any of the Union subtypes" in message:
        said = re.findall(r"^\s*- (?!Expected a <class|Does not validate)(.+)$", message, flags=re.MULTILINE)
        message = "; ".join(dict.fromkeys(said)) or message
    cause = error.__cause__
    return f"{message} (because: {cause})" if cause is not None and str(cause) not in message else message


if __name__ == "__main__":
    main()
