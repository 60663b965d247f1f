"""The scalar model: what it reads, where it starts, what it shares with nobody, and that it is saved and resumed.

Legend: ``B`` sequences, ``T`` positions, ``H`` hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import ranks_scalar
import torch
import toys
import transformers
from launching import on_two_ranks
from ranks_scalar import Judged
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.policy import LoraSpec, ModelSpec, Policy
from lightning_onpolicy.modules.scalar import HEAD_FILE, ScalarHead, ScalarModel, pack_left

EOS, PAD = 22, 20
# Rows: an EOS inside the prompt, a truncated answer, an empty answer (prompt alone), one token, the pad id as a word.
ROWS = [[3, EOS, 4, 5, EOS], [1, 2, 3, 4, 5, 6, 7], [8, 9], [11], [PAD, 2, PAD]]


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    model = transformers.GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = EOS
    return model


def adapted(**settings: Any) -> Policy:
    """A policy with adapters that do something."""
    policy = Policy(toys.llama(0, scale=2.0, **settings), toys.tokenizer(), lora=LoraSpec(r=2))
    torch.manual_seed(3)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return policy


def scalar(policy: Policy | None = None, **settings: Any) -> ScalarModel:
    return ScalarModel.copy_of(policy or toys.policy(0, scale=3.0), **{"std": 0.5, **settings})


def padded(rows: list[list[int]], left: int, right: int, fill: int) -> tuple[Tensor, Tensor]:
    """Rows within the longest one's width plus ``left`` and ``right``; each lies at another place in it."""
    width = max(map(len, rows)) + left + right
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        start = 0 if left == 0 else width - len(row) - right
        ids[b, start : start + len(row)] = torch.tensor(row)
        mask[b, start : start + len(row)] = 1
    return ids, mask


@pytest.mark.parametrize("make", [lambda: toys.llama(0, scale=3.0), gpt2], ids=["rotary", "absolute"])
@pytest.mark.parametrize("fill", [PAD, EOS, -100])
def test_scores_are_those_of_the_rows_alone(make: Any, fill: int) -> None:
    """Catches: a position shifted by left padding, the last place by id, neighbours that matter, a prompt's EOS."""
    model = ScalarModel(make().base_model, toys.tokenizer(), std=0.5).eval()
    with torch.no_grad():
        alone = []
        for row in ROWS:
            hidden = model.body(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            alone.append(hidden @ model.head.weight[0] + model.head.bias[0])
        expected = torch.stack(alone)
        assert float(expected.std()) > 0.05, "the comparison says something"
        for left, right in ((0, 0), (0, 5), (1, 0), (5, 0), (3, 4)):
            ids, mask = padded(ROWS, left, right, fill)
            torch.testing.assert_close(model.scores(ids, mask), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.scores(ids, mask.bool()), expected, atol=1e-5, rtol=1e-5)
            order = [4, 2, 0]  # another mix, another width
            torch.testing.assert_close(
                model.scores(ids[order], mask[order]), expected[order], atol=1e-5, rtol=1e-5
            )


def test_gradients_of_scores_do_not_see_the_padding_either() -> None:
    gradients = []
    for left, right in ((0, 0), (6, 0), (2, 5)):
        model = scalar()
        ids, mask = padded(ROWS, left, right, EOS)
        (model.scores(ids, mask) * torch.arange(1.0, 6.0)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4)


def test_a_row_without_a_token_is_refused_and_holes_close() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]), torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])
    packed, lengths = pack_left(ids, mask)
    assert packed.tolist() == [[6, 8, 0], [1, 2, 3]]
    assert lengths.tolist() == [2, 3]
    mask[1] = 0
    with pytest.raises(ValueError, match=r"rows \[1\] have no token"):
        scalar().scores(ids, mask)


