"""Rewards: whole groups in, one score or None per completion out."""

from typing import TYPE_CHECKING

from lightning_onpolicy._lazy import attach

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.rewards.base import Reward as Reward
    from lightning_onpolicy.datamodules.rewards.code import CodeReward as CodeReward
    from lightning_onpolicy.datamodules.rewards.composite import GatedReward as GatedReward
    from lightning_onpolicy.datamodules.rewards.composite import RoutedReward as RoutedReward
    from lightning_onpolicy.datamodules.rewards.composite import WeightedReward as WeightedReward
    from lightning_onpolicy.datamodules.rewards.format import TagReward as TagReward
    from lightning_onpolicy.datamodules.rewards.function import FunctionReward as FunctionReward
    from lightning_onpolicy.datamodules.rewards.generative import GenerativeReward as GenerativeReward
    from lightning_onpolicy.datamodules.rewards.gym import GymReward as GymReward
    from lightning_onpolicy.datamodules.rewards.instructions import InstructionReward as InstructionReward
    from lightning_onpolicy.datamodules.rewards.judgement import JudgementReward as JudgementReward
    from lightning_onpolicy.datamodules.rewards.judgement import ReadableReward as ReadableReward
    from lightning_onpolicy.datamodules.rewards.lengths import Cosine as Cosine
    from lightning_onpolicy.datamodules.rewards.lengths import KimiLength as KimiLength
    from lightning_onpolicy.datamodules.rewards.lengths import L1Exact as L1Exact
    from lightning_onpolicy.datamodules.rewards.lengths import L1Max as L1Max
    from lightning_onpolicy.datamodules.rewards.lengths import Overlong as Overlong
    from lightning_onpolicy.datamodules.rewards.lengths import StopProperly as StopProperly
    from lightning_onpolicy.datamodules.rewards.math import MathReward as MathReward
    from lightning_onpolicy.datamodules.rewards.sandbox import Sandbox as Sandbox
    from lightning_onpolicy.datamodules.rewards.shaping import Scheduled as Scheduled
    from lightning_onpolicy.datamodules.rewards.shaping import Shaper as Shaper
    from lightning_onpolicy.datamodules.rewards.stem import ChoiceReward as ChoiceReward
    from lightning_onpolicy.datamodules.rewards.stem import NumericReward as NumericReward
    from lightning_onpolicy.datamodules.rewards.workers import WorkerPool as WorkerPool

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ChoiceReward": "stem",
        "CodeReward": "code",
        "Cosine": "lengths",
        "FunctionReward": "function",
        "GatedReward": "composite",
        "GenerativeReward": "generative",
        "GymReward": "gym",
        "InstructionReward": "instructions",
        "JudgementReward": "judgement",
        "KimiLength": "lengths",
        "L1Exact": "lengths",
        "L1Max": "lengths",
        "MathReward": "math",
        "NumericReward": "stem",
        "Overlong": "lengths",
        "ReadableReward": "judgement",
        "Reward": "base",
        "RoutedReward": "composite",
        "Sandbox": "sandbox",
        "Scheduled": "shaping",
        "Shaper": "shaping",
        "StopProperly": "lengths",
        "TagReward": "format",
        "WeightedReward": "composite",
        "WorkerPool": "workers",
    },
)
