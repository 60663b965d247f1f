"""The adversarial game, shorter than the benchmark plays it: what GAD finds, what breaks it, what the start decides."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def game() -> ModuleType:
    """The script, which is not part of the package; its folder goes on the path as it does when it is run."""
    sys.path.append(FOLDER)
    try:
        return importlib.import_module("gad_game")
    finally:
        sys.path.remove(FOLDER)


def ends(game: ModuleType, arm: object, steps: int) -> tuple[list[float], list[float], list[float]]:
    theta = game.play(arm, range(4), steps)["theta"]
    return theta[:, 0].tolist(), theta[:, 1].exp().tolist(), game.reverse_kl(theta).tolist()


def test_a_fitted_table_is_the_log_ratio(game: ModuleType) -> None:
    """Catches: Bradley–Terry's sign or objective. Exact to 1e-12; from samples, as 1/√n."""
    found = game.theory((1000, 100_000), range(4))
    assert max(x["max_error"] for x in found["exact"].values()) < 1e-12
    assert found["slope"] == pytest.approx(-0.5, abs=0.15)


def test_gad_finds_the_mode(game: ModuleType) -> None:
    """The reverse KL's optimum is (2.005, 0.809) with a divergence of 0.355."""
    best = game.descend(game.reverse_kl, game.NARROW)
    assert (float(best[0]), math.exp(best[1])) == (
        pytest.approx(2.005, abs=1e-3),
        pytest.approx(0.809, abs=1e-3),
    )
    mean, sigma, kl = ends(game, game.Arm("GAD"), 500)
    assert all(abs(x - 2) < 0.25 for x in mean)
    assert all(abs(x - 0.8) < 0.17 for x in sigma)
    assert max(kl) < 0.4 and sum(kl) / 4 < 0.375


@pytest.mark.parametrize("variant", [{"spec": "CE"}, {"replay": True}])
def test_its_variants_find_it_too(game: ModuleType, variant: dict[str, object]) -> None:
    arm = game.Arm("variant", **{k: game.CE if v == "CE" else v for k, v in variant.items()})
    assert max(ends(game, arm, 400)[2]) < 0.45


def test_a_frozen_discriminator_is_exploited(game: ModuleType) -> None:
    """The student runs where the start's ratio is highest, off the teacher's modes, down towards the floor of sigma."""
    mean, sigma, kl = ends(game, game.Arm("frozen", table="frozen"), 1000)
    assert 0.3 <= min(sigma) <= max(sigma) < 0.32
    assert max(mean) < 0.5 and min(kl) > 4


def test_imitation_covers_both_modes_and_gad_from_there_stays(game: ModuleType) -> None:
    """The caveat: the reverse KL has a wide local optimum, so mode-seeking depends on the start."""
    wide = game.descend(game.imitation, game.NARROW)
    assert (float(wide[0]), math.exp(wide[1])) == (
        pytest.approx(2.466, abs=1e-3),
        pytest.approx(3.548, abs=1e-3),
    )
    _, sigma, kl = ends(game, game.Arm("SeqKD", table="none"), 1500)
    assert min(sigma) > 3 and all(0.63 < x < 0.66 for x in kl)
    _, sigma, kl = ends(game, game.Arm("GAD from there", starts=(tuple(wide.tolist()),)), 400)
    assert min(sigma) > 3 and all(0.63 < x < 0.66 for x in kl)


def test_the_start_decides_as_for_the_exact_gradient(game: ModuleType) -> None:
    found = game.starting_widths((1.8, 2.6), seeds=2, steps=800)
    assert found[0]["sigma_exact"] == pytest.approx(0.809, abs=1e-3)
    assert found[1]["sigma_exact"] == pytest.approx(3.964, abs=1e-3)
    assert max(found[0]["sigma_gad"]) < 1.3 and min(found[1]["sigma_gad"]) > 2.6


def test_a_seed_plays_the_same_game_whoever_plays_beside_it(game: ModuleType) -> None:
    """Catches: one stream for all seeds, a loss averaged over them."""
    alone = game.play(game.Arm("GAD", replay=True), [5], 30)["theta"]
    beside = game.play(game.Arm("GAD", replay=True), [1, 5, 9], 30)["theta"]
    torch.testing.assert_close(alone[0], beside[1])
