"""Rollout engines: token ids in, token ids with log-probabilities out."""

from typing import TYPE_CHECKING

from lightning_onpolicy._lazy import attach

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.engines.base import Decoder as Decoder
    from lightning_onpolicy.datamodules.engines.base import RolloutEngine as RolloutEngine
    from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine as TransformersEngine
    from lightning_onpolicy.datamodules.engines.vllm_server import VLLMServerEngine as VLLMServerEngine

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Decoder": "base",
        "RolloutEngine": "base",
        "TransformersEngine": "transformers",
        "VLLMServerEngine": "vllm_server",
    },
)
