"""What the API may ask of an answer's form: the grammar it becomes, and what is refused before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from engine.errors import InvalidRequest
from router.grammar import InThread, answer_grammar, check_grammar, check_schema
from router.schema import ChatBody, CompletionBody
from tests.cluster.tiny_model import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCABULARY = LLTokenizer(TOKENIZER.to_str(), eos_token=[EOS])
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}

CHECK = InThread()


def chat(**fields: Any) -> ChatBody:
    return ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


def of_schema(schema: dict[str, Any]) -> ChatBody:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema}})


def fits(grammar: str, text: str) -> bool:
    matcher = LLMatcher(VOCABULARY, grammar, log_level=0)
    return matcher.consume_tokens(TOKENIZER.encode(text).ids) and matcher.is_accepting()


async def refusal(body: ChatBody) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        await answer_grammar(body, CHECK)
    assert caught.value.param is not None and f"'{caught.value.param}'" in caught.value.message
    return caught.value


async def test_text_is_free() -> None:
    assert (
        await answer_grammar(chat(), CHECK) == await answer_grammar(chat(response_format={"type": "text"}), CHECK) == ""
    )
    assert await answer_grammar(CompletionBody.model_validate({"model": "m", "prompt": "x"}), CHECK) == ""


async def test_json_is_written_in_one_way() -> None:
    for body in (of_schema(POINT), chat(structured_outputs={"json": POINT})):
        grammar = await answer_grammar(body, CHECK)
        assert fits(grammar, '{"x": 12}')
        assert not any(fits(grammar, text) for text in ('{"x":1}', '{"x": "1"}', '{ "x": 1}', "{}", '{"x": 1} '))


async def test_without_a_schema_it_is_any_object() -> None:
    named = {"type": "json_schema", "json_schema": {"name": "it"}}
    for wanted in ({"type": "json_object"}, named):
        grammar = await answer_grammar(chat(response_format=wanted), CHECK)
        assert fits(grammar, '{"a": [1, null, {"é": "\\n"}]}') and not fits(grammar, "[1]")


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        ({"choice": ["ja", 'n"ein']}, 'n"ein', "nein"),
        ({"regex": "[0-9]{2}/[a-z]+"}, "12/ab", "12ab"),
        ({"grammar": 'start: "a" B\nB: /b+/'}, "abb", "a"),
    ],
)
async def test_other_forms(wanted: dict[str, Any], good: str, bad: str) -> None:
    body = CompletionBody.model_validate({"model": "m", "prompt": "x", "structured_outputs": wanted})
    grammar = await answer_grammar(body, CHECK)
    assert fits(grammar, good) and not fits(grammar, bad)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def overlapping(index: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^.*{'ab' * index}.*$"}


def chained(depth: int) -> dict[str, Any]:
    schema = overlapping(0)
    for index in range(1, depth):
        schema = overlapping(index) | {"anyOf": [schema]}
    return schema


BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "deep": (nested(70), ""),
    "long": ({"description": "x" * 2**17}, ""),
    "many values": ({"enum": [f"v{index}" for index in range(1001)]}, ".enum"),
    "many patterns at once": ({"allOf": [overlapping(index) for index in range(60)]}, ".allOf"),
    "many by nesting": ({"allOf": [{"allOf": [overlapping(i + 4 * j) for i in range(4)]} for j in range(4)]}, ""),
    "many by a chain": (chained(30), ""),
    "a long pattern": ({"properties": {"a": {"pattern": "a" * 600}}}, ".properties.a.pattern"),
    "elsewhere": ({"properties": {"a": {"$ref": "http://127.0.0.1/x"}}}, ".properties.a.$ref"),
    "options of the compiler": ({"x-guidance": {"lenient": True}}, ".x-guidance"),
    "exploding alternatives": ({"allOf": [{"anyOf": [
        {"properties": {f"a{i}{j}": {"const": 1}}} for j in range(30)]} for i in range(4)]}, ""),
    "no schema": ({"type": "foo"}, ""),
    "not known": ({"unevaluatedItems": False, "not": {}}, ""),
    "no pattern": ({"type": "string", "pattern": "(a"}, ""),
    "looks ahead": ({"type": "string", "pattern": "^(?=a)b"}, ""),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "path"), BOMBS.values(), ids=BOMBS)
async def test_schemas_that_are_refused(schema: dict[str, Any], path: str) -> None:
    error = await refusal(of_schema(schema))
    assert error.param == f"response_format.json_schema.schema{path}" and len(error.message) < 500


@pytest.mark.parametrize("schema", [nested(25), {"$ref": "#"}, {"enum": [f"v{i}" for i in range(1000)]}, chained(4)])
async def test_schemas_that_are_large_and_taken(schema: dict[str, Any]) -> None:
    assert await answer_grammar(of_schema(schema), CHECK)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(structured_outputs={"regex": "(a"}), "structured_outputs.regex"),
        (chat(structured_outputs={"grammar": "start: b"}), "structured_outputs.grammar"),
        (chat(structured_outputs={"grammar": 'start: %json {"type": "string"}'}), "structured_outputs.grammar"),
        (chat(structured_outputs={"json": {"type": "foo"}}), "structured_outputs.json"),
        (chat(structured_outputs={"regex": "a"}, response_format={"type": "json_object"}), "structured_outputs"),
        (chat(ignore_eos=True, response_format={"type": "json_object"}), "ignore_eos"),
    ],
    ids=["regex", "lark", "schema inside", "schema", "two forms", "no end"],
)
async def test_what_else_is_refused(body: ChatBody, param: str) -> None:
    assert (await refusal(body)).param == param


async def test_part_by_part_for_who_makes_grammars() -> None:
    assert await check_grammar('start: "a"', "tools", CHECK) == 'start: "a"'
    with pytest.raises(InvalidRequest, match="'tools'"):
        await check_grammar("start: b", "tools", CHECK)
    with pytest.raises(InvalidRequest, match=r"'tools.0.enum'"):
        check_schema({"enum": list(range(2000))}, "tools.0")
