"""The grammar of an answer that must call a function, or whose calls keep to a schema: Lark, as llguidance reads it.

1. Where a call is demanded, the answer is calls and nothing else, after its reasoning. All arguments keep to their
   schema.
2. Where functions are only strict, the answer is text until a call begins; from there on it is that call, and the
   arguments of those that are strict keep to their schema.

Source of the syntax: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import JsonValue

from router.reader import Reading
from router.tools.formats import MARKS, Marks, ToolFormat
from router.tools.schema import Tool
from router.tools.use import ToolUse

ANY_OBJECT: dict[str, JsonValue] = {"type": "object"}
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps has it
TEXT = "TEXT: /(.|\\n)*/"
BARE_TEXT = "BARE_TEXT: /([^{\\[ \\n\\t](.|\\n)*)?/"  # what would not be taken for a call

SpecialId = Callable[[str], int | None]


def tools_grammar(use: ToolUse, tool_format: ToolFormat, reading: Reading, special_id: SpecialId) -> str:
    """Empty where the answer is free. `special_id` tells of a mark that is a special token, which no text can be."""
    if not use.must and not use.has_strict:
        return ""
    words = _Words(MARKS[tool_format], special_id)
    answer = words.demanded(use) if use.must else words.free(use)
    rules = [*words.thought(reading), *answer, *words.calls(use), TEXT, BARE_TEXT]
    return (
        "\n".join(["%llguidance {}", "start: thought answer" if reading.reasoning else "start: answer", *rules]) + "\n"
    )


@dataclass(frozen=True, slots=True)
class _Words:
    """Rules in the words of one format."""

    marks: Marks
    special_id: SpecialId

    def thought(self, reading: Reading) -> list[str]:
        """Reasoning, if the prompt has opened it or the model opens it."""
        if reading.reasoning is None:
            return []
        thinking = self._up_to("thinking", reading.reasoning.closer)
        if reading.is_open:
            return ["thought: thinking SPACE", "SPACE: /\\s*/", thinking]
        opened = f"thought: ({self._mark(reading.reasoning.opener)} thinking SPACE)?"
        return [opened, "SPACE: /\\s*/", thinking]

    def demanded(self, use: ToolUse) -> list[str]:
        marks = self.marks
        if marks.closer:
            more = "" if use.is_single else ' ("\\n" marked)*'
            return [
                f"answer: marked{more}",
                f'marked: {self._mark(marks.opener)} "\\n" call "\\n" {_text(marks.closer)}',
            ]
        if marks.has_names:
            return [f"answer: {self._mark(marks.opener)} list", self._list(use)]
        return ["answer: bare", self._bare(use)]

    def free(self, use: ToolUse) -> list[str]:
        marks = self.marks
        if marks.bare:
            return ["answer: BARE_TEXT | bare", self._bare(use)]
        calls = f'"\\n" call "\\n" {_text(marks.closer)}' if marks.closer else "list"
        rules = ["answer: (before calls)* TEXT", f"calls: {calls}", self._up_to("before", marks.opener)]
        return rules if marks.closer else [*rules, self._list(use)]

    def calls(self, use: ToolUse) -> list[str]:
        """One call of any function, in JSON."""
        rules = [self._call(index, tool, use.must) for index, tool in enumerate(use.callable)]
        return ["call: " + " | ".join(f"call_{index}" for index in range(len(rules))), *rules]

    def _call(self, index: int, tool: Tool, must: bool) -> str:
        function = tool.function
        keeps = must or function.strict
        schema = (function.parameters or ANY_OBJECT) if keeps else ANY_OBJECT
        head = f'{{"name": {json.dumps(function.name)}, "{self.marks.arguments}": '
        return f'call_{index}: {_text(head)} %json {json.dumps(schema | {"x-guidance": SPACING})} "}}"'

    def _list(self, use: ToolUse) -> str:
        return 'list: "[" call "]"' if use.is_single else 'list: "[" call (", " call)* "]"'

    def _bare(self, use: ToolUse) -> str:
        if use.is_single:
            return "bare: call"
        if self.marks.opener:
            return 'bare: call ("; " call)*'
        return 'bare: call | "[" call (", " call)* "]"'

    def _up_to(self, rule: str, mark: str) -> str:
        """Text to the mark, and the mark: not further than the first one."""
        if self.special_id(mark) is not None:
            return f"{rule}: TEXT {self._mark(mark)}"
        return f"{rule}[lazy]: TEXT {_text(mark)}"

    def _mark(self, mark: str) -> str:
        token_id = self.special_id(mark)
        return _text(mark) if token_id is None else f"<[{token_id}]>"


def _text(text: str) -> str:
    return json.dumps(text)
