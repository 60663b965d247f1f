"""The ``onpolicy`` command: ``fit``, ``validate``, ``test``, ``predict``, ``collect``, ``reject``, ``ls``, ``cp``.

Everything after the first four is LightningCLI's; ``-c NAME`` also finds packaged configurations.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_onpolicy._configs import copy_config, find_config, list_configs

USAGE = """usage: onpolicy COMMAND …

  fit, validate, test, predict   run a configuration: onpolicy fit -c quickstart/opd
                                 (-c takes a file or a name from `onpolicy ls`; several are merged in order;
                                 --help and --print_config show every option)
  collect                        fill a file to train on with a teacher's answers, from any OpenAI-compatible API
                                 (--help shows every option; exit code 3: some rows failed, 4: the cap was reached)
  reject                         judge labelled items and keep what is right, as text for a judge to learn from
                                 (--help shows every option)
  ls                             list the packaged configurations
  cp NAME DEST                   copy one for editing

exit code: 0 done, 1 failed for the reason printed, 2 wrong command line, 70 a phase outlived its deadline and could
not be stopped, 130 stopped by Ctrl-C, 143 stopped by SIGTERM; the last checkpoint stays as it was written
"""

COMMANDS = ("fit", "validate", "test", "predict")
SAVE_LAST = "(ModelCheckpoint writes the last one if save_last is true)"
USAGE_RUN = "onpolicy {} -c CONFIG [-c CONFIG …] [--KEY VALUE …] [--print_config] [--help]"

# What jsonargparse says around the reason: that a value may also be null, and everything it was given.
_AROUND = re.compile(
    r"^\s*(- )?(Does not validate against any of the Union subtypes|Subtypes: |Errors:$|Expected a <class 'NoneType'>|"
    r"Given value type: |Given value: (NestedArg|Namespace)\()"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with the exit codes that :data:`USAGE` lists."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(args)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("ONPOLICY_TRACEBACK"):
            raise
        _fail(_chain(error))
    except Exception as error:
        if type(error).__name__ != "MisconfigurationException" or os.environ.get("ONPOLICY_TRACEBACK"):
            raise
        _fail(
            _advised(str(error))
        )  # Lightning's class for a Trainer that cannot be; importing it takes seconds
    except KeyboardInterrupt:
        print("onpolicy: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _fail(message: str) -> NoReturn:
    print(f"onpolicy: error: {message}\n(ONPOLICY_TRACEBACK=1 shows where.)", file=sys.stderr)
    raise SystemExit(1)


def _advised(message: str) -> str:
    """Lightning's refusal of a Trainer's option, with what does the same here."""
    instead = {
        "gradient clipping": "leave out trainer.gradient_clip_val and set model.init_args.loop.max_grad_norm",
        "gradient accumulation": "leave out trainer.accumulate_grad_batches: a step is one batch of rollouts, cut into "
        "pieces of model.init_args.loop.micro_batch_tokens",
    }
    for option, advice in instead.items():
        if option in message.lower():
            return f"methods here make their own optimizer steps: {advice}."
    return message


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
    if command == "collect":
        from lightning_onpolicy.datamodules.collect.command import main as collect

        raise SystemExit(collect(args[1:]))
    if command == "reject":
        import lightning_onpolicy.modules.engine_backend  # noqa: F401 (known by its short name)
        from lightning_onpolicy.datamodules.judging.reject import main as reject

        raise SystemExit(reject(resolve_configs(args)[1:]))
    if command not in COMMANDS:
        print(f"onpolicy: error: unknown command {command!r}\n{USAGE}", file=sys.stderr)
        raise SystemExit(2)
    if len(args) == 1:
        print(
            f"usage: {USAGE_RUN.format(command)}\nonpolicy: error: name a configuration with -c.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    args = resolve_configs(args)
    check_checkpoint(_value(args, "--ckpt_path"))
    _lightning_cli(args)


def _lightning_cli(args: list[str]) -> Any:
    # Imported here, so that `ls`, `cp` and usage errors answer at once.
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    import lightning_onpolicy.callbacks as callbacks
    import lightning_onpolicy.datamodules as datamodules
    import lightning_onpolicy.datamodules.engines as engines
    import lightning_onpolicy.datamodules.rewards as rewards
    import lightning_onpolicy.datamodules.tools as tools
    import lightning_onpolicy.modules as modules

    for package in (
        modules,
        datamodules,
        engines,
        rewards,
        tools,
        callbacks,
    ):  # short class names need imported classes
        for name in package.__all__:
            getattr(package, name)

    _quiet()

    class Parser(LightningArgumentParser):
        """Errors with the reason, without what jsonargparse says around it."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            super().error("\n".join(_reason(message)), ex)

    class SaveConfig(SaveConfigCallback):
        """Saves the configuration once there is a batch to train on: a run that cannot start changes no file."""

        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            """Too early."""

        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            super().setup(trainer, pl_module, "fit")

    class NoLastCheckpoint(Callback):
        """Says that ``ckpt_path: last`` found nothing: training starts from scratch, evaluations do not start."""

        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.ckpt_path is None and trainer.is_global_zero:
                said = f"there is no checkpoint yet, so training starts from scratch {SAVE_LAST}."
                print(f"onpolicy: --ckpt_path last: {said}", file=sys.stderr)

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.ckpt_path is None and trainer.state.fn != "fit":
                raise FileNotFoundError(f"--ckpt_path last: there is no checkpoint to evaluate {SAVE_LAST}.")

        on_test_start = on_predict_start = on_validation_start

    class OnPolicyCLI(LightningCLI):
        """LightningCLI with completions written to a file by ``predict``, tables printed by ``validate`` and ``test``,
        and a word where no checkpoint is found."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(callbacks.CompletionWriter, "completions")
            parser.add_lightning_class_args(callbacks.EvaluationReport, "evaluation")

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(callbacks.Interruptible())  # type: ignore[attr-defined]
            return trainer

        def _look_for_last(self) -> None:
            if self.config[self.subcommand].get("ckpt_path") == "last":
                trainer: Any = self.trainer
                trainer.callbacks.append(NoLastCheckpoint())

        before_fit = before_validate = before_test = before_predict = _look_for_last

    # LightningCLI warns when its args differ from sys.argv's.
    before, sys.argv = sys.argv, ["onpolicy", *args]
    try:
        return OnPolicyCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            # No abbreviations: a mistyped key is an error, also where it is the beginning of another.
            parser_kwargs={
                "allow_abbrev": False,
                **{name: {"usage": USAGE_RUN.format(name), "allow_abbrev": False} for name in COMMANDS},
            },
        )
    except SIGTERMException:  # a SystemExit without a code, which would read as success
        raise SystemExit(143) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning ends with 1, as if the run had failed
            raise SystemExit(130) from None
        raise
    finally:
        sys.argv = before


def _quiet() -> None:
    """Leave out other libraries' messages that a user can do nothing about."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per file of weights
    for message in (
        ".*LeafSpec.*",  # lightning 2.6.6 with torch 2.13
        ".*was deprecated in v4.49.0.*",  # lightning 2.6.6 with jsonargparse 4.49 and later
        r"Found \d+ module\(s\) in eval mode",  # frozen teachers are
        "Using ModelCheckpoint with manual optimization",  # checkpoints are meant to follow the optimizer step
        "Couldn't infer the batch indices",  # loaders make their batches; there is no sampler
        r"\.\w+\(ckpt_path=\"last\"\) is set",  # said in one line, or an error
    ):
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
    if file.is_dir():
        if not (file / "meta.pt").is_file():
            raise ValueError(
                f"--ckpt_path {path!r} is a folder, and no sharded checkpoint: it has no meta.pt."
            )
        return
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"--ckpt_path {path!r} is not a readable checkpoint: it is cut short, or no checkpoint at all. "
            "Nothing was changed."
        )
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


def _reason(message: str) -> list[str]:
    """The message's lines, without those that jsonargparse puts around the reason and without repetitions."""
    lines = [line for line in message.splitlines() if not _AROUND.match(line)]
    return list(dict.fromkeys(lines)) or message.splitlines()


def _chain(error: BaseException) -> str:
    """The message, with that of its direct cause where that says more."""
    message, cause = (
        "\n".join(line.strip().removeprefix("- ") for line in _reason(str(e)))
        for e in (error, error.__cause__ or "")
    )
    message = message or type(error).__name__
    return message if cause in message else f"{message} (because: {cause})"


if __name__ == "__main__":
    main()
