"""Rewards: whole groups in, one score or None per completion out."""

from typing import TYPE_CHECKING

from lightning_onpolicy._lazy import attach

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.rewards.base import Reward as Reward
    from lightning_onpolicy.datamodules.rewards.code import CodeReward as CodeReward
    from lightning_onpolicy.datamodules.rewards.function import FunctionReward as FunctionReward
    from lightning_onpolicy.datamodules.rewards.gym import GymReward as GymReward
    from lightning_onpolicy.datamodules.rewards.sandbox import Sandbox as Sandbox
    from lightning_onpolicy.datamodules.rewards.workers import WorkerPool as WorkerPool

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CodeReward": "code",
        "FunctionReward": "function",
        "GymReward": "gym",
        "Reward": "base",
        "Sandbox": "sandbox",
        "WorkerPool": "workers",
    },
)
