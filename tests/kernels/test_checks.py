"""Wrong arguments are refused with a message that names them; and what the public names promise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_onpolicy.kernels import TeacherHead, TopK, token_stats

HIDDEN, WEIGHT, TARGETS = torch.randn(4, 6), torch.randn(11, 6), torch.tensor([0, 1, 2, 3])
TEACHER = TeacherHead(torch.randn(4, 3), torch.randn(11, 3))

WRONG = [
    ({"outputs": ("logq",)}, "logq"),
    ({"outputs": ()}, "outputs"),
    ({"outputs": "logp"}, "outputs"),
    ({"targets": None}, "'targets'"),
    ({"outputs": ("logp_at_ids",)}, "'ids'"),
    ({"outputs": ("jsd",)}, "'teacher'"),
    ({"outputs": ("topk_forward_kl",)}, "'topk'"),
    ({"hidden": torch.randn(2, 2, 6)}, "hidden"),
    ({"hidden": torch.ones(4, 6, dtype=torch.long)}, "hidden"),
    ({"weight": torch.randn(11, 5)}, "weight"),
    ({"bias": torch.randn(10)}, "bias"),
    ({"targets": TARGETS[:3]}, "targets"),
    ({"targets": TARGETS.int()}, "int64"),
    ({"targets": TARGETS - 1}, "-1"),
    ({"targets": TARGETS + 8}, "11"),
    ({"vocab_size": 3}, "vocab_size=3"),
    ({"vocab_size": 12}, "vocab_size"),
    ({"ids": torch.zeros(4, dtype=torch.long)}, "ids"),
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": torch.ones(3)}, "temperature"),
    ({"temperature": torch.ones(4, requires_grad=True)}, "temperature"),
    ({"soft_cap": -1.0}, "soft_cap"),
    ({"logit_scale": 0.0}, "logit_scale"),
    ({"beta": 0.0}, "beta"),
    ({"alpha": 1.0}, "alpha"),
    ({"budget_bytes": -1}, "budget_bytes"),
    ({"teacher": TeacherHead(torch.randn(3, 3), torch.randn(11, 3))}, "teacher.hidden"),
    ({"teacher": TeacherHead(torch.randn(4, 3), torch.randn(11, 4))}, "teacher.weight"),
    ({"teacher": TeacherHead(torch.randn(4, 3), torch.randn(12, 3))}, "vocab_size"),
    ({"teacher": TeacherHead(torch.randn(4, 3), torch.randn(9, 3)), "vocab_size": 10}, "vocabulary"),
    ({"topk": TopK(torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 3))}, "topk.logps"),
    ({"mask": torch.ones(4)}, "mask"),
    ({"mask": torch.ones(3).bool()}, "mask"),
    ({"mask": torch.ones(4, device="meta").bool()}, "mask"),
    ({"targets": TARGETS - 1, "mask": TARGETS < 3}, "-1"),
    ({"hidden": torch.randn(4, 6, device="meta")}, "weight"),
]


@pytest.mark.parametrize(("change", "named"), WRONG, ids=[f"{next(iter(c))}-{n}" for c, n in WRONG])
def test_wrong_arguments_are_named(change, named):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **change}
    with pytest.raises(ValueError, match=named):
        token_stats(**arguments)


def test_right_arguments_pass():
    assert token_stats(HIDDEN, WEIGHT, TARGETS, teacher=TEACHER, outputs=("jsd",)).jsd.shape == (4,)


def test_statistics_are_a_mapping_in_the_order_asked_for():
    stats = token_stats(HIDDEN, WEIGHT, TARGETS, outputs=("entropy", "logp"))
    assert list(stats) == ["entropy", "logp"]
    assert len(stats) == 2
    assert stats["logp"] is stats.logp
    with pytest.raises(AttributeError, match="add it to outputs"):
        _ = stats.lse
    with pytest.raises(AttributeError, match="no attribute"):
        _ = stats.log_prob


def test_import_needs_torch_alone():
    code = (
        "import sys, lightning_onpolicy.kernels\n"
        "heavy = [m for m in ('lightning', 'transformers', 'triton', 'datasets', 'peft') if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
