"""Tools and environments: what answers the policy in the middle of a response."""

from typing import TYPE_CHECKING

from lightning_onpolicy._lazy import attach

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.tools.base import Environment as Environment
    from lightning_onpolicy.datamodules.tools.base import Observation as Observation
    from lightning_onpolicy.datamodules.tools.base import Segment as Segment
    from lightning_onpolicy.datamodules.tools.base import Tool as Tool
    from lightning_onpolicy.datamodules.tools.base import ToolError as ToolError
    from lightning_onpolicy.datamodules.tools.base import Transcript as Transcript
    from lightning_onpolicy.datamodules.tools.calculator import Calculator as Calculator
    from lightning_onpolicy.datamodules.tools.conversation import Conversation as Conversation
    from lightning_onpolicy.datamodules.tools.demonstrations import DemonstrationSource as DemonstrationSource
    from lightning_onpolicy.datamodules.tools.use import InlineTool as InlineTool
    from lightning_onpolicy.datamodules.tools.use import ToolUse as ToolUse

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Calculator": "calculator",
        "Conversation": "conversation",
        "DemonstrationSource": "demonstrations",
        "Environment": "base",
        "InlineTool": "use",
        "Observation": "base",
        "Segment": "base",
        "Tool": "base",
        "ToolError": "base",
        "ToolUse": "use",
        "Transcript": "base",
    },
)
