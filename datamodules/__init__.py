"""Where on-policy data comes from: prompts, engines, rewards, the rollout loader."""

if not __name__.startswith("lightning_onpolicy."):  # found through the repository root: a second copy of us
    raise ImportError(
        f"import this as lightning_onpolicy.{__name__}: set PYTHONSAFEPATH=1 or leave the repository."
    )

from typing import TYPE_CHECKING

from lightning_onpolicy._lazy import attach

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Completion as Completion
    from lightning_onpolicy.datamodules.batch import Group as Group
    from lightning_onpolicy.datamodules.batch import Prompt as Prompt
    from lightning_onpolicy.datamodules.batch import RolloutBatch as RolloutBatch
    from lightning_onpolicy.datamodules.batch import Sampling as Sampling
    from lightning_onpolicy.datamodules.batch import collate as collate
    from lightning_onpolicy.datamodules.dynamic import DynamicSampling as DynamicSampling
    from lightning_onpolicy.datamodules.gym import GymSource as GymSource
    from lightning_onpolicy.datamodules.judging.backends import CallableBackend as CallableBackend
    from lightning_onpolicy.datamodules.judging.judge import Judge as Judge
    from lightning_onpolicy.datamodules.judging.meta import MetaReading as MetaReading
    from lightning_onpolicy.datamodules.judging.module import JudgingDataModule as JudgingDataModule
    from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate as JudgeTemplate
    from lightning_onpolicy.datamodules.judging.server import ServerBackend as ServerBackend
    from lightning_onpolicy.datamodules.judging.source import JudgeSource as JudgeSource
    from lightning_onpolicy.datamodules.loader import EvaluationLoader as EvaluationLoader
    from lightning_onpolicy.datamodules.loader import RolloutLoader as RolloutLoader
    from lightning_onpolicy.datamodules.maker import RolloutMaker as RolloutMaker
    from lightning_onpolicy.datamodules.mix import DomainMix as DomainMix
    from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule as OnPolicyDataModule
    from lightning_onpolicy.datamodules.pairs import PairDataModule as PairDataModule
    from lightning_onpolicy.datamodules.preferences import PreferenceDataModule as PreferenceDataModule
    from lightning_onpolicy.datamodules.prompts import PromptStream as PromptStream
    from lightning_onpolicy.datamodules.sources import DatasetSource as DatasetSource
    from lightning_onpolicy.datamodules.sources import FileSource as FileSource
    from lightning_onpolicy.datamodules.supervised import SupervisedDataModule as SupervisedDataModule
    from lightning_onpolicy.datamodules.targets import TargetLengthSource as TargetLengthSource
    from lightning_onpolicy.datamodules.teacher_text import TeacherTextSource as TeacherTextSource
    from lightning_onpolicy.datamodules.trajectories import TrajectoryDataModule as TrajectoryDataModule

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CallableBackend": "judging.backends",
        "collate": "batch",
        "Completion": "batch",
        "DatasetSource": "sources",
        "DomainMix": "mix",
        "DynamicSampling": "dynamic",
        "EvaluationLoader": "loader",
        "FileSource": "sources",
        "Group": "batch",
        "GymSource": "gym",
        "Judge": "judging.judge",
        "JudgeSource": "judging.source",
        "JudgeTemplate": "judging.prompts",
        "JudgingDataModule": "judging.module",
        "MetaReading": "judging.meta",
        "OnPolicyDataModule": "onpolicy",
        "PairDataModule": "pairs",
        "PreferenceDataModule": "preferences",
        "Prompt": "batch",
        "PromptStream": "prompts",
        "RolloutBatch": "batch",
        "RolloutLoader": "loader",
        "RolloutMaker": "maker",
        "Sampling": "batch",
        "ServerBackend": "judging.server",
        "SupervisedDataModule": "supervised",
        "TargetLengthSource": "targets",
        "TeacherTextSource": "teacher_text",
        "TrajectoryDataModule": "trajectories",
    },
)
