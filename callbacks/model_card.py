"""The README of an exported model: what was trained, from what, how, and how well."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from lightning_onpolicy import __version__

LIBRARIES = ("torch", "lightning", "transformers", "peft")
_SECRET = re.compile(
    r"^(\s*(?:- )?\S*(?:api_key|password|secret|(?:hf|auth|access|api)_token):[ ]*)(?!null)\S.*$", re.M
)


def model_card(trainer: pl.Trainer, module: pl.LightningModule, *, adapters_only: bool) -> str:
    """Markdown with front matter as the Hugging Face hub reads it.

    Args:
        trainer: For the step, the metrics and the command line's configuration.
        module: The trained module; its ``policy.spec.path`` names the base model, if there is a spec.
        adapters_only: Whether the folder holds adapters without their base.
    """
    spec = getattr(getattr(module, "policy", None), "spec", None)
    base = getattr(spec, "path", None)
    method = type(module).__name__
    metrics = {k: float(v) for k, v in sorted(trainer.callback_metrics.items())}
    versions = [f"- lightning-onpolicy {__version__}", f"- python {platform.python_version()}"]
    versions += [f"- {name} {version(name)}" for name in LIBRARIES]
    parts = [
        front_matter(method, base, adapters_only),
        f"# {method} of {base or 'a model'}",
        f"Trained with lightning-onpolicy: method `{method}`, "
        f"base model `{base or 'unknown'}`, {trainer.global_step} optimizer steps.",
        "```python\n" + _loading(adapters_only) + "```",
        "## Metrics at the end",
        _table(metrics) if metrics else "None were logged.",
        "## Versions",
        "\n".join(versions),
        "## Configuration",
        f"```yaml\n{resolved_config(trainer, module).rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(method: str, base: str | None, adapters_only: bool) -> str:
    """The hub's metadata; the base model is named there only if it is a hub name."""
    data: dict[str, Any] = {
        "library_name": "peft" if adapters_only else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lightning-onpolicy", method],
    }
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        data["base_model"] = base
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---"


def resolved_config(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """The command line's configuration as YAML, else the module's hyperparameters; secrets are left out."""
    from lightning.pytorch.cli import SaveConfigCallback

    saved = [c for c in trainer.callbacks if isinstance(c, SaveConfigCallback)]  # type: ignore[attr-defined]
    if saved:
        text = str(saved[0].parser.dump(saved[0].config, skip_none=False))
    else:
        plain = json.loads(json.dumps(dict(module.hparams), default=str))
        text = yaml.safe_dump(plain, sort_keys=False) if plain else "# the module saved no hyperparameters\n"
    return _SECRET.sub(r"\1'(left out)'", text)


def _loading(adapters_only: bool) -> str:
    if adapters_only:
        return (
            "from peft import AutoPeftModelForCausalLM\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained(".")\n'
        )
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
    )


def _table(metrics: Mapping[str, float]) -> str:
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows])
