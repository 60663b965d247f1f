"""Typed settings of policy-gradient methods: orthogonal, frozen, refused by name when they make no sense.

Each speaks of one question: what an action was worth (:class:`AdvantageSpec`), how far one batch may move the policy
(:class:`SurrogateSpec`), what ties it to a reference (:class:`KLSpec`), what if the sampler is not the trainer
(:class:`CorrectionSpec`), what keeps it exploring (:class:`EntropySpec`). A setting that the chosen kind would ignore
is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

AdvantageKind = Literal["group_zscore", "mean_centred", "leave_one_out", "reinforce_pp_baseline", "gae"]
SurrogateKind = Literal["clip", "gspo", "gmpo", "cispo", "sapo", "reinforce"]
KLGradient = Literal["reverse", "forward"]
CorrectionKind = Literal["none", "tis", "icepop", "sequence_mask", "sequence_mask_tis"]
CovarianceKind = Literal["clip_cov", "kl_cov"]
Std = Literal["population", "bessel"]

#: Clip bounds (low, high) of each surrogate where none are given: the papers' own.
BOUNDS: dict[str, tuple[float, float]] = {
    "clip": (0.2, 0.2),  # PPO, 1707.06347; GRPO states none
    "gspo": (3e-4, 4e-4),  # 2507.18071, §5.1
    "gmpo": (0.4, 0.4),  # 2507.20673: ratios in (e^-0.4, e^0.4)
    "cispo": (1.0, 4.0),  # weights in [0, 5]: ScaleRL (2510.13786); MiniMax-M1 n/s
}
#: Weights (low, high) of each correction where none are given.
WEIGHTS: dict[str, tuple[float, float]] = {
    "tis": (0.0, 2.0),  # C = 2: its authors' 32B example, and verl's default
    "icepop": (0.5, 5.0),  # both ProRL v2 ports (NeMo-RL, OpenRLHF)
    "sequence_mask": (0.999, 1.002),  # NeMo-RL v2.1 (MoE)
    "sequence_mask_tis": (0.999, 1.002),
}


@dataclass(frozen=True)
class AdvantageSpec:
    """What a response, or a token, was worth: from its group's rewards, or by a critic.

    Args:
        kind: ``group_zscore`` (GRPO), ``mean_centred`` (Dr. GRPO), ``leave_one_out`` (RLOO),
            ``reinforce_pp_baseline`` (mean-centred, then whitened over the whole batch and all ranks) or ``gae`` (PPO:
            a critic's values instead of the group, and an advantage per token).
        std: Of ``group_zscore``: ``bessel`` (÷ G − 1: TRL, verl and OpenRLHF) or ``population`` (÷ G).
        whiten: Of ``reinforce_pp_baseline``: moments over ``sequence`` (each response once: ProRL v2's formula; null
            means it) or ``token`` (each response by its length: verl and NeMo-RL). Of ``gae``: ``token`` whitens over
            all trained tokens and ranks (PPO's habit), null does not.
        eps: Added to the standard deviation.
        gamma: Of ``gae``: discount per token.
        lam: Of ``gae``: λ; less than 1 trusts the critic for what comes after a token. With γ = λ = 1, the defaults and
            Open-Reasoner-Zero's setting (2503.24290), A = reward to go − V: no bias, whatever the critic.
    """

    kind: AdvantageKind = "group_zscore"
    std: Std = "bessel"
    whiten: Literal["sequence", "token"] | None = None
    eps: float = 1e-6
    gamma: float = 1.0
    lam: float = 1.0

    def __post_init__(self) -> None:
        _one_of("advantage.kind", self.kind, AdvantageKind)
        _one_of("advantage.std", self.std, Std)
        whitens = (None, "token") if self.kind == "gae" else (None, "sequence", "token")
        _require(self.whiten in whitens, "advantage.whiten", self.whiten, f"one of {whitens}")
        _require(self.eps >= 0, "advantage.eps", self.eps, ">= 0")
        _unused(self.std != "bessel", "advantage.std", self.kind, "group_zscore")
        _unused(self.whiten is not None, "advantage.whiten", self.kind, "reinforce_pp_baseline", "gae")
        with_eps = ("group_zscore", "reinforce_pp_baseline", *(["gae"] if self.whiten else []))
        _unused(self.eps != 1e-6, "advantage.eps", self.kind, *with_eps)
        for key in ("gamma", "lam"):
            value = getattr(self, key)
            _require(0 <= value <= 1, f"advantage.{key}", value, "in [0, 1]")
            _unused(value != 1.0, f"advantage.{key}", self.kind, "gae")


@dataclass(frozen=True)
class SurrogateSpec:
    """How far one batch may move the policy.

    Args:
        kind: ``clip`` (PPO, GRPO, DAPO), ``gspo``, ``gmpo``, ``cispo``, ``sapo``, or ``reinforce`` (no ratio at all).
        low: Ratios may fall to 1 − low (``gmpo``: log-ratios to −low); null: the kind's own default.
        high: Ratios may rise to 1 + high (``gmpo``: log-ratios to high); null: the kind's own default.
        dual: Of ``clip``: for negative advantages, ratios above this no longer count (dual clip c ≈ 3, INTELLECT-2
            δ = 4: the same function); null leaves them.
        kappa_positive: Of ``sapo``: steepness of the gate for positive advantages; null: 1.
        kappa_negative: Of ``sapo``: for negative ones; null: 1.05.
    """

    kind: SurrogateKind = "clip"
    low: float | None = None
    high: float | None = None
    dual: float | None = None
    kappa_positive: float | None = None
    kappa_negative: float | None = None

    def __post_init__(self) -> None:
        _one_of("surrogate.kind", self.kind, SurrogateKind)
        for key in ("low", "high"):
            value = getattr(self, key)
            _unused(value is not None, f"surrogate.{key}", self.kind, *BOUNDS)
            _require(value is None or value >= 0, f"surrogate.{key}", value, ">= 0 or null")
        _require(
            self.low is None or self.low <= 1 or self.kind == "gmpo",
            "surrogate.low",
            self.low,
            "at most 1: ratios are positive",
        )
        _unused(self.dual is not None, "surrogate.dual", self.kind, "clip")
        _require(
            self.dual is None or self.dual > 1 + self.bounds[1],
            "surrogate.dual",
            self.dual,
            f"above 1 + high = {1 + self.bounds[1]:g}",
        )
        for key in ("kappa_positive", "kappa_negative"):
            value = getattr(self, key)
            _unused(value is not None, f"surrogate.{key}", self.kind, "sapo")
            _require(value is None or value > 0, f"surrogate.{key}", value, "positive or null")

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high), the kind's defaults filled in; (0, 0) for kinds without bounds."""
        low, high = BOUNDS.get(self.kind, (0.0, 0.0))
        return low if self.low is None else self.low, high if self.high is None else self.high

    @property
    def kappas(self) -> tuple[float, float]:
        """(positive, negative) steepness of the gate, defaults filled in (2511.20347)."""
        positive, negative = self.kappa_positive, self.kappa_negative
        return 1.0 if positive is None else positive, 1.05 if negative is None else negative


@dataclass(frozen=True)
class KLSpec:
    """What ties the policy to a reference.

    Args:
        coef: β; 0 switches it off: no reference is kept, and the settings below wait.
        gradient: Of the penalty in the loss, on-policy: ``reverse`` (that of KL(π‖ref); "k2") or ``forward`` (that of
            KL(ref‖π); what "k3" as a loss follows).
        place: ``loss``, or ``reward``: β · Σ_t (log π − log ref) is taken off the response's reward; with
            ``advantage.kind`` ``gae``, β (log π − log ref) off each token's.
        clamp: The penalty's pull on log π is at most this many nats (ProRL v2: 10); null: the ±20 of all log-ratios.
        importance: Weigh the penalty by π/π_old, so that its gradient stays true over several updates per rollout.
    """

    coef: float = 0.0
    gradient: KLGradient = "reverse"
    place: Literal["loss", "reward"] = "loss"
    clamp: float | None = None
    importance: bool = False

    def __post_init__(self) -> None:
        _require(self.coef >= 0, "kl.coef", self.coef, ">= 0")
        _one_of("kl.gradient", self.gradient, KLGradient)
        _require(self.place in ("loss", "reward"), "kl.place", self.place, "loss or reward")
        _require(self.clamp is None or 0 < self.clamp <= 20, "kl.clamp", self.clamp, "in (0, 20] or null")
        for key, default in (("gradient", "reverse"), ("clamp", None), ("importance", False)):
            _unused(getattr(self, key) != default, f"kl.{key}", self.place, "loss")

    @property
    def in_reward(self) -> bool:
        """Whether rewards carry it."""
        return self.place == "reward" and self.coef > 0


@dataclass(frozen=True)
class CorrectionSpec:
    """Weights for tokens that another distribution sampled than the one that trains: w = π_old/μ.

    Args:
        kind: ``tis``: w truncated to [low, high]. ``icepop``: tokens with w outside [low, high] get 0, others w.
            ``sequence_mask``: rows whose geometric mean of w is outside [low, high] get 0, others 1.
            ``sequence_mask_tis``: the same rows are dropped, the others' tokens get w.
        low: Lower bound; null: the kind's default.
        high: Upper bound; null: the kind's default.
    """

    kind: CorrectionKind = "none"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        _one_of("correction.kind", self.kind, CorrectionKind)
        for key in ("low", "high"):
            _unused(getattr(self, key) is not None, f"correction.{key}", self.kind, *WEIGHTS)
        low, high = self.bounds
        _require(low >= 0, "correction.low", low, ">= 0")
        _require(low < high, "correction.high", high, f"above correction.low = {low:g}")
        _require(low <= 1 <= high, "correction.low", (low, high), "at most 1, and correction.high at least 1")

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high), the kind's defaults filled in."""
        low, high = WEIGHTS.get(self.kind, (0.0, float("inf")))
        return low if self.low is None else self.low, high if self.high is None else self.high


@dataclass(frozen=True)
class EntropySpec:
    """What keeps the policy exploring.

    Args:
        bonus: Coefficient of the entropy bonus; with ``target``, where it starts.
        target: Entropy in nats below which the bonus acts and grows (Skywork-OR1: 0.2); null: the bonus is constant.
        step: By which the coefficient grows or shrinks after each rollout batch (Skywork-OR1: 0.005).
        covariance: ``clip_cov`` (no gradient on some tokens of high covariance) or ``kl_cov`` (a penalty on those of
            the highest); null: neither.
        share: Of the batch's tokens that ``covariance`` picks.
        cov_low: ``clip_cov`` picks among covariances above this …
        cov_high: … and below this.
        cov_coef: Of ``kl_cov``'s penalty ``abs(log π − log π_old)``.
    """

    bonus: float = 0.0
    target: float | None = None
    step: float = 0.005
    covariance: CovarianceKind | None = None
    share: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    cov_coef: float = 1.0

    def __post_init__(self) -> None:
        _require(self.bonus >= 0, "entropy.bonus", self.bonus, ">= 0")
        _require(self.target is None or self.target > 0, "entropy.target", self.target, "positive or null")
        _require(self.step > 0, "entropy.step", self.step, "positive")
        if self.covariance is not None:
            _one_of("entropy.covariance", self.covariance, CovarianceKind)
        _require(0 < self.share <= 1, "entropy.share", self.share, "in (0, 1]")
        _require(self.cov_low < self.cov_high, "entropy.cov_high", self.cov_high, "above entropy.cov_low")
        _require(self.cov_coef > 0, "entropy.cov_coef", self.cov_coef, "positive")
        kind = str(self.covariance)
        _require(
            self.step == 0.005 or self.target is not None,
            "entropy.step",
            self.step,
            "left out without target",
        )
        _unused(self.share != 2e-4, "entropy.share", kind, *get_args(CovarianceKind))
        _unused((self.cov_low, self.cov_high) != (1.0, 5.0), "entropy.cov_low/cov_high", kind, "clip_cov")
        _unused(self.cov_coef != 1.0, "entropy.cov_coef", kind, "kl_cov")


def _require(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{key} must be {rule}, got {value!r}.")


def _one_of(key: str, value: object, kinds: object) -> None:
    _require(value in get_args(kinds), key, value, f"one of {get_args(kinds)}")


def _unused(given: bool, key: str, kind: str, *kinds: str) -> None:
    if given and kind not in kinds:
        raise ValueError(
            f"{key} has no effect with {kind!r}: set it to null (or its default), or choose one of {kinds}."
        )
