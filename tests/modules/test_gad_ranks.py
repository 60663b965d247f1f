"""GAD on two ranks: both players are one process's, in every phase, pairs or none; and they resume bit for bit.

Numbers are those of the sheet's list of traps.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks_gad
import torch
import toys
from duels import gad
from launching import on_two_ranks
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_onpolicy.modules import GAD, GADDiscriminator, GADGenerator, PreferenceTune
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.specs import LoraSpec

DEADLINE_S = 120  # a rank that leaves the others waiting is found out by it


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process_and_resume(tmp_path: Path, strategy: str) -> None:
    """11, 12. Catches: pairs counted per rank, a rank without a pair (or without a row to imitate) that stays out of a
    collective, metrics that only some ranks have, players that drift apart, optimizers restored to the wrong player."""
    one = ranks_gad.main(strategy, tmp_path)["compared"]
    on_two_ranks(ranks_gad, strategy, tmp_path / "result.pt", timeout_s=DEADLINE_S)
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    two = found["compared"]
    for key, value in one["clock"].items():
        assert two["clock"][key] == pytest.approx(value), key
    assert two["global_step"] == one["global_step"] == ranks_gad.STEPS
    assert_moved_alike(one["weights"], two["weights"])
    if strategy == "ddp":
        assert two["apart"] == [{"policy": 0.0, "discriminator": 0.0}] * ranks_gad.STEPS
    for step, (alone, together) in enumerate(zip(one["metrics"], two["metrics"], strict=True)):
        assert alone.keys() == together.keys(), step
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, rel=2e-4, abs=2e-6), (step, name)

    whole, resumed = found["whole"], found["resumed"]
    taken = [whole["clock"][f"{player}_steps"] for player in ("policy", "discriminator")]
    assert taken == [2 * 4, 2 * 6]
    first_rates = (1e-3, 1e-2)
    for rate, start, steps in zip(whole["rates"], first_rates, taken, strict=True):
        assert rate == pytest.approx(start * 0.9**steps), "each schedule follows its own player"
    for part in ("clock", "rates", "global_step"):
        assert whole[part] == resumed[part], part
    assert whole["metrics"][ranks_gad.SAVED_AFTER + 1 :] == resumed["metrics"]
    for player, weights in whole["weights"].items():
        for name, value in weights.items():
            assert torch.equal(value, resumed["weights"][player][name]), (player, name)
    for first, second in zip(whole["optimizers"], resumed["optimizers"], strict=True):
        assert first and first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def assert_moved_alike(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Equal to a small part of how far each player went."""
    module = ranks_gad.compared()
    module.configure_model()
    start = {"policy": module.policy, "discriminator": module.discriminator, "reference": module.reference}
    for player, model in start.items():
        names = list(model.state_dict())
        before, alone, together = (
            torch.cat([state[name].double().flatten() for name in names])
            for state in (model.state_dict(), one[player], two[player])
        )
        moved = float((alone - before).norm())
        assert moved > 1e-2, player
        assert float((together - alone).norm()) < 1e-4 * moved, player


def judge() -> ScalarModel:
    return ScalarModel.copy_of(toys.policy(0), std=0.2)


@pytest.mark.parametrize(
    ("strategy", "named"),
    [
        (FSDPStrategy(), "use ModelParallelStrategy"),
        (
            object.__new__(DeepSpeedStrategy),
            "use DDP or ModelParallelStrategy",
        ),  # making one needs the package
    ],
    ids=["fsdp1", "deepspeed"],
)
def test_strategies_without_manual_optimisation_are_refused(strategy: Any, named: str) -> None:
    players = [gad(), GADGenerator(toys.policy(0), judge())]
    for module in (*players, GADDiscriminator(judge()), PreferenceTune(toys.policy(0))):
        module.trainer = SimpleNamespace(strategy=strategy, precision="32-true")  # type: ignore[assignment]
        with pytest.raises(ValueError, match=named) as refused:
            module.setup("fit")
        assert "\n" not in str(refused.value)
        module.setup("validate")


def test_a_second_derivative_under_fsdp2_is_refused() -> None:
    """It would end in a segmentation fault."""
    strategy = object.__new__(type("Split", (ModelParallelStrategy,), {"distributed_sampler_kwargs": None}))
    type(strategy).distributed_sampler_kwargs = {"num_replicas": 2}
    run = SimpleNamespace(strategy=strategy, precision="32-true", world_size=2)
    for make in (lambda r1: gad(r1=r1), lambda r1: GADDiscriminator(judge(), r1=r1)):
        plain, penalised = make(0.0), make(0.1)
        plain.trainer = penalised.trainer = run
        plain.setup("fit")
        with pytest.raises(ValueError, match=r"use DDP instead, or set r1 to 0\."):
            penalised.setup("fit")


def test_one_base_for_two_players_under_fsdp2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GAD, "device_mesh", object())  # as the strategy would have set it
    policy = Policy(toys.llama(0, tie=False), toys.tokenizer(), lora=LoraSpec(r=2))
    with pytest.raises(ValueError, match=r"name a model for it in discriminator, or leave student\.lora out"):
        gad(policy, discriminator_lora=LoraSpec(r=2)).configure_model()
