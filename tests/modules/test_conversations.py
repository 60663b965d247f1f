"""Training on conversations: no gradient and no count from what a tool said, a ratio of 1, resumable, readable.

Legend: ``B`` sequences, ``T`` positions, ``H`` hidden size, ``N`` trained tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import talks
import torch
import toys
from torch import Tensor

from lightning_onpolicy.callbacks.rollout_files import ParquetFile, rows_of
from lightning_onpolicy.callbacks.rollout_table import sample_table
from lightning_onpolicy.datamodules.batch import Group, Prompt, RolloutBatch, Sampling, collate
from lightning_onpolicy.datamodules.dynamic import DynamicSampling, Refill, ScoredGroup
from lightning_onpolicy.datamodules.given import given_group
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.rewards.function import FunctionReward
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.metrics import RolloutMetrics
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.outcome import Counts
from lightning_onpolicy.modules.supervised import SupervisedFineTune

PROMPTS = [
    Prompt(tuple(range(1, 2 + i % 3)), f"prompt {i}", {"uid": f"p{i}"}, f"p{i}", "toy") for i in range(4)
]


def conversations(**settings: Any) -> RolloutBatch:
    """Responses of up to three turns, most of them with observations, with rewards that vary."""
    groups = talks.sampled(talks.Deep(lambda p: 2), PROMPTS, policy=toys.policy(0, scale=2.0), **settings)
    whole = [Group(p, tuple(g)) for p, g in zip(PROMPTS, groups, strict=True)]
    rewards: list[list[float | None]] = [[float(i % 2) for i in range(len(g))] for g in groups]
    batch = collate(whole, 20, rewards, sampling=Sampling(max_new_tokens=24))
    assert int((observed(batch).any(1)).sum()) > 8
    return batch


def observed(batch: RolloutBatch) -> Tensor:
    """``[B, T]`` bool: what a tool said."""
    after = torch.arange(batch.input_ids.shape[1]) >= batch.prompt_lengths[:, None]
    return batch.attention_mask & ~batch.response_mask & after


def trainer(**settings: Any) -> pl.Trainer:
    base = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**base, **settings})


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)


def supervised() -> SupervisedFineTune:
    return SupervisedFineTune(toys.policy(0, scale=2.0), optimizer=sgd, loop=LoopSpec(max_grad_norm=None))


def grpo(**settings: Any) -> ProRLGRPO:
    return ProRLGRPO(
        toys.policy(0, scale=2.0), optimizer=sgd, loop=LoopSpec(minibatches=1, max_grad_norm=None), **settings
    )


# -- the loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["supervised", "grpo"])
def test_positions_that_predict_an_observation_have_exactly_no_gradient(method: str) -> None:
    """Token t is predicted by the last hidden state at t − 1, which feeds nothing else.

    Catches: a mask that is one off, which trains on the first observed token and not on the one behind the last.
    """
    batch = conversations()
    module: Any = supervised() if method == "supervised" else grpo()
    if method == "grpo":
        advantage = torch.where(batch.rewards > 0, 1.0, -1.0)[:, None].expand(batch.input_ids.shape)
        batch = batch.with_extra(advantage=advantage, logp_ref=torch.zeros(batch.input_ids.shape))
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        out.last_hidden_state.retain_grad()
        kept.append(out.last_hidden_state)

    module.policy.model.base_model.register_forward_hook(keep)
    mask = batch.response_mask[:, 1:]
    counts = Counts(float(mask.sum()), float(mask.any(1).sum()))
    module.loss(batch, counts).loss.backward()
    [hidden_BTH] = kept
    assert hidden_BTH.grad is not None
    size_BT = hidden_BTH.grad.abs().sum(-1)
    assert bool((size_BT[observed(batch)[:, 1:]] == 0).all())
    assert bool((size_BT[~mask] == 0).all()) and bool((size_BT[mask] > 0).all())


def test_the_step_is_that_of_plain_logits_with_observations_ignored() -> None:
    """Transformers' own loss with labels of −100 is the oracle, gradient and value. Catches: another denominator."""
    batch = conversations()
    module = supervised()
    before = {k: v.clone() for k, v in module.policy.state_dict().items()}
    run = trainer()
    run.fit(module, train_dataloaders=torch.utils.data.DataLoader([batch], batch_size=None))
    model = toys.llama(0, scale=2.0)
    labels = torch.where(batch.response_mask, batch.input_ids, -100)
    labels[:, 0] = -100
    logits = model(batch.input_ids).logits[:, :-1, :24]
    oracle = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    oracle.backward()
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(oracle.item(), rel=1e-5)
    for name, p in model.named_parameters():
        moved = before[f"model.{name}"] - module.policy.state_dict()[f"model.{name}"]
        torch.testing.assert_close(moved, 0.5 * p.grad, rtol=1e-4, atol=1e-6)


