"""Small fp64 worlds in which every response can be enumerated, and oracles that use plain transformers logits.

Legend: ``B`` sequences, ``T`` positions (prompt + response), ``V`` true vocabulary; ``p`` student, ``q`` teacher.
Nothing here touches the library's losses or kernels: the oracles go from logits to divergences by the textbook.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, Sampling, collate
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.outcome import Counts
from lightning_onpolicy.modules.policy import Policy

Grads = dict[str, Tensor]
EXACT = ("reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
OBJECTIVES = (*EXACT, "sampled_reverse_kl")
TEMPLATE = (
    "{% for m in messages %}t0 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}t1{% endif %}"
)


def words(n: int, names: Sequence[str] | None = None, template: str = TEMPLATE) -> Any:
    """A word-level tokenizer of ``n`` tokens, the last of them EOS, which also pads (pad == eos)."""
    vocab = {name: i for i, name in enumerate(names or [f"t{i}" for i in range(n - 1)])}
    vocab["<eos>"] = n - 1
    backend = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    out.chat_template = template
    return out


def tiny(
    seed: int, n: int = 3, *, rows: int | None = None, hidden: int = 8, tokenizer: Any = None, **config: Any
) -> Policy:
    """A one-layer fp64 GPT-2 over ``n`` tokens with sharp, distinct distributions; ``rows`` may pad the head."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": rows or n,
        "n_positions": 32,
        "n_embd": hidden,
        "n_layer": 1,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": n - 1,
        "eos_token_id": n - 1,
        **config,
    }
    model = GPT2LMHeadModel(GPT2Config(**settings)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.35 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = n - 1
    model.generation_config.pad_token_id = n - 1
    return Policy(model, tokenizer or words(n))


def log_probs(policy: Policy, input_ids: Tensor, tau: float = 1.0) -> Tensor:
    """``[B, T-1, V]`` next-token log-probabilities from plain logits; entry t speaks of token t + 1."""
    n = len(policy.tokenizer)
    logits: Tensor = policy.model(input_ids).logits[:, :-1, :n]
    return (logits / tau).log_softmax(-1)


def of_tokens(logp_BTV: Tensor, input_ids: Tensor) -> Tensor:
    """``[B, T-1]`` log-probabilities of the tokens themselves."""
    return logp_BTV.gather(-1, input_ids[:, 1:, None])[..., 0]


def divergence(name: str, logp: Tensor, logq: Tensor, beta: float = 0.5, alpha: float = 0.1) -> Tensor:
    """The textbook divergence over the last dimension."""
    p, q = logp.exp(), logq.exp()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    if name == "reverse_kl":
        return kl(p, q)
    if name == "forward_kl":
        return kl(q, p)
    if name == "jsd":
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    if name == "skew_forward_kl":
        return kl(q, alpha * q + (1 - alpha) * p)
    assert name == "skew_reverse_kl", name
    return kl(p, (1 - alpha) * q + alpha * p)


def enumerate_responses(n: int, length: int) -> list[list[int]]:
    """All ``n ** length`` responses."""
    return [list(y) for y in itertools.product(range(n), repeat=length)]


def rollouts(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad: int,
    finish: str = "length",
    sampling: Sampling | None = None,
) -> RolloutBatch:
    """One completion per prompt; sampler log-probabilities are to be set with :func:`sampled_with`."""
    groups = [
        Group(Prompt(tuple(x), text=""), (Completion(torch.tensor(y), torch.zeros(len(y)), finish),))  # type: ignore[arg-type]
        for x, y in zip(prompts, responses, strict=True)
    ]
    return collate(groups, pad, sampling=sampling or Sampling())


def sampled_with(batch: RolloutBatch, logmu_BT: Tensor) -> RolloutBatch:
    """The batch with ``[B, T-1]`` sampler log-probabilities (of tokens 1…), 0 outside the response."""
    value = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
    value[:, 1:] = logmu_BT.detach()
    return dataclasses.replace(batch, sampler_logprobs=value * batch.response_mask)


def ragged(seed: int, n: int, rows: int = 6, max_prompt: int = 4, max_response: int = 5) -> RolloutBatch:
    """Random prompts and responses of different lengths (EOS ids may appear anywhere), with random ``μ``."""
    g = torch.Generator().manual_seed(seed)

    def draw(longest: int) -> list[int]:
        size = int(torch.randint(1, longest + 1, (), generator=g))
        return torch.randint(0, n, (size,), generator=g).tolist()

    batch = rollouts(
        [draw(max_prompt) for _ in range(rows)], [draw(max_response) for _ in range(rows)], pad=n - 1
    )
    B, T = batch.input_ids.shape
    return sampled_with(batch, -1.5 + 0.3 * torch.randn(B, T - 1, generator=g, dtype=torch.float64))


def counts(batch: RolloutBatch) -> Counts:
    """What the batch counts as one optimizer step."""
    return Counts(float(batch.response_mask.sum()), float(batch.response_mask.any(1).sum()))


def distill(student: Policy, teacher: Any, objective: str, **kwargs: Any) -> OnPolicyDistill:
    """A module whose models are in place, without a Trainer."""
    module = OnPolicyDistill(student, teacher, objective=objective, **kwargs)  # type: ignore[arg-type]
    module.configure_model()
    return module


def grads(loss: Tensor, policy: Policy) -> Grads:
    """Gradient of a scalar with respect to every trainable parameter, by name (zeros where unused)."""
    named = {k: v for k, v in policy.named_parameters() if v.requires_grad}
    values = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(named.items(), values, strict=True)
    }


def step(module: OnPolicyDistill, batch: RolloutBatch, total: Counts | None = None) -> tuple[Tensor, Grads]:
    """Loss and gradient of one micro-batch."""
    loss = module.loss(batch, total or counts(batch)).loss
    return loss.detach(), grads(loss, module.policy)


def weighted(parts: Iterator[tuple[Tensor, Grads]]) -> Grads:
    """Σ weight · gradient."""
    out: Grads = {}
    for weight, grad in parts:
        out = {k: out.get(k, 0) + weight * v for k, v in grad.items()}
    return out


def flat(grad: Grads) -> Tensor:
    """One vector."""
    return torch.cat([g.reshape(-1) for g in grad.values()])


def assert_same(a: Grads, b: Grads, rtol: float = 1e-6, scale: float | None = None) -> None:
    """Gradients agree to ``rtol`` of the largest entry (or ``scale``), and are finite; names the worst parameter."""
    assert a.keys() == b.keys()
    reference = scale if scale is not None else max(float(g.abs().max()) for g in b.values())
    assert reference > 0, "a comparison of zero gradients proves nothing"
    gaps = {k: float((a[k] - b[k]).abs().max()) for k in a}
    worst = max(gaps, key=lambda k: gaps[k] if gaps[k] == gaps[k] else float("inf"))
    assert gaps[worst] <= rtol * reference, f"{worst}: {gaps[worst]:.3e} of {reference:.3e}"


@contextmanager
def last_hidden(policy: Policy, change: Any) -> Iterator[None]:
    """Pass the policy's last hidden states ``[B, T, H]`` (what the head reads) through ``change``."""
    handle = policy.model.transformer.ln_f.register_forward_hook(lambda _m, _a, out: change(out))
    try:
        yield
    finally:
        handle.remove()
