"""Grammars of answers, as the API asks for them: `response_format` and `structured_outputs` become grammar text.

1. A JSON schema is walked first: what would take long, in the gateway or in an engine, is refused with its path.
2. Then llguidance compiles the grammar within its own limits, which do not bound its time: a gateway has it done by a
   process that can be killed (cluster/grammar_check.py). What it complains of is told with the field.
3. The text goes with the request (SamplingParams.grammar), and engine/grammar.py keeps the answer to it.

JSON is written as Python's json.dumps does, with one space after commas and colons and no other: an answer cannot run
on in white space. Texts are Lark, as https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md has it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Protocol

from llguidance import LLMatcher, regex_to_lark
from pydantic import JsonValue

from engine.errors import InvalidRequest
from engine.grammar import LIMITS, first_line
from router.errors import shown
from router.schema import ChatBody, CompletionBody
from router.structured import JsonObjectFormat, JsonSchemaFormat, StructuredOutputs

MAX_GRAMMAR_BYTES = 2**16
MAX_DEPTH = 64  # of JSON; each level of a schema is two
MAX_MEMBERS = 1000  # of one object or array: properties, the values of an enum (OpenAI's limit of these)
MAX_ALL_OF = 4  # automata of which a product is made
MAX_PATTERNS = 64
MAX_JOINED = 12  # limits of texts, in a schema where several may hold for one: the work doubles with each
MAX_PATTERN_CHARS = 512
MAX_REFS = 512
MAX_CHECKED = 64  # grammars that are known to be right
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT: dict[str, JsonValue] = {"type": "object"}
HEADER = "%llguidance {}\n"

TEXT_LIMITS = frozenset(("pattern", "format", "minLength", "maxLength"))
JOINTS = frozenset(("$ref", "anyOf", "oneOf"))

Path = tuple[str, ...]


class GrammarCheck(Protocol):
    async def problem_with(self, grammar: str) -> str:
        """Why engines could not keep an answer to it; empty: they can."""
        ...


class InThread:
    """Within llguidance's limits only: for who takes no grammars of strangers. Implements GrammarCheck."""

    async def problem_with(self, grammar: str) -> str:
        return await asyncio.to_thread(_problem_with, grammar)


async def answer_grammar(body: ChatBody | CompletionBody, check: GrammarCheck) -> str:
    """The grammar that a body asks for, checked; empty: none. InvalidRequest names the field at fault."""
    field, wanted = _wanted(body)
    if wanted is None:
        return ""
    if body.ignore_eos:
        raise InvalidRequest(f"'ignore_eos': an answer that keeps to '{field}' ends with it", param="ignore_eos")
    grammar, field = await asyncio.to_thread(_grammar_of, wanted)
    return await check_grammar(grammar, field, check)


def json_schema_grammar(schema: Mapping[str, JsonValue]) -> str:
    """The grammar of JSON that keeps to a schema (not checked)."""
    return f"{HEADER}start: answer\nanswer: %json {json.dumps({**schema, 'x-guidance': SPACING})}\n"


def check_schema(schema: Mapping[str, JsonValue], field: str) -> None:
    """InvalidRequest, naming the path below `field`, for what is too large, too deep or refers to elsewhere."""
    if len(json.dumps(schema)) > MAX_GRAMMAR_BYTES:
        raise _refusal(field, f"a schema has at most {MAX_GRAMMAR_BYTES} bytes")
    num_patterns = num_refs = num_limits = 0
    joins = False
    for path, value in _values(schema, (field,)):
        if len(path) > MAX_DEPTH:
            raise _refusal(field, f"a schema is at most {MAX_DEPTH} levels of JSON deep")
        if isinstance(value, dict | list) and len(value) > MAX_MEMBERS:
            raise _refusal(".".join(path), f"at most {MAX_MEMBERS} members are allowed")
        num_patterns += path[-1] in ("pattern", "patternProperties")
        num_refs += path[-1] == "$ref"
        num_limits += path[-1] in TEXT_LIMITS
        joins = joins or _joins(value)
        _check_value(path, value)
    if num_patterns > MAX_PATTERNS or num_refs > MAX_REFS:
        raise _refusal(field, f"at most {MAX_PATTERNS} patterns and {MAX_REFS} references are allowed")
    if joins and num_limits > MAX_JOINED:
        raise _refusal(field, f"at most {MAX_JOINED} patterns, formats and lengths are allowed beside allOf")