def test_values_are_read_where_the_policy_reads_and_do_not_see_later_tokens() -> None:
    """Catches: the state after a token as its value; a padding or a later token that moves an earlier value."""
    policy = toys.policy(0, scale=3.0)
    model = scalar(policy)
    batch = toys.batch(2)
    with torch.no_grad():
        hidden = policy.hidden(batch.input_ids, batch.response_mask)
        value = model.values(batch.input_ids, batch.response_mask)
        torch.testing.assert_close(value, hidden @ model.head.weight[0] + model.head.bias[0])
        assert value.shape == (int(batch.response_mask[:, 1:].sum()),)
        last = batch.lengths - 1
        changed = batch.input_ids.clone()
        changed[torch.arange(len(batch)), last] = 7  # the last token is acted, not yet seen
        torch.testing.assert_close(model.values(changed, batch.response_mask), value)
        whole = model(batch.input_ids, torch.ones_like(batch.response_mask)).view(batch.input_ids.shape)
        torch.testing.assert_close(
            whole[torch.arange(len(batch)), last], model.scores(batch.input_ids, batch.attention_mask)
        )


def test_the_head_starts_at_zero_or_small_by_its_own_seed() -> None:
    batch = toys.batch(0)
    zero = scalar(std=0.0)
    assert not zero.values(batch.input_ids, batch.response_mask).any()
    assert not zero.scores(batch.input_ids, batch.attention_mask).any()
    policies = toys.policy(0), adapted()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, other = (scalar(p, std=0.02, seed=4 + i) for i, p in enumerate(policies))
    assert torch.equal(torch.get_rng_state(), state), "a merged copy is built without random numbers too"
    torch.manual_seed(2)
    assert torch.equal(scalar(std=0.02, seed=4).head.weight, first.head.weight)
    assert not torch.equal(other.head.weight, first.head.weight)
    assert 0.01 < float(first.head.weight.detach().std()) < 0.03
    with pytest.raises(ValueError, match="std of a scalar head"):
        scalar(std=-1.0)


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_head_is_float32_wherever_a_trainer_builds_it(device: str) -> None:
    """Catches: bf16-true's default type; a CPU generator for a draw on the Trainer's device."""
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            head = ScalarHead(64, std=0.02)
        finally:
            torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert {p.device.type for p in head.parameters()} == {device}
    if device != "meta":
        assert torch.equal(head.weight.cpu(), ScalarHead(64, std=0.02).weight)


