"""Which functions an answer may call, must call, or not: what a chat body says of them in one record.

The older fields `functions` and `function_call` say the same in other words; answers are then in those words, too, and
have one call at most.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.tools.schema import Tool, ToolChoice, chosen_names


@dataclass(frozen=True, slots=True)
class ToolUse:
    """`offered` are shown to the model, `callable` may be called, at least one of them if it `must`."""

    offered: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    must: bool = False
    is_single: bool = False
    is_legacy: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool.function.name for tool in self.callable)

    @property
    def is_bound(self) -> bool:
        """Is there anything about calls that the answer has to keep to?"""
        return self.must or any(tool.function.strict for tool in self.callable)


NO_TOOLS = ToolUse()


def tool_use(tools: tuple[Tool, ...], choice: ToolChoice | None, is_parallel: bool, is_legacy: bool) -> ToolUse:
    """With tool_choice none the model is not shown any function, so that it is not tempted."""
    kind = choice.type if choice is not None else "auto"
    if not tools or kind == "none":
        return NO_TOOLS
    named = chosen_names(choice) if choice is not None else ()
    may = tuple(tool for tool in tools if not named or tool.function.name in named)
    allowed = choice.allowed_tools if choice is not None else None
    must = kind in ("required", "function") or (allowed is not None and allowed.mode == "required")
    return ToolUse(tools, may, must, is_single=not is_parallel or kind == "function" or is_legacy, is_legacy=is_legacy)