def _joins(value: JsonValue) -> bool:
    """Do limits of texts that stand in several places hold together here?"""
    if not isinstance(value, dict):
        return False
    return "allOf" in value or bool(TEXT_LIMITS & value.keys() and JOINTS & value.keys())


def _check_value(path: Path, value: JsonValue) -> None:
    field = ".".join(path)
    match path[-1], value:
        case "$ref" | "$dynamicRef", str() if not value.startswith("#"):
            raise _refusal(field, "only references within the schema are allowed")
        case "pattern", str() if len(value) > MAX_PATTERN_CHARS:
            raise _refusal(field, f"a pattern has at most {MAX_PATTERN_CHARS} characters")
        case "allOf", list() if len(value) > MAX_ALL_OF:
            raise _refusal(field, f"at most {MAX_ALL_OF} schemas can hold at once")
        case "x-guidance", _:
            raise _refusal(field, "options of the grammar's compiler are not the client's")


def _values(value: JsonValue | Mapping[str, JsonValue], path: Path) -> Iterator[tuple[Path, JsonValue]]:
    """Every value below one, with its path; no deeper than one beyond what is allowed."""
    stack: list[tuple[Path, JsonValue | Mapping[str, JsonValue]]] = [(path, value)]
    while stack:
        path, value = stack.pop()
        yield path, dict(value) if isinstance(value, Mapping) else value
        if len(path) <= MAX_DEPTH:
            members = (
                value.items() if isinstance(value, Mapping) else enumerate(value if isinstance(value, list) else ())
            )
            stack += [((*path, str(name)), member) for name, member in members]


@lru_cache(maxsize=MAX_CHECKED)
def _problem_with(grammar: str) -> str:
    is_error, words = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    return first_line(words[0]) if is_error else ""


async def check_grammar(grammar: str, field: str, check: GrammarCheck) -> str:
    """The grammar itself. InvalidRequest that names `field` if it cannot be compiled."""
    if len(grammar) > 2 * MAX_GRAMMAR_BYTES:
        raise _refusal(field, f"a grammar has at most {2 * MAX_GRAMMAR_BYTES} characters")
    if problem := await check.problem_with(grammar):
        raise _refusal(field, problem)
    return grammar


# --- what a body asks for -------------------------------------------------------------------------------------

Wanted = JsonObjectFormat | JsonSchemaFormat | StructuredOutputs


def _wanted(body: ChatBody | CompletionBody) -> tuple[str, Wanted | None]:
    """The field, and what it holds if it asks for anything."""
    response_format = body.response_format if isinstance(body, ChatBody) else None
    is_text = response_format is None or response_format.type == "text"
    if not is_text and body.structured_outputs is not None:
        raise InvalidRequest("'structured_outputs': 'response_format' says otherwise", param="structured_outputs")
    if response_format is None or response_format.type == "text":
        return "structured_outputs", body.structured_outputs
    return "response_format", response_format


def _grammar_of(wanted: Wanted) -> tuple[str, str]:
    """And the field that asks for it."""
    match wanted:
        case JsonObjectFormat():
            return json_schema_grammar(ANY_OBJECT), "response_format"
        case JsonSchemaFormat():
            return _of_schema(wanted.json_schema.schema_ or ANY_OBJECT, "response_format.json_schema.schema")
        case StructuredOutputs():
            return _of_extension(wanted)


def _of_schema(schema: Mapping[str, JsonValue], field: str) -> tuple[str, str]:
    check_schema(schema, field)
    return json_schema_grammar(schema), field


def _of_extension(wanted: StructuredOutputs) -> tuple[str, str]:
    if wanted.json_ is not None:
        return _of_schema(wanted.json_, "structured_outputs.json")
    if wanted.choice is not None:
        texts = " | ".join(map(_literal, wanted.choice))
        return f"{HEADER}start: answer\nanswer: {texts}\n", "structured_outputs.choice"
    if wanted.regex is not None:
        pattern = regex_to_lark(wanted.regex)
        return f"{HEADER}start: answer\nanswer: /{pattern}/\n", "structured_outputs.regex"
    field, text = "structured_outputs.grammar", wanted.grammar or ""
    if "%json" in text or text.lstrip().startswith("{"):
        raise _refusal(field, "only Lark is taken, without %json; schemas have a field of their own")
    return text, field


def _literal(text: str) -> str:
    """Lark's strings are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _refusal(field: str, words: str) -> InvalidRequest:
    field = shown(field)
    return InvalidRequest(f"'{field}': {words}", param=field)
