"""Named recipes of long RL on verifiable rewards, as published.

What :class:`~lightning_onpolicy.modules.grpo.ProRLGRPO` takes from a preset: advantage, surrogate, kl, correction,
entropy, reduction, minibatches, lr, temperature. The rest is for the data module and callbacks, and a configuration
must say it itself. "n/s" in a comment: the source does not state it, and the value is a documented default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from lightning_onpolicy.modules.aggregate import PolicyReduction
from lightning_onpolicy.modules.losses.settings import (
    AdvantageSpec,
    CorrectionSpec,
    EntropySpec,
    KLSpec,
    SurrogateSpec,
)

PresetName = Literal[
    "prorl_v1", "prorl_v2", "brorl", "justrl", "dapo", "dr_grpo", "grpo", "gad_paper", "gad_small"
]


@dataclass(frozen=True)
class Stage:
    """A stretch of a run.

    Args:
        context: Prompt and response, in tokens.
        group_size: Completions per prompt.
        updates: Optimizer steps it lasted, where stated.
    """

    context: int
    group_size: int
    updates: int | None = None


@dataclass(frozen=True)
class Reset:
    """Hard resets of the reference to the policy.

    Args:
        every: Optimizer steps between resets.
        optimizer: Whether the optimizer's state goes too.
    """

    every: int
    optimizer: bool


@dataclass(frozen=True)
class Preset:
    """One recipe.

    Args:
        source: Where the numbers come from.
        advantage: What a response was worth.
        surrogate: How far a batch may move the policy.
        kl: What ties the policy to its reference.
        correction: Weights for the sampler's mismatch.
        entropy: What keeps it exploring.
        reduction: From tokens to one loss.
        reduction_length: L of ``constant``.
        minibatches: Optimizer steps per rollout batch.
        lr: AdamW's constant learning rate.
        temperature: Of sampling and training.
        prompts: Prompts per rollout batch.
        dynamic_sampling: Whether groups with equal rewards are replaced.
        reset: Of the reference; None, never.
        stages: In order; the first has the group size to start with.
    """

    source: str
    advantage: AdvantageSpec = field(default_factory=AdvantageSpec)
    surrogate: SurrogateSpec = field(default_factory=SurrogateSpec)
    kl: KLSpec = field(default_factory=KLSpec)
    correction: CorrectionSpec = field(default_factory=CorrectionSpec)
    entropy: EntropySpec = field(default_factory=EntropySpec)
    reduction: PolicyReduction = "token_mean"
    reduction_length: int | None = None
    minibatches: int = 1
    lr: float = 1e-6
    temperature: float = 1.0
    prompts: int = 256
    dynamic_sampling: bool = False
    reset: Reset | None = None
    stages: tuple[Stage, ...] = ()


PRESETS: Mapping[PresetName, Preset] = MappingProxyType(
    {
        # The often-quoted recipe. reduction n/s: DAPO's. β and k3 (forward gradient) by secondary sources. "Every 400
        # steps" is folklore: the paper resets on stalls and degradation; here it is the fallback period.
        "prorl_v1": Preset(
            source="ProRL, 2505.24864",
            advantage=AdvantageSpec("group_zscore"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.4),
            kl=KLSpec(coef=1e-4, gradient="forward"),
            minibatches=4,  # 256 prompts in mini-batches of 64
            lr=2e-6,
            temperature=1.2,
            prompts=256,
            dynamic_sampling=True,
            reset=Reset(every=400, optimizer=True),
            stages=(Stage(8096, 16), Stage(8096, 32), Stage(16384, 16, updates=200)),
        ),
        # β, prompts, minibatches, lr, temperature n/s: as v1, but at 1.0 and 1e-6 as the OpenRLHF port. The printed k2
        # has no gradient (it names the old log-probabilities); log p is meant. Resets every 200–500 steps or on a KL
        # spike, the optimizer is not cleared. Its cosine length term (100 updates on, 500 off) is a reward's affair.
        "prorl_v2": Preset(
            source="ProRL v2, NVIDIA blog, 2025-08-13",
            advantage=AdvantageSpec("reinforce_pp_baseline", whiten="sequence"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.28),
            kl=KLSpec(coef=1e-4, gradient="reverse", clamp=10.0),
            minibatches=4,
            lr=1e-6,
            prompts=256,
            dynamic_sampling=True,
            reset=Reset(every=400, optimizer=False),
            stages=(Stage(8192, 16),),
        ),
        # Continues from ProRL v2, whose loss it keeps as far as stated (clip, KL, temperature n/s). The learning rate
        # grows with the root of the batch: 1e-6 · √(128·512 / (512·16)).
        "brorl": Preset(
            source="BroRL, 2510.01180",
            advantage=AdvantageSpec("reinforce_pp_baseline", whiten="sequence"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.28),
            kl=KLSpec(coef=1e-4, gradient="reverse", clamp=10.0),
            minibatches=4,  # n/s
            lr=2.8e-6,
            prompts=128,
            dynamic_sampling=True,
            stages=(Stage(16384, 512),),
        ),
        # The counter-evidence: no KL, no reset, no dynamic sampling, one stage. reduction n/s: verl's default.
        "justrl": Preset(
            source="JustRL, 2512.16649",
            advantage=AdvantageSpec("group_zscore"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.28),
            minibatches=4,  # 256 prompts in mini-batches of 64
            lr=1e-6,
            prompts=256,
            stages=(Stage(1024 + 15360, 8),),
        ),
        # Its soft overlong penalty (L = 20480, last 4096) is a reward's affair. Temperature of training n/s: 1.0.
        "dapo": Preset(
            source="DAPO, 2503.14476",
            advantage=AdvantageSpec("group_zscore"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.28),
            reduction="token_mean",
            minibatches=16,
            lr=1e-6,
            prompts=512,
            dynamic_sampling=True,
            stages=(Stage(20480, 16),),
        ),
        # By secondary sources: G, L and β; prompts and lr n/s: the released code's.
        "dr_grpo": Preset(
            source="Dr. GRPO, 2503.20783",
            advantage=AdvantageSpec("mean_centred"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.2),
            reduction="constant",
            reduction_length=3000,
            lr=1e-6,
            prompts=128,
            stages=(Stage(3000, 8),),
        ),
        # 1024 responses per batch, one update each. ε and temperature n/s: 0.2 and 1.0.
        "grpo": Preset(
            source="DeepSeekMath, 2402.03300",
            advantage=AdvantageSpec("group_zscore"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.2),
            kl=KLSpec(coef=0.04, gradient="forward"),
            reduction="sequence_mean",
            lr=1e-6,
            prompts=16,
            stages=(Stage(1024, 64),),
        ),
        # Of both players: lr, and one optimizer step each per rollout batch, so no clip acts. ε and reduction n/s: 0.2
        # and GRPO's; k3 (forward gradient) and a clip of gradients at 0.2 by the official scripts. Warm-up: one epoch
        # of 750 batches, the first 10 the discriminator's; then two of the game. Responses up to 1536 tokens.
        "gad_paper": Preset(
            source="GAD, 2511.10643",
            advantage=AdvantageSpec("group_zscore"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.2),
            kl=KLSpec(coef=1e-3, gradient="forward"),
            reduction="sequence_mean",
            lr=1e-6,
            temperature=0.8,
            prompts=256,
            stages=(Stage(2048 + 1536, 8),),
        ),
        # Not published: the paper's, for adapters on one device, with fewer prompts and adapters' learning rate.
        "gad_small": Preset(
            source="gad_paper for low-rank adapters; untested beyond the quickstart's size",
            advantage=AdvantageSpec("group_zscore"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.2),
            kl=KLSpec(coef=1e-3, gradient="forward"),
            reduction="sequence_mean",
            lr=1e-5,
            temperature=0.8,
            prompts=32,
            stages=(Stage(2048 + 1536, 8),),
        ),
    }
)


def preset(name: str) -> Preset:
    """The recipe of that name.

    Raises:
        ValueError: If there is none.
    """
    found: Mapping[str, Preset] = PRESETS  # type: ignore[assignment]
    if name not in found:
        raise ValueError(f"recipe must be one of {sorted(found)}, got {name!r}.")
    return found[name]
