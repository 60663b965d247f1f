"""What GAD says of its game, and that the entropy's controller hears of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from duels import gad
from lightning.pytorch.callbacks import Callback
from words import duels

from lightning_onpolicy.modules import GAD, GADGenerator
from lightning_onpolicy.modules.gad_stages import Warmup
from lightning_onpolicy.modules.losses.settings import EntropySpec


class Spy(Callback):
    """Keeps what every step returns, and the entropy's coefficient after it."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []
        self.coefs: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.outputs.append(dict(outputs))
        self.coefs.append(pl_module.entropy_control.coef)


def run(folder: Path, module: GADGenerator, steps: int) -> Spy:
    spy = Spy()
    fits.trainer(folder, [spy]).fit(module, fits.Batches(steps, duels))
    return spy


def test_an_entropy_target_moves_the_coefficient_in_the_main_stage(tmp_path: Path) -> None:
    """Catches: a controller that no step of GAD's own updates; one that hears the entropy on the teacher's text."""
    module = gad(warmup=Warmup(3, 1), entropy=EntropySpec(target=9.0, step=0.01))
    spy = run(tmp_path, module, 6)
    assert "train/entropy" in spy.outputs[1]["metrics"], "the warm-up has one too, of the teacher's words"
    assert spy.coefs == pytest.approx([0.0, 0.0, 0.0, 0.01, 0.02, 0.03])
    used = [out["metrics"]["train/entropy_coef"] for out in spy.outputs[3:]]
    assert used == pytest.approx([0.0, 0.01, 0.02]), "a step's metrics tell what it used"
    low = gad(entropy=EntropySpec(bonus=0.05, target=1e-6, step=0.01))
    assert run(tmp_path, low, 2).coefs == [0.0, 0.0], "above the target there is no bonus"


def test_a_step_without_the_policy_leaves_the_controller_alone(tmp_path: Path) -> None:
    """Catches: the last entropy counted again while the policy waits."""
    module = gad(generator_every=2, entropy=EntropySpec(target=9.0, step=0.01))
    assert run(tmp_path, module, 4).coefs == pytest.approx([0.0, 0.01, 0.01, 0.02])


def test_the_spread_within_groups_is_that_of_the_scores(tmp_path: Path) -> None:
    """Catches: a spread over the batch, of the teacher's scores too, or of scores after the update."""
    module = gad()
    spy = run(tmp_path, module, 1)
    out = spy.outputs[0]
    score_GN = out["batch"].reward_parts["discriminator"].reshape(4, 2)
    assert out["metrics"]["train/fresh/score_std"] == pytest.approx(
        float(score_GN.std(1, correction=0).mean()), rel=1e-5
    )
    assert out["metrics"]["train/fresh/flat_groups"] == 0.0
    assert out["judged"].extra["preferred"].tolist() == [False] * 8 + [True] * 4
    length_R = out["judged"].response_lengths[8:].double()
    assert out["metrics"]["train/fresh/teacher_length"] == pytest.approx(float(length_R.mean()))


def test_equal_scores_are_flat_groups(tmp_path: Path) -> None:
    metrics = run(tmp_path, gad(head_std=0.0), 1).outputs[0]["metrics"]
    assert metrics["train/fresh/flat_groups"] == 1.0 and metrics["train/fresh/score_std"] == 0.0
    assert metrics["train/fresh/accuracy"] == 0.5


def test_a_rank_without_a_pair_has_the_same_names(tmp_path: Path) -> None:
    """Catches: sums over ranks of vectors of unequal length, where one rank's rows have no teacher."""
    module = gad()
    run(tmp_path, module, 1)
    with torch.no_grad():
        whole, alone = (
            module.verdict_metrics(batch, module.judge(batch)) for batch in (duels(1), duels(1, beside=False))
        )
    assert whole.keys() == alone.keys()
    assert not len(alone["fresh/accuracy"]) and len(alone["fresh/score_std"]) == 4


def test_the_generator_by_itself_returns_what_was_judged(tmp_path: Path) -> None:
    both: GAD = gad()
    both.configure_model()
    module = GADGenerator(both.policy, both.discriminator, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    out = run(tmp_path, module, 1).outputs[0]
    assert len(out["judged"]) == 12 and len(out["batch"]) == 8
    assert {"train/fresh/score_std", "train/fresh/flat_groups"} <= out["metrics"].keys()
