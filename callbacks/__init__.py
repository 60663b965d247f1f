"""Callbacks, each usable in any Lightning project."""

if not __name__.startswith("lightning_onpolicy."):  # found through the repository root: a second copy of us
    raise ImportError(
        f"import this as lightning_onpolicy.{__name__}: set PYTHONSAFEPATH=1 or leave the repository."
    )

from typing import TYPE_CHECKING

from lightning_onpolicy._lazy import attach

if TYPE_CHECKING:
    from lightning_onpolicy.callbacks.completions import CompletionWriter as CompletionWriter
    from lightning_onpolicy.callbacks.export import ExportHF as ExportHF
    from lightning_onpolicy.callbacks.monitors import MismatchMonitor as MismatchMonitor
    from lightning_onpolicy.callbacks.monitors import PhaseMonitor as PhaseMonitor
    from lightning_onpolicy.callbacks.report import LearningCurve as LearningCurve
    from lightning_onpolicy.callbacks.rollouts import RolloutLogger as RolloutLogger

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CompletionWriter": "completions",
        "ExportHF": "export",
        "LearningCurve": "report",
        "MismatchMonitor": "monitors",
        "PhaseMonitor": "monitors",
        "RolloutLogger": "rollouts",
    },
)