def test_changing_what_a_tool_said_last_changes_no_loss_before_it() -> None:
    """Another last observation moves the policy's tokens behind it and no other; its own likelihood is nobody's."""
    batch = conversations()
    row = int(observed(batch).any(1).nonzero()[0])
    one = batch.select([row])
    place = int(observed(one)[0].nonzero()[-1])
    other = one.input_ids.clone()
    other[0, place] = 19
    policy = toys.policy(0, scale=2.0).eval()
    with torch.no_grad():
        a, b = (policy(ids, one.response_mask).logp for ids in (one.input_ids, other))
    earlier = int(one.response_mask[0, 1:place].sum())
    assert len(a) == len(b) == int(one.response_mask.sum())
    assert torch.equal(a[:earlier], b[:earlier]) and not torch.equal(a[earlier:], b[earlier:])


# -- a run ---------------------------------------------------------------------------------------------


def data(**settings: Any) -> OnPolicyDataModule:
    base: dict[str, Any] = {
        "train": [{"prompt": " ".join(f"t{(7 * i + j) % 20}" for j in range(1 + i % 3))} for i in range(7)],
        "prompts_per_batch": 3,
        "group_size": 4,
        "steps_per_epoch": 3,
        "sampling": Sampling(max_new_tokens=16),
        "rewards": {"even": FunctionReward(lambda prompt, text: float(len(text.split()) % 2 == 0))},
        "environment": talks.Deep(lambda p: 2, max_turns=3),
        "eval_prompts_per_batch": 3,
    }
    return OnPolicyDataModule(**{**base, **settings})


