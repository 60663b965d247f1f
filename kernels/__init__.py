"""Per-token statistics of language-model heads, without ``[tokens, vocab]`` logits; needs torch alone."""

from lightning_onpolicy.kernels import reference
from lightning_onpolicy.kernels.heads import LogProbHead, linear_log_prob
from lightning_onpolicy.kernels.spec import TeacherHead, TokenStats, TopK
from lightning_onpolicy.kernels.token_stats import token_stats

__all__ = [
    "LogProbHead",
    "TeacherHead",
    "TokenStats",
    "TopK",
    "linear_log_prob",
    "reference",
    "token_stats",
]
