"""Methods: each a thin LightningModule over pure functions."""

if not __name__.startswith("lightning_onpolicy."):  # found through the repository root: a second copy of us
    raise ImportError(
        f"import this as lightning_onpolicy.{__name__}: set PYTHONSAFEPATH=1 or leave the repository."
    )

from typing import TYPE_CHECKING

from lightning_onpolicy._lazy import attach

if TYPE_CHECKING:
    from lightning_onpolicy.modules.discriminator import GADDiscriminator as GADDiscriminator
    from lightning_onpolicy.modules.distill import OnPolicyDistill as OnPolicyDistill
    from lightning_onpolicy.modules.engine_backend import EngineBackend as EngineBackend
    from lightning_onpolicy.modules.gad import GAD as GAD
    from lightning_onpolicy.modules.gad_generator import GADGenerator as GADGenerator
    from lightning_onpolicy.modules.grpo import ProRLGRPO as ProRLGRPO
    from lightning_onpolicy.modules.meta_reward import MetaRewardModel as MetaRewardModel
    from lightning_onpolicy.modules.meta_scorer import MetaRewardScorer as MetaRewardScorer
    from lightning_onpolicy.modules.onpolicy import OnPolicyModule as OnPolicyModule
    from lightning_onpolicy.modules.policy import Policy as Policy
    from lightning_onpolicy.modules.preference import PreferenceTune as PreferenceTune
    from lightning_onpolicy.modules.scalar import ScalarModel as ScalarModel
    from lightning_onpolicy.modules.scalar_reward import ScalarReward as ScalarReward
    from lightning_onpolicy.modules.spct import JudgingSpec as JudgingSpec
    from lightning_onpolicy.modules.spct import SPCTReward as SPCTReward
    from lightning_onpolicy.modules.specs import LoraSpec as LoraSpec
    from lightning_onpolicy.modules.specs import ModelSpec as ModelSpec
    from lightning_onpolicy.modules.supervised import SupervisedFineTune as SupervisedFineTune

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "EngineBackend": "engine_backend",
        "GAD": "gad",
        "GADDiscriminator": "discriminator",
        "GADGenerator": "gad_generator",
        "JudgingSpec": "spct",
        "LoraSpec": "specs",
        "MetaRewardModel": "meta_reward",
        "MetaRewardScorer": "meta_scorer",
        "ModelSpec": "specs",
        "OnPolicyDistill": "distill",
        "OnPolicyModule": "onpolicy",
        "Policy": "policy",
        "PreferenceTune": "preference",
        "ProRLGRPO": "grpo",
        "ScalarModel": "scalar",
        "ScalarReward": "scalar_reward",
        "SPCTReward": "spct",
        "SupervisedFineTune": "supervised",
    },
)
