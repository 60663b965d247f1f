"""Per-token statistics of language-model heads, without ``[tokens, vocab]`` logits; needs torch alone."""

if not __name__.startswith("lightning_onpolicy."):  # found through the repository root: a second copy of us
    raise ImportError(
        f"import this as lightning_onpolicy.{__name__}: set PYTHONSAFEPATH=1 or leave the repository."
    )

from lightning_onpolicy.kernels import reference
from lightning_onpolicy.kernels.gathering import RankTokens, gathered_token_stats
from lightning_onpolicy.kernels.heads import LogProbHead, linear_log_prob
from lightning_onpolicy.kernels.linear_loss import linear_cross_entropy, linear_distillation
from lightning_onpolicy.kernels.loss_modules import LinearCrossEntropyLoss, LinearDistillationLoss
from lightning_onpolicy.kernels.sharding import VocabShard
from lightning_onpolicy.kernels.spec import TeacherHead, TokenStats, TopK
from lightning_onpolicy.kernels.token_stats import token_stats

__all__ = [
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "LogProbHead",
    "RankTokens",
    "TeacherHead",
    "TokenStats",
    "TopK",
    "VocabShard",
    "gathered_token_stats",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_log_prob",
    "reference",
    "token_stats",
]