@pytest.mark.parametrize("cast", ["body", "module", "autocast"])
def test_the_head_computes_in_float32(cast: str) -> None:
    """Catches: scores rounded to bfloat16, in which near answers tie; a head that a cast has rounded."""
    policy = toys.policy(0, scale=3.0)
    if cast == "body":
        policy.to(torch.bfloat16)
    model = scalar(policy)
    exact = model.head.weight.detach().clone()
    if cast == "module":
        model.to(torch.bfloat16)
    assert model.head.weight.dtype == model.head.bias.dtype == torch.float32
    assert torch.equal(model.head.weight, exact)
    batch = toys.batch(0, groups=6)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        score = model.scores(batch.input_ids, batch.attention_mask)
        packed, lengths = pack_left(batch.input_ids, batch.attention_mask)
        hidden = model.body(input_ids=packed).last_hidden_state[torch.arange(len(batch)), lengths - 1]
    assert score.dtype == torch.float32
    if cast != "autocast":
        assert {p.dtype for p in model.body.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(score, hidden.float() @ exact[0], atol=1e-6, rtol=1e-6)
    assert not torch.equal(score, score.bfloat16().float())
    score.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_dropout_is_on_in_updates_only() -> None:
    model = scalar(toys.policy(0, scale=3.0, attention_dropout=0.5))
    batch = toys.batch(0)

    def score() -> Tensor:
        with torch.no_grad():
            return model.scores(batch.input_ids, batch.attention_mask)

    assert not torch.equal(score(), score())
    with eval_mode(model):
        assert torch.equal(score(), score())
    assert not torch.equal(score(), score())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_a_copy_shares_nothing_and_no_gradient_crosses(tie: bool, lora: bool) -> None:
    """Catches: an alias of the body or of tied embeddings; adapters that the copy forgot."""
    policy = adapted(tie=tie) if lora else toys.policy(0, scale=3.0, tie=tie)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    model = scalar(policy)
    batch = toys.batch(1)
    with torch.no_grad():
        hidden = policy.hidden(batch.input_ids, batch.response_mask)
        expected = hidden @ model.head.weight[0]
        torch.testing.assert_close(
            model.values(batch.input_ids, batch.response_mask), expected, atol=2e-5, rtol=1e-4
        )
    storages = [
        {t.untyped_storage().data_ptr() for t in m.state_dict(keep_vars=True).values()}
        for m in (policy, model)
    ]
    assert not storages[0] & storages[1]
    assert policy.config is not model.body.config
    assert all(p.requires_grad for p in model.parameters())
    assert not any(".lora_" in name or "lm_head" in name for name in model.state_dict())

    model.values(batch.input_ids, batch.response_mask).square().sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    model.zero_grad(set_to_none=True)
    policy(batch.input_ids, batch.response_mask).logp.sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_adapters_of_its_own_train_with_the_head_alone(tmp_path: Path) -> None:
    for model in (
        scalar(lora=LoraSpec(r=2)),
        ScalarModel.from_pretrained(ModelSpec(toys.save_model(tmp_path), lora=LoraSpec(r=2)), std=0.5),
    ):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name in trained if ".lora_" not in name} == {"head.weight", "head.bias"}
        assert len(trained) > 2
        assert model.frozen_names() == {n for n, _ in model.named_parameters()} - trained
    with pytest.raises(ValueError, match="needs lora"):
        spec = ModelSpec("x", quantize="4bit")
        ScalarModel(toys.llama(0).base_model, toys.tokenizer(), spec=spec)
    with pytest.raises(ValueError, match="name a model of its own"):
        scalar(Policy(toys.llama(0), toys.tokenizer(), spec=ModelSpec("x", quantize="4bit")))


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)], ids=["full", "lora"])
def test_recomputed_activations_give_the_same_gradients(lora: LoraSpec | None, tmp_path: Path) -> None:
    path = toys.save_model(tmp_path, scale=3.0)
    batch = toys.batch(0)
    gradients, calls = [], []
    for again in (False, True):
        torch.manual_seed(0)  # of the adapters
        policy = ModelSpec(path, gradient_checkpointing=again).load()
        model = scalar(policy, lora=lora)
        count: list[int] = []
        model.body.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model.scores(batch.input_ids, batch.attention_mask).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        calls.append(len(count))
    assert calls == [1, 2], "the layer ran again in the backward pass"
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("tie", [True, False])
def test_what_is_saved_loads_again(lora: LoraSpec | None, tie: bool, tmp_path: Path) -> None:
    model = scalar(toys.policy(0, scale=3.0, tie=tie), lora=lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "bias" in name:
                p.normal_(std=0.3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "saving changes nothing"
    again = ScalarModel.from_pretrained(str(tmp_path))
    batch = toys.batch(0)
    with torch.no_grad():
        scores = [m.eval().scores(batch.input_ids, batch.attention_mask) for m in (model, again)]
    torch.testing.assert_close(scores[1], scores[0], atol=2e-5, rtol=1e-5)
    assert float(scores[0].std()) > 0.05
    assert all(p.requires_grad for p in again.parameters())
    plain = transformers.AutoModel.from_pretrained(tmp_path)
    assert set(plain.state_dict()) == {k[5:] for k in again.state_dict() if k.startswith("body.")}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab() == model.tokenizer.get_vocab()
    (tmp_path / HEAD_FILE).unlink()  # a head that is gone is not made anew in silence
    with pytest.raises(OSError, match=HEAD_FILE):
        ScalarModel.from_pretrained(str(tmp_path))


def test_from_a_causal_model_it_is_a_copy_of_its_policy_with_a_new_head(tmp_path: Path) -> None:
    path = toys.save_model(tmp_path, scale=3.0, tie=False)
    loaded, copied = ScalarModel.from_pretrained(path, std=0.5), scalar(ModelSpec(path).load())
    assert loaded.state_dict().keys() == copied.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in copied.state_dict().items())


# -- in the shared loop -------------------------------------------------------------------------------


def judged(lora: LoraSpec | None = None) -> Judged:
    module = Judged(
        toys.policy(0, scale=2.0),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        loop=LoopSpec(micro_batch_tokens=24),
    )
    module.judge_lora = lora
    return module


def fit(module: Judged, seeds: range, epochs: int = 1, **settings: Any) -> pl.Trainer:
    torch.manual_seed(0)  # of the adapters
    run = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module, DataLoader([toys.batch(i) for i in seeds], batch_size=None), **settings)
    return run


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)], ids=["full", "lora"])
def test_it_is_training_state_that_resumes_bit_for_bit(lora: LoraSpec | None, tmp_path: Path) -> None:
    whole = judged(lora)
    fit(whole, range(4))
    fit(judged(lora), range(3)).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    names = {name for name in saved["state_dict"] if name.startswith("judge.")}
    assert {"judge.head.weight", "judge.head.bias"} < names
    assert any(".lora_" in name for name in names) == (lora is not None)
    assert ("judge.body.embed_tokens.weight" in names) == (lora is None), "a frozen body is not saved"
    assert len(saved["optimizer_states"]) == 2
    second = judged(lora)
    fit(second, range(3, 4), epochs=2, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    moved = (whole.judge.head.weight - scalar(std=0.3).head.weight).detach()
    assert float(moved.abs().max()) > 1e-3
    with pytest.raises(RuntimeError, match=r"missing \['judge\.head\.weight'\]"):
        second.load_state_dict({k: v for k, v in whole.state_dict().items() if k != "judge.head.weight"})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(strategy: str, dtype: str, tmp_path: Path) -> None:
    """Catches: a head in a group of another dtype, a pass that misses FSDP2's hooks, shares that do not add up."""
    one = ranks_scalar.run("auto", dtype)
    out = tmp_path / "result.pt"
    on_two_ranks(ranks_scalar, strategy, dtype, out)
    two = torch.load(out, weights_only=True)
    policy = ranks_scalar.student(getattr(torch, dtype))
    start = {"policy": policy.state_dict(), "judge": ScalarModel.copy_of(policy, std=0.3).state_dict()}
    share = 1e-4 if dtype == "float32" else 0.05  # of the move: its rounding
    for player, weights in start.items():
        for part in {name.split(".")[0] for name in weights}:
            names = [name for name in weights if name.startswith(f"{part}.")]
            before, alone, together = (
                torch.cat([state[name].double().flatten() for name in names])
                for state in (weights, one[player], two[player])
            )
            moved = float((alone - before).norm())
            assert moved > 1e-2, (player, part)
            assert float((together - alone).norm()) < share * moved, (player, part)
        assert all(two[player][name].dtype == value.dtype for name, value in weights.items())
    assert one["judge"]["head.weight"].dtype == torch.float32
    assert one["judge"]["body.embed_tokens.weight"].dtype == getattr(torch, dtype)


def test_a_row_beyond_the_models_positions_is_refused_with_numbers() -> None:
    model = scalar(toys.policy(0, max_position_embeddings=8))
    ids = torch.full((2, 12), 3)
    mask = torch.arange(12) < torch.tensor([[8], [2]])
    assert model.max_positions == 8 and model.scores(ids, mask).shape == (2,)  # padding is no position
    mask[1, :9] = True
    with pytest.raises(ValueError, match="a row of 9 tokens is longer than the scalar model's 8 positions"):
        model.scores(ids, mask)
