"""The packaged configurations of published recipes say what their presets say, and route five domains to verifiers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_onpolicy._configs import config_root
from lightning_onpolicy.callbacks.stages import StageSchedule
from lightning_onpolicy.datamodules import rewards as verifiers
from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt
from lightning_onpolicy.modules.losses.settings import (
    AdvantageSpec,
    CorrectionSpec,
    EntropySpec,
    KLSpec,
    SurrogateSpec,
)
from lightning_onpolicy.modules.presets import PRESETS, PresetName, preset

NAMES = sorted(name for name in PRESETS if not name.startswith("gad"))
PRORL = ["brorl", "prorl_v1", "prorl_v2"]


def packaged(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The model's arguments, the data's, and those of the callbacks by class."""
    config = yaml.safe_load((config_root() / f"{name}.yaml").read_text())
    assert config["model"]["class_path"] == ("SPCTReward" if name.startswith("spct") else "ProRLGRPO")
    callbacks: dict[str, list[dict[str, Any]]] = {}
    for item in config["trainer"]["callbacks"]:
        callbacks.setdefault(item["class_path"], []).append(item.get("init_args", {}))
    return config["model"]["init_args"], config["data"]["init_args"], callbacks


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_has_the_numbers_of_its_recipe(name: PresetName) -> None:
    """Catches: a number that is corrected in one place only."""
    recipe = preset(name)
    model, data, _ = packaged(name)
    assert model["recipe"] == name
    assert model["loop"]["minibatches"] == recipe.minibatches
    assert data["prompts_per_batch"] == recipe.prompts
    assert data["sampling"]["temperature"] == recipe.temperature
    assert ("dynamic_sampling" in data) == recipe.dynamic_sampling
    restated = {key: SPECS[key](**value) for key, value in model.items() if hasattr(recipe, key)}
    assert restated == {key: getattr(recipe, key) for key in restated}
    if "optimizer" in model:
        assert model["optimizer"]["init_args"]["lr"] == recipe.lr
    if recipe.reduction == "constant":
        assert data["sampling"]["max_new_tokens"] == recipe.reduction_length


SPECS: dict[str, Any] = {
    "advantage": AdvantageSpec,
    "surrogate": SurrogateSpec,
    "kl": KLSpec,
    "correction": CorrectionSpec,
    "entropy": EntropySpec,
}


def with_recipe() -> list[str]:
    root = config_root()
    return sorted(
        str(path.relative_to(root).with_suffix(""))
        for path in root.rglob("*.yaml")
        if "\n    recipe: " in path.read_text()
    )


@pytest.mark.parametrize("name", with_recipe())
def test_a_flag_that_changes_one_number_keeps_the_recipes_others(name: str) -> None:
    """Flags merge into what the file has, so it must spell out whatever of its recipe is no default.

    Catches: `--model.init_args.kl.coef=0.001` that takes the recipe's clamp away.
    """
    model = yaml.safe_load((config_root() / f"{name}.yaml").read_text())["model"]["init_args"]
    recipe = preset(model["recipe"])
    for key, kind in SPECS.items():
        plain, spelled = vars(kind()), model.get(key, {})
        needed = {field for field, value in vars(getattr(recipe, key)).items() if value != plain[field]}
        other = spelled.get("kind", plain.get("kind")) != vars(getattr(recipe, key)).get("kind")
        assert needed <= spelled.keys() or other, key


@pytest.mark.parametrize("name", NAMES)
def test_its_stages_are_those_of_the_recipe(name: PresetName) -> None:
    """Context (prompt and response) and group size, from one stage to the next."""
    recipe = preset(name)
    _, data, callbacks = packaged(name)
    size, response = data["group_size"], data["sampling"]["max_new_tokens"]
    found = [(data["max_prompt_tokens"] + response, size)]
    schedules = [StageSchedule(**arguments) for arguments in callbacks.get("StageSchedule", [])]
    for stage in [stage for schedule in schedules for stage in schedule.stages]:
        size = stage.settings.get("group_size", size)
        response = stage.settings.get("max_new_tokens", response)
        found.append((data["max_prompt_tokens"] + response, size))
    assert found == [(stage.context, stage.group_size) for stage in recipe.stages]
    last = recipe.stages[-1].batches
    if last is not None:
        assert recipe.reset is not None
        begins = schedules[0].stages[-1].resets * recipe.reset.most
        assert data["steps_per_epoch"] - begins == last


@pytest.mark.parametrize("name", NAMES)
def test_its_resets_are_those_of_the_recipe(name: PresetName) -> None:
    """In optimizer steps, where the recipe has rollout batches."""
    recipe = preset(name)
    _, _, callbacks = packaged(name)
    assert ("ReferenceReset" in callbacks) == (recipe.reset is not None)
    assert ("OptimizerReset" in callbacks) == (recipe.reset is not None and recipe.reset.optimizer)
    if recipe.reset is None:
        return
    triggers = callbacks["ReferenceReset"][0]["trigger"]
    triggers = triggers if isinstance(triggers, list) else [triggers]
    most = [
        arguments["n"] if trigger["class_path"] == "EveryNSteps" else arguments["max_gap"]
        for trigger in triggers
        for arguments in [trigger["init_args"]]
        if {"n", "max_gap"} & arguments.keys()
    ]
    assert most == [recipe.reset.most * recipe.minibatches]
    least = {t["init_args"].get("min_gap", 0) for t in triggers if t["class_path"] != "EveryNSteps"}
    assert least == {recipe.reset.least * recipe.minibatches}


