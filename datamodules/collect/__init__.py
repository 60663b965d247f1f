"""Teacher text from an OpenAI-compatible API, asked for once and kept in files: ``onpolicy collect``."""

from typing import TYPE_CHECKING

from lightning_onpolicy._lazy import attach

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.collect.command import collect as collect
    from lightning_onpolicy.datamodules.collect.settings import CollectSettings as CollectSettings

__getattr__, __dir__, __all__ = attach(__name__, {"CollectSettings": "settings", "collect": "command"})
