"""Weighted SeqKD: what a weight means, whatever the micro-batches, and weights that make no sense."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import toys
from torch.utils.data import DataLoader

from lightning_onpolicy.datamodules.given import WEIGHT
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.sources import FileSource
from lightning_onpolicy.datamodules.supervised import SupervisedLoader
from lightning_onpolicy.datamodules.teacher_text import TeacherTextSource
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.supervised import SupervisedFineTune

ANSWERS = ["t3 t4", "t5", "t6 t7 t8", "t9 t2 t3 t4"]


def fit(module: pl.LightningModule, batches: list[Any]) -> dict[str, float]:
    run = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    return {name: float(value) for name, value in run.callback_metrics.items()}


def loader(weights: Any, answers: list[str] = ANSWERS, key: str | None = "weights") -> SupervisedLoader:
    row: dict[str, Any] = {"prompt": "t1 t2", "response": answers}
    stream = PromptStream(
        [row if weights is None else {**row, "weights": weights}], toys.tokenizer(), chat=False
    )
    return SupervisedLoader(stream, toys.tokenizer(), prompts_per_batch=1, steps=1, weight_key=key)


def trained(
    data: SupervisedLoader, reduction: str = "token_mean", micro: int = 10_000, minibatches: int = 1
) -> tuple[dict[str, Any], dict]:
    module = SupervisedFineTune(
        toys.policy(0, scale=2.0),
        reduction=reduction,  # type: ignore[arg-type]
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        loop=LoopSpec(max_grad_norm=None, micro_batch_tokens=micro, minibatches=minibatches),
    )
    metrics = fit(module, list(data))
    return {name: value.clone() for name, value in module.policy.state_dict().items()}, metrics


def same(a: dict[str, Any], b: dict[str, Any], atol: float = 1e-6) -> None:
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=atol, rtol=1e-5, msg=name)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_a_weight_of_two_is_the_row_twice_and_of_zero_no_row(reduction: str) -> None:
    weighted, _ = trained(loader([2, 1, 0, 1]), reduction)
    repeated, _ = trained(loader(None, [ANSWERS[i] for i in (0, 0, 1, 3)], key=None), reduction)
    same(weighted, repeated)
    plain, _ = trained(loader(None, key=None), reduction)
    assert max(float((weighted[n] - plain[n]).abs().max()) for n in plain) > 1e-3


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_equal_weights_are_none_and_their_scale_does_not_count(reduction: str) -> None:
    plain, metrics = trained(loader(None, key=None), reduction)
    ones, weighted = trained(loader([1, 1, 1, 1]), reduction)
    for name, value in plain.items():
        assert torch.equal(value, ones[name]), name
    assert weighted["train/loss"] == metrics["train/loss"] and weighted["train/weight"] == 1
    small, _ = trained(loader([1e-3] * 4), reduction)
    same(plain, small, atol=1e-5)


def test_no_micro_batch_shows() -> None:
    whole, metrics = trained(loader([0.3, 2.0, 0.0, 1.1]))
    cut, other = trained(loader([0.3, 2.0, 0.0, 1.1]), micro=1)
    same(whole, cut)
    assert other["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-6)


def test_a_batch_in_which_nothing_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable token"):
        trained(loader([0, 0, 0, 0]))


def test_one_number_is_for_all_of_a_rows_responses() -> None:
    assert next(iter(loader(0.5))).extra[WEIGHT].tolist() == [0.5] * 4


def test_methods_that_do_not_weigh_rows_refuse_them() -> None:
    """Catches: counts with weights under a loss without."""
    module = OnPolicyDistill(toys.policy(0), toys.policy(1))
    with pytest.raises(ValueError, match="OnPolicyDistill does not weigh rows: set data"):
        fit(module, list(loader([1, 2, 1, 1])))


def test_a_weight_counts_over_minibatches_too() -> None:
    """One optimizer step per response: that of weight 0 has none. Catches: a step without a gradient, which moves
    momenta and schedules."""
    weighted, _ = trained(loader([0, 1, 0, 0.5]), minibatches=4)
    kept, _ = trained(loader(None, [ANSWERS[1], ANSWERS[3]], key=None), minibatches=2)
    same(weighted, kept)  # a step's own weights do not change their mean


@pytest.mark.parametrize(
    "line", ['"weights": [1, -0.5]', '"weights": [NaN, 1]', '"weights": [1]', '"other": 1']
)
def test_the_file_and_line_of_weights_that_make_no_sense_are_named(tmp_path: Any, line: str) -> None:
    file = tmp_path / "answers.jsonl"
    good = '{"prompt": "t1", "responses": ["t2", "t3"], "weights": [1, 0]}\n'
    lost = '{"prompt": "t1", "responses": ["t2"], "finish_reasons": ["length"], "weights": [1]}\n'
    file.write_text(good + lost + "\n" + f'{{"prompt": "t1", "responses": ["t4", "t5"], {line}}}\n')
    for kind, key in ((TeacherTextSource, "response"), (FileSource, "responses")):
        with pytest.raises(ValueError, match=r"answers\.jsonl line 4.*'weights'"):
            list(read(kind(file), key))


def read(source: Any, key: str) -> SupervisedLoader:
    stream = PromptStream(source, toys.tokenizer(), chat=False, shuffle=False)
    settings: dict[str, Any] = {"response_key": key, "weight_key": "weights"}
    return SupervisedLoader(stream, toys.tokenizer(), prompts_per_batch=1, steps=3, **settings)


@pytest.mark.parametrize("weights", [None, [1, 1], [1, -1, 1, 1], [1, float("nan"), 1, 1], ["a"] * 4, True])
def test_weights_that_make_no_sense_are_named(weights: Any) -> None:
    with pytest.raises(ValueError, match=r"row '.*': .*'weights'"):
        next(iter(loader(weights)))


def test_weights_go_with_their_answers_where_some_are_left_out(tmp_path: Any) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(
        '{"prompt": "t1", "responses": ["t2", "t3", "t4"], "finish_reasons": ["stop", "length", "stop"], '
        '"weights": [0.2, 0.7, 0.9]}\n'
    )
    [row] = list(TeacherTextSource(file))
    assert row["response"] == ["t2", "t4"] and row["weights"] == [0.2, 0.9]
