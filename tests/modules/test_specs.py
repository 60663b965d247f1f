"""Specs: the names under which they are known, and what they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import lightning_onpolicy.modules as modules
from lightning_onpolicy.modules import policy, specs
from lightning_onpolicy.modules.specs import LoraSpec, ModelSpec
from lightning_onpolicy.modules.supervised import SupervisedFineTune


@pytest.mark.parametrize("name", ["LoraSpec", "ModelSpec"])
def test_a_spec_is_one_class_under_all_its_names(name: str) -> None:
    """Catches: a class path of an older configuration that leads nowhere, or to a second class."""
    assert getattr(modules, name) is getattr(policy, name) is getattr(specs, name)


def test_a_spec_comes_back_from_its_plain_dict() -> None:
    """Catches: a checkpoint's hyper-parameters that make another student."""
    spec = ModelSpec("somewhere", dtype="bfloat16", lora=LoraSpec(r=2, target_modules=("q_proj",)))
    assert ModelSpec.of(dataclasses.asdict(spec)) == ModelSpec.of(spec) == spec
    assert ModelSpec.of("somewhere") == ModelSpec("somewhere")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"path": ""}, "path is empty"),
        ({"path": "x", "quantize": "4bit", "from_scratch": True}, "exclude each other"),
        ({"path": "x", "lora": {"r": 0}}, "lora.r must be >= 1"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ModelSpec(**settings)


def test_a_quantised_student_needs_adapters() -> None:
    """Catches: a run that trains norms and embeddings alone, because nothing else has a gradient."""
    with pytest.raises(ValueError, match=r"student.quantize='4bit' needs student.lora"):
        SupervisedFineTune(ModelSpec("x", quantize="4bit"))
    SupervisedFineTune(ModelSpec("x", quantize="4bit", lora=LoraSpec(r=2)))


def test_random_weights_of_a_model_that_is_not_there_are_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="model 'nobody/nothing' cannot be loaded"):
        ModelSpec("nobody/nothing", from_scratch=True).load_model()
