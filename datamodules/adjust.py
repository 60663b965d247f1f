"""Settings of a loader that change between batches, checked before they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rows import MixedSource

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.maker import RolloutMaker


class AdjustableRollouts:
    """Mixin of :class:`RolloutLoader`: what a ``StageSchedule`` asks of it."""

    stream: PromptStream
    maker: RolloutMaker
    off_policy: Any

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that :meth:`adjust` could not make.

        Raises:
            ValueError: The message names the key.
        """
        self._adjusted(settings)

    def adjust(self, settings: Mapping[str, Any]) -> None:
        """Change what the next batch is sampled with, and nothing of its place in the prompts.

        Args:
            settings: Any of :class:`Sampling`'s keys, ``group_size`` and, if the source mixes, its weights by name
                as ``mix``.

        Raises:
            ValueError: As :meth:`check`; nothing is then changed.
        """
        self.maker.sampling, self.maker.group_size = self._adjusted(settings)
        if isinstance(self.stream.source, MixedSource) and "mix" in settings:
            self.stream.source.reweigh(settings["mix"])

    def _adjusted(self, settings: Mapping[str, Any]) -> tuple[Sampling, int]:
        keys = {field.name for field in dataclasses.fields(Sampling)}
        for key in settings:
            if key not in keys | {"group_size", "mix"}:
                raise ValueError(
                    f"there is no setting {key!r}; known are {sorted(keys)}, group_size and mix."
                )
        if self.off_policy is not None:
            raise ValueError(
                f"{', '.join(map(repr, settings))} cannot change while on_policy_fraction < 1: responses from "
                "elsewhere would keep the old settings."
            )
        if "mix" in settings:
            source = self.stream.source
            if not isinstance(source, MixedSource):
                raise ValueError(
                    f"'mix' needs a source that mixes several; {type(source).__name__} does not."
                )
            source.check_mix(settings["mix"])
        group_size = settings.get("group_size", self.maker.group_size)
        if not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"group_size must be an integer >= 1, got {group_size!r}.")
        changes = {key: value for key, value in settings.items() if key in keys}
        return dataclasses.replace(self.maker.sampling, **changes), group_size