def test_the_first_update_is_on_policy_and_counts_what_the_policy_wrote() -> None:
    """Also behind several turns: the ratio is 1, and lengths, which make the loss's denominator, leave tools out."""
    run = trainer(limit_train_batches=1)
    module = grpo()
    seen: list[RolloutBatch] = []
    module.prepare = lambda batch, prepare=module.prepare: seen.append(batch) or prepare(batch)  # type: ignore
    run.fit(module, datamodule=data())
    metrics = {k: float(v) for k, v in run.callback_metrics.items()}
    assert metrics["train/mismatch_max_log_ratio"] < 1e-4
    assert 1 < metrics["train/tools/observations"] <= 2
    assert metrics["train/tools/observed_tokens"] == pytest.approx(2 * metrics["train/tools/observations"])
    [batch] = seen
    assert metrics["train/length"] == pytest.approx(float(batch.response_lengths.double().mean()))
    told = float(observed(batch).sum(1).double().mean())
    assert told == pytest.approx(metrics["train/tools/observed_tokens"])
    evaluated = RolloutMetrics()
    evaluated.update(batch)
    assert evaluated.compute()["length"] == pytest.approx(metrics["train/length"])


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """With dynamic sampling, whose surplus of conversations crosses the checkpoint."""
    how = {"dynamic_sampling": DynamicSampling(max_rounds=3)}
    whole = grpo()
    trainer(max_epochs=2).fit(whole, datamodule=data(**how))
    first = trainer(max_epochs=1)
    first.fit(grpo(), datamodule=data(**how))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = grpo()
    trainer(max_epochs=2).fit(resumed, datamodule=data(**how), ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name


def test_the_surplus_of_dynamic_sampling_keeps_its_masks(tmp_path: Path) -> None:
    [talk] = talks.sampled(talks.Deep(lambda p: 2), PROMPTS[:1], policy=toys.policy(0, scale=2.0))
    group = Group(PROMPTS[0], tuple(talk))
    scored = ScoredGroup(group, {"r": [1.0, 0.0, 0.0, 0.0]}, [1.0, 0.0, 0.0, 0.0])
    refill = Refill(DynamicSampling(max_age=3), 1, bool)
    refill.fill(0, lambda number: [scored, scored])
    torch.save(refill.state_dict(), tmp_path / "state.pt")
    again = Refill(DynamicSampling(max_age=3), 1, bool)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    dull = ScoredGroup(group, {"r": [1.0] * 4}, [1.0] * 4)
    [carried], _ = again.fill(1, lambda number: [dull])
    assert any(c.written is not None for c in talk)
    for mine, theirs in zip(carried.group.completions, talk, strict=True):
        assert torch.equal(mine.ids, theirs.ids)
        assert (mine.written is None) == (theirs.written is None)
        assert mine.written is None or torch.equal(mine.written, theirs.written)


# -- what people and later runs read -------------------------------------------------------------------


def test_predictions_can_be_trained_on_without_the_tools_words() -> None:
    """Rejective fine-tuning on conversations. Catches: observations lost from the ids, or learnt."""
    batch = conversations()
    module = supervised()
    rows = module.predict_step(batch, 0)
    assert any("response_mask" in row for row in rows)
    for i, row in enumerate(json.loads(json.dumps(rows))):
        assert ("response_mask" in row) == bool(observed(batch)[i].any())
        if "response_mask" in row:
            prompt = Prompt(batch.prompts[i].ids, "", row)
            [given] = given_group(prompt, module.tokenizer, "response", None).completions
            place = slice(int(batch.prompt_lengths[i]), int(batch.lengths[i]))
            assert torch.equal(given.ids, batch.input_ids[i, place])
            assert given.written is not None and torch.equal(given.written, batch.response_mask[i, place])


def test_logs_show_who_said_what(tmp_path: Path) -> None:
    batch = conversations()
    tokenizer = toys.tokenizer()
    rows = rows_of(batch, tokens=True, tokenizer=tokenizer)
    spoken = [i for i in range(len(batch)) if bool(observed(batch)[i].any())]
    for i, row in enumerate(rows):
        assert row["prompt_tokens"] == len(batch.prompts[i].ids)
        assert row["response_tokens"] == int(batch.response_mask[i].sum())
        assert ("turns" in row) == (i in spoken)
        if i in spoken:
            assert [t["role"] for t in row["turns"]][:2] == ["assistant", "tool"]
            assert {t["content"] for t in row["turns"] if t["role"] == "tool"} == {"t3 t4"}
            assert len(row["response_ids"]) == len(row["logprobs"]) == len(row["response_mask"])
            assert all(
                (lp == 0) or own for lp, own in zip(row["logprobs"], row["response_mask"], strict=True)
            )
    table = sample_table(batch, tokenizer, len(batch), "all")
    shown = [str(cell) for cell in table.columns[1].cells]
    assert sum("⟦t3 t4⟧" in text for text in shown) == len(spoken)


def test_parquet_keeps_one_schema_with_and_without_tools(tmp_path: Path) -> None:
    from pyarrow import parquet

    batch, file = conversations(), ParquetFile(tmp_path / "rows.parquet")
    for part, rows in enumerate((rows_of(batch), rows_of(batch, tokenizer=toys.tokenizer()))):
        file.write(1, part, rows)
    table = parquet.read_table(file.path).to_pylist()
    assert {type(row["turns"]) for row in table} == {str} and table[0]["turns"] == "[]"
    assert any(json.loads(row["turns"]) for row in table)
