"""Calls found in text, format by format; the same ones however the text is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.parts import Call, CallStart, Part, Spoken, joined, spoken
from router.tools.formats import MARKS, ToolFormat, tool_format_of
from router.tools.parser import CallParser

NAMES = ("weather", "add")
PARIS = '{"city": "Paris"}'
CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
LLAMA = '{"name": "weather", "parameters": {"city": "Paris"}}'
HERMES, LLAMA3, MISTRAL, JSON = ToolFormat

GOLDEN = [
    # what it is, the format, the text, the content, the calls
    ("one call", HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [("weather", PARIS)]),
    ("text before", HERMES, f"Let me see.\n\n<tool_call>{CALL}</tool_call>", "Let me see.", [("weather", PARIS)]),
    ("text between and after", HERMES, f"a <tool_call>{CALL}</tool_call>\nb <tool_call>{CALL}</tool_call>\n c\n",
     "a\nb\n c", [("weather", PARIS)] * 2),
    ("two calls", HERMES, f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\n", "",
     [("weather", PARIS)] * 2),
    ("two in one mark", HERMES, f"<tool_call>\n{CALL}\n{CALL}</tool_call>", "", [("weather", PARIS)] * 2),
    ("a list in one mark", HERMES, f"<tool_call>[{CALL}, {CALL}]</tool_call>", "", [("weather", PARIS)] * 2),
    ("no closing mark", HERMES, f"<tool_call>\n{CALL}", "", [("weather", PARIS)]),
    ("no closing mark, then text", HERMES, f"<tool_call>{CALL} Done", "Done", [("weather", PARIS)]),
    ("keys in another order", HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "",
     [("add", '{"a": 1}')]),
    ("more keys", HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}, "id": {"x": "}"}}</tool_call>', "",
     [("add", '{"a": 1}')]),
    ("arguments as text", HERMES, r'<tool_call>{"name": "add", "arguments": "{\"a\": 1}"}</tool_call>', "",
     [("add", '{"a": 1}')]),
    ("no arguments", HERMES, '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("empty arguments", HERMES, '<tool_call>{"name": "add", "arguments": {}}</tool_call>', "", [("add", "{}")]),
    ("brackets and marks in strings", HERMES,
     r'<tool_call>{"name": "add", "arguments": {"a": "}\"</tool_call>{", "b": [{}, [1]]}}</tool_call>', "",
     [("add", r'{"a": "}\"</tool_call>{", "b": [{}, [1]]}')]),
    ("a name with an escape", HERMES, r'<tool_call>{"name": "\u0061dd", "arguments": {}}</tool_call>', "",
     [("add", "{}")]),
    ("cut in its arguments", HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 12', "", [("add", '{"a": 12')]),
    ("cut in its closing mark", HERMES, f"<tool_call>\n{CALL}\n</tool", "", [("weather", PARIS)]),
    ("arguments never closed", HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1</tool_call> more', " more",
     [("add", '{"a": 1')]),
    ("less-than in arguments", HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1 </t}}</tool_call>', "",
     [("add", '{"a": 1 </t}')]),
    ("cut before its name", HERMES, 'x <tool_call>\n{"name": "ad', 'x <tool_call>\n{"name": "ad', []),
    ("no JSON", HERMES, "x <tool_call>hello</tool_call> y", "x <tool_call>hello</tool_call> y", []),
    ("broken JSON", HERMES, '<tool_call>{"name": add}</tool_call>!', '<tool_call>{"name": add}</tool_call>!', []),
    ("never closed", HERMES, '<tool_call>{"x": 1</tool_call>!', '<tool_call>{"x": 1</tool_call>!', []),
    ("an unknown function", HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
    ("broken, then whole", HERMES, f"<tool_call>no</tool_call>\n<tool_call>{CALL}</tool_call>",
     "<tool_call>no</tool_call>", [("weather", PARIS)]),
    ("only text", HERMES, "1 < 2 <tool> <tool_cal", "1 < 2 <tool> <tool_cal", []),
    ("only white space", HERMES, " \n\n", " \n\n", []),
    ("long white space", HERMES, "a" + " " * 200 + "b" + "\n" * 100, "a" + " " * 200 + "b" + "\n" * 100, []),
    ("bare JSON is text there", HERMES, CALL, CALL, []),
    ("one call", LLAMA3, LLAMA, "", [("weather", PARIS)]),
    ("after its mark", LLAMA3, f"\n<|python_tag|>{LLAMA}", "", [("weather", PARIS)]),
    ("several", LLAMA3, f"{LLAMA}; {LLAMA};{LLAMA}", "", [("weather", PARIS)] * 3),
    ("with its type", LLAMA3, '{"type": "function", "name": "add", "parameters": {"a": "1"}}', "",
     [("add", '{"a": "1"}')]),
    ("text, then its mark", LLAMA3, f"So: <|python_tag|>{LLAMA}", "So:", [("weather", PARIS)]),
    ("code after its mark", LLAMA3, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("JSON that calls nothing", LLAMA3, '{"answer": {"city": "Paris"}}', '{"answer": {"city": "Paris"}}', []),
    ("text with JSON in it", LLAMA3, f"I say {LLAMA}", f"I say {LLAMA}", []),
    ("a list", MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", [("weather", PARIS)] * 2),
    ("text before a list", MISTRAL, f"Well. [TOOL_CALLS] [{CALL}]", "Well.", [("weather", PARIS)]),
    ("a name outside", MISTRAL, f"[TOOL_CALLS]weather{PARIS}", "", [("weather", PARIS)]),
    ("names and marks", MISTRAL, f"[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{{}}", "",
     [("weather", PARIS), ("add", "{}")]),
    ("an unknown name", MISTRAL, "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}", []),
    ("an empty list", MISTRAL, "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    ("an object", JSON, f" {CALL}\n", "", [("weather", PARIS)]),
    ("a list", JSON, f"[{CALL},\n{CALL}]", "", [("weather", PARIS)] * 2),
    ("a list of numbers", JSON, "[1, 2]", "[1, 2]", []),
    ("in OpenAI's words", JSON, f'[{{"type": "function", "function": {CALL}}}]', "", [("weather", PARIS)]),
    ("only text", JSON, "hello {", "hello {", []),
]  # fmt: skip


def parts_of(tool_format: ToolFormat, pieces: list[str], is_single: bool = False) -> tuple[Part, ...]:
    parser = CallParser(MARKS[tool_format], NAMES, is_single)
    return joined([part for piece in pieces for part in parser.push(piece)] + [*parser.flush()])


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@pytest.mark.parametrize(
    ("tool_format", "text", "content", "calls"), [case[1:] for case in GOLDEN], ids=[f"{c[1]}: {c[0]}" for c in GOLDEN]
)
def test_calls_are_told_from_content(
    tool_format: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    expected = Spoken(content, "", tuple(Call(*call) for call in calls))
    assert spoken(parts_of(tool_format, [text])) == expected
    assert parts_of(tool_format, list(text)) == parts_of(tool_format, [text])


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", "weather", "\n", " ", "hi", "<", "[",
     "]", "{", "}", ";", ",", '"', "\\", CALL, LLAMA, PARIS, '{"name": "add", "arguments": {', '"a": 1', "</tool", "é"]
)  # fmt: skip


@given(
    tool_format=st.sampled_from([*ToolFormat]),
    text=st.lists(FRAGMENTS, max_size=12).map("".join),
    sizes=st.lists(st.integers(0, 9), max_size=40),
    is_single=st.booleans(),
)
def test_the_same_parts_come_out_however_the_text_is_cut(
    tool_format: ToolFormat, text: str, sizes: list[int], is_single: bool
) -> None:
    assert parts_of(tool_format, cut(text, sizes), is_single) == parts_of(tool_format, [text], is_single)


@given(tool_format=st.sampled_from([*ToolFormat]), text=st.lists(FRAGMENTS, max_size=8).map("".join))
def test_where_nothing_is_called_nothing_is_lost(tool_format: ToolFormat, text: str) -> None:
    whole = spoken(parts_of(tool_format, [text]))
    if not whole.calls:
        assert whole.content == text


def test_arguments_leave_as_they_come() -> None:
    parser = CallParser(MARKS[ToolFormat.HERMES], NAMES)
    said = [parser.push(piece) for piece in ('<tool_call>{"name": "add", ', '"arguments": {"a"', ": 1", "}}</tool")]
    assert said[0] == ()
    assert said[1][0] == CallStart(0, "add")
    texts = ["".join(getattr(part, "text", "") for part in parts) for parts in said]
    assert texts == ["", '{"a"', ": 1", "}"]


def test_of_a_single_call_the_others_are_dropped() -> None:
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>."
    assert spoken(parts_of(HERMES, [text], is_single=True)) == Spoken(".", "", (Call("weather", PARIS),))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("[TOOL_CALLS]", MISTRAL),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', LLAMA3),
        ("<tool_call>\n<function=f>", None),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_a_format_is_found_in_the_templates_text(template: str | None, expected: ToolFormat | None) -> None:
    assert tool_format_of(template) is expected


def test_deep_nesting_is_text() -> None:
    deep = '<tool_call>{"x": ' + '{"x": ' * 100_000 + "1" + "}" * 100_001
    assert spoken(parts_of(HERMES, [deep])).content == deep
    assert json.loads(spoken(parts_of(HERMES, [f"<tool_call>{CALL}"])).calls[0].arguments) == {"city": "Paris"}
