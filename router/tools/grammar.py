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

from router.grammar import ANY_OBJECT, HEADER, SPACING, check_schema
from router.reader import Reading
from router.tools.formats import MARKS, Marks, ToolFormat
from router.tools.schema import Tool
from router.tools.use import ToolUse

START = f"{HEADER}start: answer"
TEXT = "TEXT: /(.|\\n)*/"
BARE_TEXT = "BARE_TEXT: /([^{\\[ \\n\\t](.|\\n)*)?/"  # what would not be taken for a call

GAP = "GAP: /[\\r\\n]{0,4}/"  # behind reasoning: what is dropped with its mark (router/reasoning.py), and no more

SpecialId = Callable[[str], int | None]


def tools_grammar(use: ToolUse, tool_format: ToolFormat, special_id: SpecialId) -> str:
    """Of an answer that is bound, without its reasoning; not checked. `special_id` tells of a mark that is a special
    token, which no text can be. InvalidRequest names a schema that is too much of one. Not for the event loop."""
    for tool in use.callable:
        if tool.function.parameters and (use.must or tool.function.strict):
            check_schema(tool.function.parameters, f"tools.{use.offered.index(tool)}.function.parameters")
    words = _Words(MARKS[tool_format], special_id)
    answer = words.demanded(use) if use.must else words.free(use)
    return "\n".join([START, *answer, *words.calls(use), TEXT, BARE_TEXT]) + "\n"


def after_reasoning(grammar: str, reading: Reading, special_id: SpecialId) -> str:
    """The same after the reasoning that there may be, which it does not bind: where that ends is found by the marks,
    token by token, so wherever an answer goes on it is found again. A grammar that does not begin with START is the
    client's own: it is nested whole, so that no name in it can meet one of ours."""
    if reading.reasoning is None or not grammar:
        return grammar
    thought = _Words(MARKS[ToolFormat.HERMES], special_id).thought(reading)
    if grammar.startswith(START):
        text = [] if TEXT in grammar else [TEXT]
        return "\n".join([f"{HEADER}start: thought answer", *thought, *text]) + grammar.removeprefix(START)
    outer = "\n".join([f"{HEADER}start: thought @answer", *thought, TEXT])
    return json.dumps({"grammars": [{"lark_grammar": outer}, {"name": "answer", "lark_grammar": grammar}]})


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
            return ["thought: thinking GAP", GAP, thinking]
        opened = f"thought: ({self._mark(reading.reasoning.opener)} thinking GAP)?"
        return [opened, GAP, thinking]

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
        return f'call_{index}: {_text(head)} %json {json.dumps({**schema, "x-guidance": SPACING})} "}}"'

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
