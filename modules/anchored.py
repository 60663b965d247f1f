"""A method whose policy is held near a reference that can be reset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_onpolicy.modules.losses.settings import KLSpec
from lightning_onpolicy.modules.onpolicy import OnPolicyModule
from lightning_onpolicy.modules.references import Reference, reference_of


class WithReference(OnPolicyModule):
    """Mixin: keeps ``reference`` where there is a KL to it, shards it, and resets it.

    Args:
        *args: As of the class it is mixed into.
        kl: What ties the policy to the reference; with a coefficient of 0 there is none.
        **settings: As of the class it is mixed into.
    """

    reference: Reference | None

    def __init__(self, *args: Any, kl: KLSpec, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.kl = kl
        self.reference = None

    def build(self) -> None:
        """A reference over full weights; one over adapters waits until they are sharded."""
        super().build()
        if self.kl.coef > 0 and not self.policy.has_adapters:
            self.reference = reference_of(self.policy)

    def configure_model(self) -> None:
        """Load and shard the models; called once per process, and again harmlessly."""
        super().configure_model()
        if self.kl.coef > 0 and self.reference is None:
            self.reference = reference_of(self.policy)

    def sharded_models(self) -> Iterator[nn.Module]:
        """Also the reference, over full weights."""
        yield from super().sharded_models()
        if self.reference is not None:
            yield self.reference

    def reset_reference(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Make the reference what the policy is now; the KL to it is then 0. The policy does not change.

        Args:
            state: Other weights to take instead, named as the policy's trained tensors (a best checkpoint's).

        Raises:
            ValueError: If there is no reference.
        """
        if self.reference is None:
            raise ValueError("there is no reference to reset: kl.coef is 0.")
        self.reference.load_policy(self.policy, state)
