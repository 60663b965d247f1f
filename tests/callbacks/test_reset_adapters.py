"""A policy of ours with adapters: its reference is a frozen copy of them over the same base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import anchored
import pytest
import torch
import toys
from anchored import Saving, Spy
from torch.utils.data import DataLoader

from lightning_onpolicy.callbacks.resets import OptimizerReset, ReferenceReset
from lightning_onpolicy.callbacks.triggers import Ceiling, EveryNSteps
from lightning_onpolicy.modules.aggregate import aggregate
from lightning_onpolicy.modules.onpolicy import LoopSpec, OnPolicyModule
from lightning_onpolicy.modules.outcome import Counts, LossOutput
from lightning_onpolicy.modules.policy import LoraSpec, Policy


class NearReference(OnPolicyModule):
    """Raises the sampled tokens' log-probabilities, near a reference."""

    reference: Policy

    def build(self) -> None:
        # The base is in memory once: what deepcopy finds in the memo it does not copy.
        shared = {id(p): p for p in self.policy.parameters() if not p.requires_grad}
        self.reference = copy.deepcopy(self.policy, {**shared, id(self.tokenizer): self.tokenizer})
        self.reference.requires_grad_(False)

    def loss(self, micro: Any, counts: Counts) -> LossOutput:
        mask = micro.response_mask
        logp = self.policy(micro.input_ids, mask, outputs=("logp",)).logp
        with torch.no_grad():
            gap = logp - self.reference(micro.input_ids, mask, outputs=("logp",)).logp
        return LossOutput(
            aggregate(-logp, mask, counts, "token_mean"), {"gap": gap.abs()}, {"far": gap.abs()}
        )


def module() -> NearReference:
    policy = Policy(toys.llama(0, scale=2.0), toys.tokenizer(), lora=LoraSpec(r=2))
    torch.manual_seed(5)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return NearReference(
        policy, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), loop=LoopSpec(minibatches=2)
    )


class Batches(anchored.Stream):
    """Rollouts."""

    def __iter__(self) -> Any:
        start = self.done
        for number in range(start, self.count):
            self.done = number + 1
            yield toys.batch(number, groups=4)


def adapters(state: Any, who: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(who): v.clone() for k, v in state.items() if k.startswith(who) and ".lora_" in k}


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[k], b[k]) for k in a)


def test_the_reference_is_a_frozen_copy_of_the_adapters_and_is_saved(tmp_path: Path) -> None:
    """Catches: a reference with adapters off, one that trains, one that the checkpoint leaves out, a base saved."""
    whole, path = module(), tmp_path / "a.ckpt"
    seen: list[Any] = []

    def look(trainer: Any, m: Any, i: int) -> None:
        state = m.state_dict()
        seen.append((adapters(state, "policy."), adapters(state, "reference.")))

    reset = ReferenceReset(EveryNSteps(6))
    logs: list[float] = []
    gaps = Spy(lambda t, m, i: logs.append(float(t.callback_metrics["train/far"])))
    callbacks = [reset, OptimizerReset(), Spy(look), gaps, Saving(path, 8)]
    anchored.trainer(callbacks).fit(whole, Batches(6))
    start = adapters(module().policy.state_dict(), "")
    assert same(seen[0][1], start) and same(seen[1][1], start)  # it does not train
    assert same(seen[2][0], seen[2][1]) and not same(seen[2][1], start)  # after 3 batches of 2 steps
    assert same(seen[4][1], seen[2][1]) and not same(seen[4][0], seen[2][0])
    policy, reference = whole.policy.state_dict(), whole.reference.state_dict()
    assert all(policy[k].data_ptr() == reference[k].data_ptr() for k in policy if ".lora_" not in k)
    assert reset.count == 2 and same(seen[5][0], seen[5][1])

    saved = torch.load(path, weights_only=True)
    assert same(adapters(saved["state_dict"], "reference."), seen[2][1])
    assert all(".lora_" in name for name in saved["state_dict"])
    resumed = module()
    anchored.trainer([ReferenceReset(EveryNSteps(6)), OptimizerReset()]).fit(
        resumed, Batches(6), ckpt_path=path, weights_only=True
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_after_a_reset_the_ratio_to_the_reference_is_exactly_1() -> None:
    """One optimizer step per batch, so that a batch's first forward pass is its only one."""
    trained = module()
    trained.loop = LoopSpec()
    far: list[float] = []
    look = Spy(lambda t, m, i: far.append(float(t.callback_metrics["train/far"])))
    anchored.trainer([ReferenceReset(Ceiling("train/far", 0.5, min_gap=3)), look]).fit(
        trained, DataLoader(list(Batches(8)), batch_size=None)
    )
    zero = [i for i, gap in enumerate(far) if gap == 0.0]
    assert zero[0] == 0 and len(zero) >= 2 and len(far) == 8
    assert all(far[i - 1] > 0.5 for i in zero[1:])


def test_a_checkpoint_without_the_reference_is_refused() -> None:
    trained = module()
    trained.configure_model()
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith("reference.")}
    with pytest.raises(RuntimeError, match=r"missing .*reference"):
        trained.load_state_dict(state)
