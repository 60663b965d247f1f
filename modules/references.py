"""Resettable references: what a KL penalty ties the policy to. Training state, hence in checkpoints.

A reference over full weights is a frozen copy of the policy. Under LoRA it is a frozen copy of the *adapters*, which
read the policy's own base: a reset can move it, and no second base is held (adapters switched off could never be
reset). Either way ``state_dict()`` has the names of the policy's trained tensors, and ``load_policy`` copies values, so
that no storage is shared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.teachers import FrozenPolicy


class PolicyCopy(FrozenPolicy):
    """A frozen copy of a policy whose weights all train.

    Args:
        policy: What to copy.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__(copy.deepcopy(policy.model), policy.tokenizer, spec=policy.spec)

    def load_policy(self, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:
        """Take over the policy's weights, or those of ``state``, which has their names."""
        self.load_state_dict(dict(policy.state_dict() if state is None else state))

    @torch.no_grad()
    def logp(self, policy: Policy, input_ids: Tensor, select: Tensor, temperature: float | Tensor) -> Tensor:
        """``[N]`` log-probabilities of the selected tokens; ``policy`` is not looked at."""
        return self(input_ids, select, temperature=temperature).logp  # type: ignore[no-any-return]


class AdapterCopy(nn.Module):
    """A frozen copy of a policy's adapters, graded by lending them to the policy.

    The values are exchanged in place, without a copy of the base and through whatever hooks shard the policy; after
    grading the policy has its own back, bit for bit. Not for use between a forward pass and its backward pass.

    Args:
        policy: A policy with adapters, sharded already if it is to be.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.names = [name for name, p in policy.named_parameters() if p.requires_grad]
        own = dict(policy.named_parameters())
        for name in self.names:
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(own[name].detach().clone(), requires_grad=False))

    @torch.no_grad()
    def load_policy(self, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:
        """Take over the policy's adapters, or those of ``state``, which has their names."""
        source = dict(policy.named_parameters()) if state is None else state
        missing = sorted(set(self.names) - set(source))
        if missing:
            raise KeyError(f"the new reference lacks {missing[:3]}… ({len(missing)} adapter tensors).")
        for name in self.names:
            self.get_parameter(name).copy_(source[name])

    @contextmanager
    def _lent(self, policy: Policy) -> Iterator[None]:
        own = dict(policy.named_parameters())
        kept = {name: own[name].detach().clone() for name in self.names}
        with torch.no_grad():
            for name in self.names:
                own[name].copy_(self.get_parameter(name))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    own[name].copy_(value)

    @torch.no_grad()
    def logp(self, policy: Policy, input_ids: Tensor, select: Tensor, temperature: float | Tensor) -> Tensor:
        """``[N]`` log-probabilities of the selected tokens under the policy's base with these adapters."""
        with self._lent(policy), eval_mode(policy):
            return policy(input_ids, select, temperature=temperature).logp  # type: ignore[no-any-return]


Reference = PolicyCopy | AdapterCopy


def reference_of(policy: Policy) -> Reference:
    """The kind of reference that fits the policy, holding its present weights."""
    return AdapterCopy(policy) if policy.has_adapters else PolicyCopy(policy)
