"""Callbacks, each usable in any Lightning project."""

if not __name__.startswith("lightning_onpolicy."):  # found through the repository root: a second copy of us
    raise ImportError(
        f"import this as lightning_onpolicy.{__name__}: set PYTHONSAFEPATH=1 or leave the repository."
    )

from typing import TYPE_CHECKING

from lightning_onpolicy._lazy import attach

if TYPE_CHECKING:
    from lightning_onpolicy.callbacks.adversary import AdversaryMonitor as AdversaryMonitor
    from lightning_onpolicy.callbacks.adversary_rules import GameRules as GameRules
    from lightning_onpolicy.callbacks.completions import CompletionWriter as CompletionWriter
    from lightning_onpolicy.callbacks.evaluation_report import EvaluationReport as EvaluationReport
    from lightning_onpolicy.callbacks.export import ExportHF as ExportHF
    from lightning_onpolicy.callbacks.interruptible import Interruptible as Interruptible
    from lightning_onpolicy.callbacks.judge_report import JudgeReport as JudgeReport
    from lightning_onpolicy.callbacks.monitors import MismatchMonitor as MismatchMonitor
    from lightning_onpolicy.callbacks.monitors import PhaseMonitor as PhaseMonitor
    from lightning_onpolicy.callbacks.report import LearningCurve as LearningCurve
    from lightning_onpolicy.callbacks.resets import OptimizerReset as OptimizerReset
    from lightning_onpolicy.callbacks.resets import ReferenceReset as ReferenceReset
    from lightning_onpolicy.callbacks.rollouts import RolloutLogger as RolloutLogger
    from lightning_onpolicy.callbacks.stages import StageSchedule as StageSchedule
    from lightning_onpolicy.callbacks.triggers import Ceiling as Ceiling
    from lightning_onpolicy.callbacks.triggers import EveryNSteps as EveryNSteps
    from lightning_onpolicy.callbacks.triggers import Stall as Stall
    from lightning_onpolicy.callbacks.triggers import Trigger as Trigger

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AdversaryMonitor": "adversary",
        "Ceiling": "triggers",
        "CompletionWriter": "completions",
        "EvaluationReport": "evaluation_report",
        "EveryNSteps": "triggers",
        "ExportHF": "export",
        "GameRules": "adversary_rules",
        "Interruptible": "interruptible",
        "JudgeReport": "judge_report",
        "LearningCurve": "report",
        "MismatchMonitor": "monitors",
        "OptimizerReset": "resets",
        "PhaseMonitor": "monitors",
        "ReferenceReset": "resets",
        "RolloutLogger": "rollouts",
        "StageSchedule": "stages",
        "Stall": "triggers",
        "Trigger": "triggers",
    },
)
