"""Settings refuse what makes no sense by its key; recipes hold the published numbers."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest

from lightning_onpolicy.modules.critic import CriticSpec
from lightning_onpolicy.modules.losses.settings import (
    AdvantageSpec,
    CorrectionSpec,
    EntropySpec,
    KLSpec,
    SurrogateSpec,
)
from lightning_onpolicy.modules.presets import PRESETS, PresetName, preset
from lightning_onpolicy.modules.specs import LoraSpec


@pytest.mark.parametrize(
    ("spec", "settings", "key"),
    [
        (AdvantageSpec, {"kind": "ppo"}, "advantage.kind"),
        (AdvantageSpec, {"lam": 0.9}, "advantage.lam"),
        (AdvantageSpec, {"kind": "leave_one_out", "gamma": 0.9}, "advantage.gamma"),
        (AdvantageSpec, {"kind": "gae", "gamma": 1.1}, "advantage.gamma"),
        (AdvantageSpec, {"kind": "gae", "whiten": "sequence"}, "advantage.whiten"),
        (AdvantageSpec, {"kind": "gae", "eps": 1e-3}, "advantage.eps"),
        (CriticSpec, {"clip": 0.0}, "critic.clip"),
        (CriticSpec, {"updates": 0}, "critic.updates"),
        (CriticSpec, {"warmup": -1}, "critic.warmup"),
        (CriticSpec, {"bootstrap": "mean"}, "critic.bootstrap"),
        (CriticSpec, {"model": "x", "lora": LoraSpec()}, "critic.lora"),
        (AdvantageSpec, {"std": "none"}, "advantage.std"),
        (AdvantageSpec, {"kind": "mean_centred", "std": "population"}, "advantage.std"),
        (AdvantageSpec, {"whiten": "token"}, "advantage.whiten"),
        (AdvantageSpec, {"kind": "leave_one_out", "eps": 0.1}, "advantage.eps"),
        (AdvantageSpec, {"eps": -1.0}, "advantage.eps"),
        (SurrogateSpec, {"kind": "ppo"}, "surrogate.kind"),
        (SurrogateSpec, {"low": 1.5}, "surrogate.low"),
        (SurrogateSpec, {"high": -0.1}, "surrogate.high"),
        (SurrogateSpec, {"kind": "sapo", "high": 0.2}, "surrogate.high"),
        (SurrogateSpec, {"kind": "reinforce", "low": 0.2}, "surrogate.low"),
        (SurrogateSpec, {"kind": "gspo", "dual": 3.0}, "surrogate.dual"),
        (SurrogateSpec, {"high": 0.5, "dual": 1.4}, "surrogate.dual"),
        (SurrogateSpec, {"kappa_positive": 1.0}, "surrogate.kappa_positive"),
        (SurrogateSpec, {"kind": "sapo", "kappa_negative": 0.0}, "surrogate.kappa_negative"),
        (KLSpec, {"coef": -1.0}, "kl.coef"),
        (KLSpec, {"coef": 0.1, "gradient": "k3"}, "kl.gradient"),
        (KLSpec, {"coef": 0.1, "clamp": 30.0}, "kl.clamp"),
        (KLSpec, {"coef": 0.1, "place": "reward", "gradient": "forward"}, "kl.gradient"),
        (KLSpec, {"coef": 0.1, "place": "reward", "clamp": 10.0}, "kl.clamp"),
        (CorrectionSpec, {"kind": "mis"}, "correction.kind"),
        (CorrectionSpec, {"high": 2.0}, "correction.high"),
        (CorrectionSpec, {"kind": "tis", "low": 3.0}, "correction.high"),
        (CorrectionSpec, {"kind": "icepop", "low": 1.5}, "correction.low"),
        (EntropySpec, {"bonus": -0.1}, "entropy.bonus"),
        (EntropySpec, {"target": 0.0}, "entropy.target"),
        (EntropySpec, {"step": 0.1}, "entropy.step"),
        (EntropySpec, {"share": 0.1}, "entropy.share"),
        (EntropySpec, {"covariance": "cov"}, "entropy.covariance"),
        (EntropySpec, {"covariance": "kl_cov", "cov_low": 0.0}, "entropy.cov_low"),
        (EntropySpec, {"covariance": "clip_cov", "cov_coef": 2.0}, "entropy.cov_coef"),
    ],
)
def test_settings_without_sense_or_effect_are_refused_by_key(spec: Any, settings: Any, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        spec(**settings)


def test_bounds_are_the_papers_unless_given() -> None:
    assert SurrogateSpec("gspo").bounds == (3e-4, 4e-4)
    assert SurrogateSpec("gmpo", low=2.0).bounds == (2.0, 0.4)
    assert SurrogateSpec("clip", high=0.28).bounds == (0.2, 0.28)
    assert SurrogateSpec("sapo").kappas == (1.0, 1.05)
    assert CorrectionSpec("icepop").bounds == (0.5, 5.0)
    assert CorrectionSpec("tis", high=3.0).bounds == (0.0, 3.0)


def test_every_recipe_is_there_with_its_numbers() -> None:
    """The table of the methods' sources. Catches: a number moved from one recipe to another."""
    assert set(PRESETS) == set(get_args(PresetName))
    table = {
        name: (
            *p.surrogate.bounds,
            p.kl.coef,
            p.advantage.kind,
            p.prompts,
            p.minibatches,
            p.lr,
            p.temperature,
        )
        for name, p in PRESETS.items()
    }
    assert table == {
        "prorl_v1": (0.2, 0.4, 1e-4, "group_zscore", 256, 4, 2e-6, 1.2),
        "prorl_v2": (0.2, 0.28, 1e-4, "reinforce_pp_baseline", 256, 4, 1e-6, 1.0),
        "brorl": (0.2, 0.28, 1e-4, "reinforce_pp_baseline", 128, 4, 2.8e-6, 1.0),
        "justrl": (0.2, 0.28, 0.0, "group_zscore", 256, 4, 1e-6, 1.0),
        "dapo": (0.2, 0.28, 0.0, "group_zscore", 512, 16, 1e-6, 1.0),
        "dr_grpo": (0.2, 0.2, 0.0, "mean_centred", 128, 8, 1e-6, 1.0),
        "grpo": (0.2, 0.2, 0.04, "group_zscore", 16, 1, 1e-6, 1.0),
        "gad_paper": (0.2, 0.2, 1e-3, "group_zscore", 256, 1, 1e-6, 0.8),
        "gad_small": (0.2, 0.2, 1e-3, "group_zscore", 32, 1, 1e-5, 0.8),
        "spct": (0.2, 0.2, 0.08, "group_zscore", 128, 1, 4e-7, 1.0),
        "spct_16b": (0.2, 0.2, 0.002, "group_zscore", 128, 1, 4e-7, 1.0),
    }
    first = preset("prorl_v1")
    assert first.dynamic_sampling
    assert first.reset is not None
    assert dataclasses.astuple(first.reset) == (400, True, 0)
    assert [(s.context, s.group_size) for s in first.stages] == [(8096, 16), (8096, 32), (16384, 16)]
    assert first.kl.gradient == "forward"
    second = preset("prorl_v2")
    assert second.reset is not None
    assert dataclasses.astuple(second.reset) == (500, False, 200)
    assert preset("brorl").reset == second.reset
    assert preset("brorl").correction == CorrectionSpec("tis")
    assert preset("justrl").surrogate.dual == 10
    assert second.kl.gradient == "reverse"
    assert preset("dr_grpo").reduction == "constant"
    assert [name for name, p in PRESETS.items() if p.reset is None and not p.dynamic_sampling] == [
        *("justrl", "dr_grpo", "grpo", "gad_paper", "gad_small", "spct", "spct_16b")
    ]
    with pytest.raises(ValueError, match="recipe must be one of"):
        preset("prorl")
