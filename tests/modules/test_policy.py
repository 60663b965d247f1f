"""The policy against the plain model it wraps: log-probabilities, gradients, decoding, saving.

Legend: ``B`` sequences, ``T`` positions, ``V`` the tokenizer's vocabulary; heads have more rows than that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import transformers
from torch import Tensor

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.modules import SupervisedFineTune
from lightning_onpolicy.modules.policy import LoraSpec, ModelSpec, Policy
from lightning_onpolicy.modules.saving import merged_copy

V = len(toys.tokenizer())
ROWS = 32
COMMON = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 22,
    "pad_token_id": 20,
    "initializer_range": 0.3,  # far from uniform
}


def family(name: str, **settings: Any) -> Callable[[], Any]:
    """Makes a random model, the same each time."""

    def make() -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**COMMON, **settings})
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()

    return make


GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}
MODELS = {
    "llama tied": family("Llama", tie_word_embeddings=True),
    "llama untied": family("Llama", tie_word_embeddings=False),
    "gpt2": family("GPT2", **GPT2),
    "gemma2 with soft-cap": family("Gemma2", final_logit_softcapping=3.0, head_dim=8),
    "cohere with logit_scale": family("Cohere", logit_scale=0.25),
    "granite with logits_scaling": family("Granite", logits_scaling=4.0),
    "hyperclova x with logits_scaling": family("HyperCLOVAX", logits_scaling=0.25),
    "opt, whose body has a body": family("OPT", word_embed_proj_dim=32, ffn_dim=48, dropout=0.0),
}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}


def ids(seed: int = 0) -> tuple[Tensor, Tensor]:
    """``[B, T]`` token ids and a ragged mask of trained ones."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (3, 9), generator=g)
    mask = torch.rand((3, 9), generator=g) < 0.6
    mask[:, 0] = False
    mask[:, 1] = True
    return tokens, mask


