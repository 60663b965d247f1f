"""Exports: plain transformers loads them, and nothing of anybody's is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fits
import pytest
import torch
import toys
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_onpolicy.callbacks.export import ExportHF
from lightning_onpolicy.callbacks.model_card import front_matter, resolved_config
from lightning_onpolicy.modules.folders import MARKER, check_replaceable, check_writable, replace_folder
from lightning_onpolicy.modules.policy import LoraSpec, ModelSpec, Policy

IDS = torch.tensor([[1, 2, 3, 4]])


def policy(lora: bool = False) -> Policy:
    made = Policy(
        toys.llama(0, scale=3.0),
        toys.tokenizer(),
        lora=LoraSpec(r=2) if lora else None,
        spec=ModelSpec("some-org/tiny"),
    )
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return made.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def fit(folder: Path, module: fits.Module, *callbacks: Any, steps: int = 3, **options: Any) -> Any:
    trainer = fits.trainer(folder / "run", callbacks, **options)
    trainer.fit(module, fits.Batches(steps))
    return trainer


@pytest.mark.parametrize("lora", [False, True])
def test_plain_transformers_loads_weights_tokenizer_and_generation_config(tmp_path: Path, lora: bool) -> None:
    """Catches: adapters lost or merged twice, a head that was not saved, a tokenizer without its template."""
    student = policy(lora)
    before = {name: p.clone() for name, p in student.named_parameters()}
    fit(tmp_path, fits.Module({"train/reward": [0, 0.5, 0.75]}, student), ExportHF(str(tmp_path / "out")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(model), logits(student.model), rtol=1e-4, atol=1e-4)
    assert model.generation_config.eos_token_id == 22
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == toys.TEMPLATE
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())

    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "some-org/tiny"
    assert "| train/reward | 0.75 |" in card
    assert "3 optimizer steps" in card
    assert f"torch {torch.__version__}" in card
    assert json.loads((tmp_path / "out" / MARKER).read_text()) == {"step": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"], "no temporary folder may stay"


def test_adapters_alone(tmp_path: Path) -> None:
    """Catches: merge=False saving the whole model."""
    callback = ExportHF(str(tmp_path / "out"), merge=False)
    fit(tmp_path, fits.Module(policy=policy(lora=True)), callback)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    assert "AutoPeftModel" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_not_an_export_is_refused_before_training(tmp_path: Path) -> None:
    """Catches: a folder of somebody's overwritten after an hour of training."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    module = fits.Module(policy=policy())
    with pytest.raises(FileExistsError, match=r"out exists and is not an earlier export.*Choose another"):
        fit(tmp_path, module, ExportHF(str(tmp_path / "out")))
    assert float(module.weight.detach()) == 1.0, "training must not have started"
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        check_replaceable(tmp_path / "file")


def test_an_earlier_export_is_replaced_whole(tmp_path: Path) -> None:
    """Catches: files of the earlier export mixed into the new one; a killed run's leftovers in the way."""
    module = fits.Module(policy=policy())
    fit(tmp_path, module, ExportHF(str(tmp_path / "out")), steps=1)
    (tmp_path / "out" / "stale.safetensors").write_text("")
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "half").write_text("")
    fit(tmp_path, module, ExportHF(str(tmp_path / "out")), steps=2)
    assert json.loads((tmp_path / "out" / MARKER).read_text()) == {"step": 2}
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    assert not (tmp_path / "out" / "half").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_failed_write_leaves_the_earlier_export(tmp_path: Path) -> None:
    """Catches: deleting before the new export is complete."""
    module = fits.Module(policy=policy())
    fit(tmp_path, module, ExportHF(str(tmp_path / "out")), steps=1)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    module.policy.save_pretrained = fail  # type: ignore[assignment]
    with pytest.raises(OSError, match="disk full"):
        fit(tmp_path, module, ExportHF(str(tmp_path / "out")), steps=2)
    assert json.loads((tmp_path / "out" / MARKER).read_text()) == {"step": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_every_checkpoint(tmp_path: Path) -> None:
    """Catches: exports that miss a checkpoint, or the end written twice."""
    callback = ExportHF(str(tmp_path / "out"), when="every_checkpoint")
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1)
    fit(tmp_path, fits.Module(policy=policy()), callback, checkpoint, steps=5, enable_checkpointing=True)
    steps = ("00000002", "00000004", "00000005")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"step-{s}" for s in steps]
    for step in steps:
        assert json.loads((tmp_path / "out" / f"step-{step}" / MARKER).read_text()) == {"step": int(step)}


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    """Catches: a real export replaced by a model of one step."""
    fit(tmp_path, fits.Module(policy=policy()), ExportHF(str(tmp_path / "out")), fast_dev_run=True)
    assert not (tmp_path / "out").exists()


def test_a_foreign_module_is_left_alone_with_one_warning(tmp_path: Path) -> None:
    """Catches: a crash at the end of somebody else's training."""
    with pytest.warns(UserWarning, match="ExportHF: Module has no .policy") as caught:
        fit(tmp_path, fits.Module(), ExportHF(str(tmp_path / "out")))
    assert len([w for w in caught if "ExportHF" in str(w.message)]) == 1
    assert not (tmp_path / "out").exists()


def test_merging_into_quantised_weights_is_refused_at_the_start(tmp_path: Path) -> None:
    """Catches: an error that comes after training."""
    student = policy(lora=True)
    student.spec = ModelSpec("some-org/tiny", quantize="4bit")
    module = fits.Module(policy=student)
    with pytest.raises(ValueError, match="quantised to 4bit: set merge: false"):
        fit(tmp_path, module, ExportHF(str(tmp_path / "out")))
    assert float(module.weight.detach()) == 1.0
    with pytest.raises(ValueError, match="when must be one of"):
        ExportHF("x", when="never")  # type: ignore[arg-type]


def test_the_card_leaves_out_secrets_and_takes_the_command_lines_configuration() -> None:
    """Catches: an API key published with a model; hub metadata that the hub rejects."""
    hparams = {"engine": {"url": "http://h", "api_key": "s3cret", "max_new_tokens": 5, "hf_token": None}}
    module: Any = SimpleNamespace(hparams=hparams)
    text = resolved_config(SimpleNamespace(callbacks=[]), module)  # type: ignore[arg-type]
    got = yaml.safe_load(text)["engine"]
    assert got == {"url": "http://h", "api_key": "(left out)", "max_new_tokens": 5, "hf_token": None}

    from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

    parser = LightningArgumentParser()
    parser.add_argument("--rate", type=float, default=0.5)
    saved = SaveConfigCallback(parser, parser.parse_args(["--rate", "0.25"]))
    text = resolved_config(SimpleNamespace(callbacks=[saved]), module)  # type: ignore[arg-type]
    assert yaml.safe_load(text)["rate"] == 0.25

    assert "base_model" not in front_matter("M", "/models/student", adapters_only=False)


def test_replace_folder_when_there_is_nothing_to_replace(tmp_path: Path) -> None:
    """Catches: a first export that fails."""
    (tmp_path / "new").mkdir()
    replace_folder(tmp_path / "new", tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_place_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    """Catches: a run whose result is lost at its end."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"ExportHF's folder .*file/export' cannot be written.*Choose another"):
        check_writable(tmp_path / "file" / "export", "ExportHF's folder")
    check_writable(tmp_path / "new" / "export", "ExportHF's folder")
    assert [p.name for p in (tmp_path / "new").iterdir()] == []