@pytest.mark.parametrize("name", ["gad_paper", "gad_small"])
def test_a_game_has_the_numbers_of_its_recipe(name: PresetName) -> None:
    config = yaml.safe_load((config_root() / f"{name}.yaml").read_text())
    model, data, recipe = config["model"]["init_args"], config["data"]["init_args"], preset(name)
    assert config["model"]["class_path"] == "GAD" and model["recipe"] == name and data["beside"]
    assert data["prompts_per_batch"] == recipe.prompts
    assert data["sampling"]["temperature"] == recipe.temperature
    (stage,) = recipe.stages
    assert data["group_size"] == stage.group_size
    assert data["max_prompt_tokens"] + data["sampling"]["max_new_tokens"] == stage.context
    assert model["loop"]["max_grad_norm"] == model["discriminator_loop"]["max_grad_norm"] == 0.2


def test_what_only_rewards_say_is_said() -> None:
    """Overlong penalties, truncated answers and periods of a cosine."""
    _, dapo, _ = packaged("dapo")
    (overlong,) = dapo["shapers"]
    assert overlong["init_args"]["max_tokens"] == dapo["sampling"]["max_new_tokens"] == 20480
    assert overlong["init_args"]["buffer"] == 4096
    _, second, _ = packaged("prorl_v2")
    scheduled, stop = second["shapers"]
    periods = [scheduled["init_args"][key] / preset("prorl_v2").minibatches for key in ("on", "off")]
    assert periods == [100, 500]
    cosine = scheduled["init_args"]["shaper"]
    assert cosine["class_path"] == "Cosine"
    assert cosine["init_args"]["max_tokens"] == second["sampling"]["max_new_tokens"]
    assert [stop["class_path"]] == [shaper["class_path"] for shaper in packaged("dr_grpo")[1]["shapers"]]
    assert stop == {"class_path": "StopProperly"}


# -- rewards of the five domains -----------------------------------------------------------------------

ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "math": ({"answer": "\\frac12"}, "\\boxed{1/2}", "It is 1/2."),
    "stem": ({"answer": "5 m"}, "The answer is 5 m.", "The answer is 6 m."),
    "code": (
        {"tests": [{"stdin": "2", "stdout": "4"}]},
        "```python\nprint(2 * int(input()))\n```",
        "```python\nprint(5)\n```",
    ),
    "logic": (
        {"source": "chain_sum", "answer": "7", "metadata": {"expression": "3 + 4"}},
        "<answer>7</answer>",
        "7",
    ),
    "instructions": (
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "a, b </think> Yes",
        "Yes, sir",
    ),
}


@pytest.fixture(scope="module")
def routed(request: Any) -> Iterator[Any]:
    """The rewards of a packaged configuration, as the command line makes them."""
    pytest.importorskip("reasoning_gym", reason="the gym extra is not installed")
    pytest.importorskip("math_verify", reason="the verify extra is not installed")
    for name in verifiers.__all__:  # short class names need imported classes
        getattr(verifiers, name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=dict[str, verifiers.Reward])
    given = parser.parse_object({"rewards": packaged(request.param)[1]["rewards"]})
    reward = parser.instantiate_classes(given).rewards["verified"]
    yield reward
    reward.close()


def answered(domain: str) -> Group:
    row, right, wrong = ROWS[domain]
    texts = (right, wrong, "")
    made = tuple(Completion(torch.tensor([1]), torch.zeros(1), "eos", text=text) for text in texts)
    return Group(Prompt((1,), "", {"domain": domain, **row}, domain, row.get("source", domain)), made)


@pytest.mark.parametrize("routed", PRORL, indirect=True)
def test_each_domain_is_scored_by_its_verifier(routed: Any) -> None:
    """A right answer, a wrong one, none. Catches: a route that takes another's rows, a format that does not count."""
    scores = routed.score([answered(domain) for domain in ROWS])
    assert dict(zip(ROWS, scores, strict=True)) == {domain: [1.0, 0.0, 0.0] for domain in ROWS}
    other = Group(Prompt((1,), "", {"domain": "poems"}, "p"), answered("math").completions)
    with pytest.raises(ValueError, match="'poems'"):
        routed.score([other])


@pytest.mark.parametrize("name", NAMES)
def test_its_head_says_what_the_rows_need(name: str) -> None:
    """The files are the reader's to make. Catches: a path that the comment does not explain."""
    text = (config_root() / f"{name}.yaml").read_text()
    head = text.partition("seed_everything")[0]
    _, data, _ = packaged(name)
    stems = {Path(data[split]["init_args"]["path"]).stem.partition("_train")[0] for split in ("train", "val")}
    for stem in stems:
        assert stem.partition("_val")[0] in head, stem