def plain_logp(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """``[N]`` what the model itself says, over the tokenizer's ids."""
    logp_BTV = model(input_ids=tokens).logits[:, :-1, :V].float().log_softmax(-1)
    return logp_BTV.gather(-1, tokens[:, 1:, None])[..., 0][mask[:, 1:]]


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_gradients_are_the_plain_models(name: str) -> None:
    plain, policy = MODELS[name](), Policy(MODELS[name](), toys.tokenizer())
    assert policy.training, "a policy is made to train"
    tokens, mask = ids()
    expected, got = plain_logp(plain, tokens, mask), policy(tokens, mask).logp
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert float(expected.std()) > 0.05, "the comparison says something"
    weight = torch.randn(len(got), generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    own = dict(policy.model.named_parameters())
    for key, p in plain.named_parameters():
        torch.testing.assert_close(
            own[key].grad, p.grad, atol=1e-4, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_a_head_with_a_multiplier_of_its_own() -> None:
    """Falcon-H1. Catches: a family's factor that sampler and trainer both lack, so that no mismatch shows it."""
    make = family("FalconH1", lm_head_multiplier=0.1, head_dim=8, **HYBRID)
    tokens, mask = ids()
    with torch.no_grad():
        expected, got = (
            plain_logp(make(), tokens, mask),
            Policy(make(), toys.tokenizer()).eval()(tokens, mask).logp,
        )
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


def test_logits_made_in_an_unknown_way_are_refused() -> None:
    """Catches: training another distribution than the model's own forward pass, exports, and servers have."""
    model = MODELS["llama untied"]()

    class Louder(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5
            return out

    model.__class__ = Louder
    with pytest.raises(ValueError, match="Louder makes logits in a way that is not known here"):
        Policy(model, toys.tokenizer())


def test_rows_beyond_the_models_positions_are_refused() -> None:
    """Catches: supervised rows that a model grades far from where it has ever been trained."""
    long = torch.zeros(1, 65, dtype=torch.long)
    with pytest.raises(ValueError, match="a row of 65 tokens is longer than the model's 64 positions"):
        Policy(MODELS["llama tied"](), toys.tokenizer())(long, torch.ones_like(long, dtype=torch.bool))


def test_a_model_without_a_key_value_cache_is_not_sampled_from() -> None:
    """Catches: a state-space model whose every token sees the one before it alone."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=ROWS, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=22, pad_token_id=20
    )
    policy = Policy(transformers.AutoModelForCausalLM.from_config(config), toys.tokenizer())
    with pytest.raises(ValueError, match="MambaModel keeps no key-value cache"):
        TransformersEngine(policy).generate([[1, 2]], 1, Sampling(max_new_tokens=2), seed=0)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_step_by_step_is_the_plain_model_and_padded_rows_have_no_probability(name: str) -> None:
    plain, policy = MODELS[name](), Policy(MODELS[name](), toys.tokenizer()).eval()
    tokens, _ = ids()
    cache = policy.new_cache()
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits[..., :V].float().log_softmax(-1)
        for t in range(tokens.shape[1]):
            mask = torch.ones(tokens.shape[0], t + 1)
            at = torch.full((tokens.shape[0], 1), t)
            logits_BV = policy.decode(tokens[:, t : t + 1], mask, at, cache)
            assert bool((logits_BV[:, V:] == -torch.inf).all())
            assert bool((logits_BV.softmax(-1)[:, V:] == 0).all())
            torch.testing.assert_close(logits_BV.log_softmax(-1)[:, :V], expected[:, t], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_still_generates_as_before(name: str) -> None:
    plain, wrapped = MODELS[name](), Policy(MODELS[name](), toys.tokenizer()).eval().model
    tokens, _ = ids()
    how = {"do_sample": False, "max_new_tokens": 5, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(wrapped.generate(tokens, **how), plain.generate(tokens, **how))


def test_a_head_smaller_than_the_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"up to 23.*only 23 rows"):
        Policy(toys.llama(vocab=23), toys.tokenizer())


def trained(lora: bool, **settings: Any) -> Policy:
    """A policy whose adapters, if any, do something."""
    spec = LoraSpec(r=2, alpha=8.0) if lora else None
    policy = Policy(toys.llama(0, scale=3.0, **settings), toys.tokenizer(), lora=spec).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for key, p in policy.named_parameters():
            if "lora_B" in key or not lora:
                p.add_(0.1 * torch.randn_like(p))
    return policy


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "merged adapters"])
def test_saved_models_load_into_plain_transformers(lora: bool, tie: bool, tmp_path: Path) -> None:
    policy = trained(lora, tie=tie)
    before = copy.deepcopy(policy.state_dict())
    policy.save_pretrained(tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items()), "saving changes nothing"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens, mask = ids()
    with torch.no_grad():
        torch.testing.assert_close(
            plain_logp(plain, tokens, mask), policy(tokens, mask).logp, atol=2e-5, rtol=0
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert plain.generation_config.eos_token_id == 22
    again = ModelSpec(str(tmp_path)).load().eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens, mask).logp, policy(tokens, mask).logp, atol=2e-5, rtol=0)


def test_adapters_alone_load_over_the_base(tmp_path: Path) -> None:
    policy = trained(lora=True)
    policy.save_pretrained(tmp_path, merge=False)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "model.safetensors").exists()
    base = toys.llama(0, scale=3.0).eval()
    tokens, mask = ids()
    with torch.no_grad():
        without = plain_logp(base, tokens, mask)
        base.load_adapter(str(tmp_path))
        torch.testing.assert_close(
            plain_logp(base, tokens, mask), policy(tokens, mask).logp, atol=2e-5, rtol=0
        )
        with policy.adapters_off():
            torch.testing.assert_close(policy(tokens, mask).logp, without, atol=2e-5, rtol=0)
        assert float((policy(tokens, mask).logp - without).abs().max()) > 1e-2, "adapters are on again"


def test_adapters_off_needs_adapters_and_lora_never_touches_the_head() -> None:
    with pytest.raises(ValueError, match="no adapters"), trained(lora=False).adapters_off():
        raise AssertionError("not reached")
    policy = trained(lora=True, tie=False)
    assert {n.split(".")[-3] for n, p in policy.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert not any("lm_head" in n for n, p in policy.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="lm_head"):
        LoraSpec(target_modules=("lm_head",))
    with pytest.raises(ValueError, match=r"names \['q_porj'\], and the model has no such"):
        Policy(toys.llama(0), toys.tokenizer(), lora=LoraSpec(target_modules=("q_porj", "v_proj")))


@pytest.mark.parametrize("bits", [None, "4bit", "8bit"])
def test_adapters_over_any_base_come_back_from_a_checkpoint(bits: Any, tmp_path: Path) -> None:
    """Catches: what quantised weights keep beside themselves, saved and then taken for another student's."""
    if bits:
        pytest.importorskip("bitsandbytes")
    path = toys.save_model(tmp_path / "model")
    spec = ModelSpec(path, quantize=bits, lora=LoraSpec(r=2))

    def module() -> SupervisedFineTune:
        torch.manual_seed(3)
        made = SupervisedFineTune(spec)
        made.configure_model()
        return made

    first, second = module(), module()
    with torch.no_grad():
        for name, p in first.policy.named_parameters():
            if "lora_B" in name:
                p.normal_()
    state = first.state_dict()
    assert state and all(".lora_" in name for name in state)
    torch.save(state, tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, value in state.items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_merged_copy_keeps_every_tensors_dtype() -> None:
    """Catches: float32 norms of a bfloat16 model, rounded because another tensor came first."""
    policy = Policy(toys.llama(0, tie=False).bfloat16(), toys.tokenizer(), lora=LoraSpec(r=2))
    norm = policy.model.base_model.norm
    norm.weight.data = norm.weight.data.float() + 1e-4
    plain = merged_copy(policy.model)
    assert (
        torch.equal(plain.model.norm.weight, norm.weight) and plain.model.norm.weight.dtype == torch.float32
    )
    assert plain.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_are_not_merged_into_quantised_weights(bits: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    spec = ModelSpec(toys.save_model(tmp_path / "model"), quantize=bits, lora=LoraSpec(r=2))
    policy = spec.load()
    with pytest.raises(ValueError, match="quantised"):
        policy.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    policy.save_pretrained(tmp_path / "adapters", merge=False)
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)], ids=["full", "lora"])
def test_recomputed_activations_give_the_same_gradients(lora: LoraSpec | None, tmp_path: Path) -> None:
    path = toys.save_model(tmp_path, scale=3.0)
    tokens, mask = ids()
    gradients, calls = [], []
    for again in (False, True):
        torch.manual_seed(0)  # of the adapters
        policy = ModelSpec(path, lora=lora, gradient_checkpointing=again).load()
        count: list[int] = []
        policy.model.base_model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, count=count: count.append(1)
        )
        policy(tokens, mask).logp.sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
        calls.append(len(count))
    assert calls == [1, 2], "the layer ran again in the backward pass"
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-6, rtol=1e-5)
    assert any(float(g.abs().max()) > 0 for g in gradients[0].values())


def test_the_embedded_engine_finds_stop_strings_with_the_policys_tokenizer() -> None:
    """As a datamodule makes it, from the policy alone. Catches: ``sampling.stop`` that no configuration can use."""
    engine = TransformersEngine(toys.policy(0, scale=3.0))
    sampling = Sampling(max_new_tokens=12, temperature=2.0, stop=tuple(f"t{i}" for i in range(0, 20, 2)))
    [group] = engine.generate([[1, 2]], 16, sampling, seed=0)
    stopped = [c for c in group if c.finish == "stop"]
    assert stopped
    assert all(int(c.ids[-1]) < 20 for c in stopped)
