"""How the served model writes calls and reasoning, and what its chat template knows of them.

Found from the text of its template when the gateway starts, or said in the config (`model.tool_format`,
`model.reasoning`). A template that shows tools in a format that we cannot read is not shown them: then, as for one that
knows no tools, `tools/prompt.py` puts them into words.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.reader import Reading
from router.reasoning import STYLES, ReasoningMarks, opens_reasoning, reasoning_marks_of
from router.tools.formats import MARKS, SEPARATORS, ToolFormat, tool_format_of
from router.tools.use import ToolUse


@dataclass(frozen=True, slots=True)
class ChatStyle:
    tool_format: ToolFormat = ToolFormat.HERMES
    reasoning: ReasoningMarks | None = None
    shows_tools: bool = False  # the template gets the tools
    shows_calls: bool = False  # it gets messages with calls and with their results

    @property
    def has_short_ids(self) -> bool:
        """Does the template take no ids of calls but Mistral's?"""
        return self.tool_format is ToolFormat.MISTRAL

    @property
    def marks(self) -> tuple[str, ...]:
        """All that may have to be read out of an answer, even where it is a special token."""
        calls = MARKS[self.tool_format]
        separators = tuple(SEPARATORS) if calls.has_names else ()
        reasoning = (self.reasoning.opener, self.reasoning.closer) if self.reasoning is not None else ()
        return tuple(filter(None, (calls.opener, calls.closer, *separators, *reasoning)))


PLAIN_STYLE = ChatStyle()


def chat_style(template: str, knows_tools: bool, tool_format: str = "auto", reasoning: str = "auto") -> ChatStyle:
    """`template`: all its text. `tool_format` is auto or a ToolFormat's, `reasoning` auto, none or one of STYLES."""
    found = tool_format_of(template) if tool_format == "auto" else ToolFormat(tool_format)
    marks = reasoning_marks_of(template) if reasoning == "auto" else STYLES.get(reasoning)
    shows_tools = knows_tools and found is not None
    return ChatStyle(found or ToolFormat.HERMES, marks, shows_tools, shows_tools and "tool_calls" in template)


def reading_of(use: ToolUse, style: ChatStyle, prompt: str) -> Reading:
    """How the answers to this prompt are to be read."""
    is_open = style.reasoning is not None and opens_reasoning(prompt, style.reasoning)
    calls = MARKS[style.tool_format] if use.callable else None
    return Reading(style.reasoning, is_open, calls, use.names, use.is_single)
