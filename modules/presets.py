"""Named recipes of long RL on verifiable rewards, as published.

What :class:`~lightning_onpolicy.modules.grpo.ProRLGRPO` takes from a preset: advantage, surrogate, kl, correction,
entropy, reduction, minibatches, lr. The rest is for the data module and callbacks: the packaged configuration of the
same name says it. "n/s": the source does not state it, and the value is a documented default. A *step* of the sources
is a rollout batch, which is ``minibatches`` optimizer steps here.

n/s everywhere unless said: ``reduction`` token_mean (DAPO's, and verl's default, in which ProRL and JustRL were run),
the standard deviation of ``group_zscore`` with Bessel's correction (verl, oat), Adam's settings.
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
    "prorl_v1",
    "prorl_v2",
    "brorl",
    "justrl",
    "dapo",
    "dr_grpo",
    "grpo",
    "gad_paper",
    "gad_small",
    "spct",
    "spct_16b",
]


@dataclass(frozen=True)
class Stage:
    """A stretch of a run.

    Args:
        context: Prompt and response, in tokens.
        group_size: Completions per prompt.
        batches: Rollout batches it lasted, where stated.
    """

    context: int
    group_size: int
    batches: int | None = None


@dataclass(frozen=True)
class Reset:
    """Hard resets of the reference to the policy.

    Args:
        most: Rollout batches after which there is one in any case.
        optimizer: Whether the optimizer's state goes too.
        least: Fewest rollout batches between two, where a stall may call for one.
    """

    most: int
    optimizer: bool
    least: int = 0


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
        lr: AdamW's constant learning rate, after a warm-up if there is one.
        temperature: Of sampling, and so of training.
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


def _spct(beta: float) -> Preset:
    """SPCT's reinforcement stage: learning rate, batch 512 (of responses, so 128 prompts), G 4, β by the model's size
    (0.08 for 27B, 0.002 for 16B; a small one collapsed where there was little to learn), loss and KL per response. ε,
    updates per batch, temperature, lengths, estimator of the KL n/s: 0.2, 1, 1, 4096 each, k3 as in the original GRPO.
    """
    return Preset(
        source="SPCT, 2504.02495",
        advantage=AdvantageSpec("group_zscore"),
        surrogate=SurrogateSpec("clip", low=0.2, high=0.2),
        kl=KLSpec(coef=beta, gradient="forward"),
        reduction="sequence_mean",
        lr=4e-7,
        prompts=128,
        stages=(Stage(4096 + 4096, 4),),
    )


PRESETS: Mapping[PresetName, Preset] = MappingProxyType(
    {
        # §3.2: clip, dynamic sampling, temperature, 256 in mini-batches of 64 (of what is n/s: prompts), learning rate,
        # G, 8096. §3.3 and appendix: resets of both on stalls and degradation, G 16 → 32 → 16, 16K for the last 200
        # steps. KL: in the loss; β and k3 (forward gradient) by secondary sources (2507.12507). "Every 400 steps" is
        # folklore: here the most between two.
        "prorl_v1": Preset(
            source="ProRL, 2505.24864",
            advantage=AdvantageSpec("group_zscore"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.4),
            kl=KLSpec(coef=1e-4, gradient="forward"),
            minibatches=4,
            lr=2e-6,
            temperature=1.2,
            prompts=256,
            dynamic_sampling=True,
            reset=Reset(most=400, optimizer=True),
            stages=(Stage(8096, 16), Stage(8096, 32), Stage(16384, 16, batches=200)),
        ),
        # β, prompts, minibatches, lr, temperature n/s: β, lr and temperature of the OpenRLHF port, the others as v1.
        # (Both ports: clip 0.27, and IcePop [0.5, 5], which does nothing where the sampler is the trainer.) The printed
        # k2 has no gradient (it names the old log-probabilities); log p is meant. Resets every 200–500 steps, on a
        # stall or a KL spike; the optimizer is not cleared. Its cosine length term (100 steps on, 500 off) is a
        # reward's affair.
        "prorl_v2": Preset(
            source="ProRL v2, NVIDIA blog, 2025-08-13",
            advantage=AdvantageSpec("reinforce_pp_baseline", whiten="sequence"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.28),
            kl=KLSpec(coef=1e-4, gradient="reverse", clamp=10.0),
            minibatches=4,
            lr=1e-6,
            prompts=256,
            dynamic_sampling=True,
            reset=Reset(most=500, optimizer=False, least=200),
            stages=(Stage(8192, 16),),
        ),
        # §4.2: continues from ProRL v2 and its loss (numbers of clip and KL n/s: v2's) with truncated importance
        # sampling (C n/s) and resets (period n/s: v2's); 128 prompts, 16K; as many mini-batches as before (n/s: v2's),
        # and the learning rate grows with the root of the batch: 1e-6 · √(128·512 / (512·16)). Temperature n/s.
        "brorl": Preset(
            source="BroRL, 2510.01180",
            advantage=AdvantageSpec("reinforce_pp_baseline", whiten="sequence"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.28),
            kl=KLSpec(coef=1e-4, gradient="reverse", clamp=10.0),
            correction=CorrectionSpec("tis"),
            minibatches=4,
            lr=2.8e-6,
            prompts=128,
            dynamic_sampling=True,
            reset=Reset(most=500, optimizer=False, least=200),
            stages=(Stage(16384, 512),),
        ),
        # The counter-evidence: no KL, no reset, no dynamic sampling, one stage. All from the paper and its released
        # script (thunlp/JustRL), which also has dual clip 10, a warm-up over 10 steps and weight decay 0.1.
        "justrl": Preset(
            source="JustRL, 2512.16649",
            advantage=AdvantageSpec("group_zscore"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.28, dual=10.0),
            minibatches=4,  # 256 prompts in mini-batches of 64
            lr=1e-6,
            prompts=256,
            stages=(Stage(1024 + 15360, 8),),
        ),
        # §4.1: 512 prompts × 16 in mini-batches of 512 responses, warm-up over 20 steps, responses up to 20480 of which
        # the last 4096 are the soft overlong penalty's (a reward's affair). Released code (verl, recipe/dapo): the same
        # as 512 prompts in mini-batches of 32, temperature 1, prompts up to 2048; its warm-up takes 10 steps.
        "dapo": Preset(
            source="DAPO, 2503.14476",
            advantage=AdvantageSpec("group_zscore"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.28),
            reduction="token_mean",
            minibatches=16,
            lr=1e-6,
            prompts=512,
            dynamic_sampling=True,
            stages=(Stage(2048 + 20480, 16),),
        ),
        # Released code (sail-sg/understand-r1-zero, in oat): all numbers; 128 prompts × 8 in mini-batches of 128
        # responses. Truncated responses get reward 0 there (a reward's affair).
        "dr_grpo": Preset(
            source="Dr. GRPO, 2503.20783",
            advantage=AdvantageSpec("mean_centred"),
            surrogate=SurrogateSpec("clip", low=0.2, high=0.2),
            reduction="constant",
            reduction_length=3000,
            minibatches=8,
            lr=1e-6,
            prompts=128,
            stages=(Stage(1024 + 3000, 8),),
        ),
        # §4.2: learning rate, β, 64 outputs, "max length" 1024, batch 1024 (of responses, so 16 prompts), one update.
        # ε and temperature n/s: 0.2 and 1.
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
        "spct": _spct(0.08),
        "spct_16b": _spct(0.002),
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
