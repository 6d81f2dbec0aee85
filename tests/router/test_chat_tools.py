"""Tools through the HTTP face: what the model is shown, what the client gets, whole and streamed, and the grammar."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage

from engine.types import FinishReason
from router.chat_style import ChatStyle
from router.reasoning import STYLES
from router.tools.formats import ToolFormat
from tests.router.fakes import CHAT, EOS, FakeGenerator, chat, events, make_client, say, say_with_logprobs
from tests.router.test_gateway_answers import check_schema

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": CITY}},
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
]
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
KNOWING = ChatStyle(shows_tools=True, shows_calls=True)
THINKING = replace(KNOWING, reasoning=STYLES["think"])


async def ask(
    text: str, style: ChatStyle = KNOWING, size: int = 3, finish: FinishReason = FinishReason.STOP, **fields: Any
) -> tuple[FakeGenerator, httpx.Response]:
    generator = FakeGenerator(say(text, size, finish))
    body = {"tools": TOOLS, **fields}
    async with make_client(generator, style) as client:
        return generator, await client.post(
            CHAT, json=chat(**{key: body[key] for key in body if body[key] is not None})
        )


async def complete(text: str, style: ChatStyle = KNOWING, **fields: Any) -> ChatCompletion:
    reply = (await ask(text, style, **fields))[1]
    check_schema("CreateChatCompletionResponse", reply.json())
    return ChatCompletion.model_validate(reply.json())


async def stream(text: str, style: ChatStyle = KNOWING, **fields: Any) -> list[ChatCompletionChunk]:
    reply = (await ask(text, style, stream=True, **fields))[1]
    check_schema("CreateChatCompletionStreamResponse", *events(reply))
    return [ChatCompletionChunk.model_validate(event) for event in events(reply)]


def put_together(chunks: list[ChatCompletionChunk]) -> dict[str, object]:
    """A message out of its deltas, as clients do it."""
    said: dict[str, str] = {"content": "", "reasoning": "", "reasoning_content": ""}
    calls: list[dict[str, str]] = []
    for chunk in chunks:
        for choice in chunk.choices:
            for field in said:
                said[field] += getattr(choice.delta, field, None) or ""
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                if call.index == len(calls):
                    assert call.id and call.type == "function" and call.function.name
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                else:
                    assert call.index == len(calls) - 1 and call.id is None and call.function.name is None
                calls[call.index]["arguments"] += call.function.arguments or ""
    return {**said, "calls": calls}


def taken_apart(message: ChatCompletionMessage) -> dict[str, object]:
    calls = [
        {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
        for call in message.tool_calls or ()
        if call.type == "function"
    ]
    extra = {field: getattr(message, field, None) or "" for field in ("reasoning", "reasoning_content")}
    return {"content": message.content or "", **extra, "calls": calls}


async def test_a_call_is_told_in_the_apis_words() -> None:
    (choice,) = (await complete(f"I ask.\n{CALL}")).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I ask."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})


async def test_without_text_beside_it_the_content_is_null() -> None:
    assert (await complete(CALL)).choices[0].message.content is None


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "style"),
    [
        (f"I ask.\n{CALL}\n{CALL}", KNOWING),
        (f"<think>\nhm\n</think>\n\nI ask.{CALL}", THINKING),
        ("<think>hm", THINKING),
        ("<tool_call>nonsense</tool_call>", KNOWING),
        (f"[TOOL_CALLS]weather[ARGS]{PARIS}", replace(KNOWING, tool_format=ToolFormat.MISTRAL)),
        ('{"name": "weather", "parameters": {"city": "Paris"}}', replace(KNOWING, tool_format=ToolFormat.LLAMA3)),
        (f'[{{"name": "weather", "arguments": {PARIS}}}]', replace(KNOWING, tool_format=ToolFormat.JSON)),
        ("plain", KNOWING),
    ],
)
async def test_a_stream_put_together_is_the_whole_answer(text: str, style: ChatStyle, size: int) -> None:
    whole = (await complete(text, style, size=size)).choices[0]
    chunks = await stream(text, style, size=size, stream_options={"include_usage": True})
    assert put_together(chunks) == taken_apart(whole.message)
    assert [one.finish_reason for chunk in chunks for one in chunk.choices if one.finish_reason] == [
        whole.finish_reason
    ]
    assert chunks[-1].usage == (await complete(text, style, size=size)).usage


async def test_a_call_that_is_cut_ends_for_its_length() -> None:
    (choice,) = (await complete(CALL[:50], finish=FinishReason.LENGTH)).choices
    assert choice.finish_reason == "length"
    assert taken_apart(choice.message)["calls"]


async def test_no_mark_of_a_call_is_ever_content() -> None:
    chunks = await stream(f"a{CALL}b{CALL}", size=1)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == "ab" and not any("<" in text for text in texts)


async def test_of_calls_that_may_not_be_parallel_there_is_one() -> None:
    (choice,) = (await complete(CALL + CALL, parallel_tool_calls=False)).choices
    assert len(choice.message.tool_calls or ()) == 1


async def test_the_older_fields_get_answers_in_the_older_words() -> None:
    functions = [tool["function"] for tool in TOOLS]
    (choice,) = (await complete(CALL, tools=None, functions=functions)).choices
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None
    assert choice.message.function_call is not None
    assert (choice.message.function_call.name, choice.message.function_call.arguments) == ("weather", PARIS)
    deltas = [one.choices[0].delta.function_call for one in await stream(CALL, tools=None, functions=functions)]
    said = [delta for delta in deltas if delta is not None]
    assert said[0].name == "weather" and "".join(one.arguments or "" for one in said) == PARIS


async def test_logprobs_of_all_tokens_are_told_beside_calls() -> None:
    generator = FakeGenerator(say_with_logprobs(CALL, 4))
    async with make_client(generator, KNOWING) as client:
        reply = await client.post(CHAT, json=chat(tools=TOOLS, logprobs=True, stream=True))
    told = [one["logprobs"] for event in events(reply) for one in event["choices"] if one["logprobs"]]
    assert "".join(token["token"] for one in told for token in one["content"]) == CALL


# --- what the model is shown --------------------------------------------------------------------------------------


async def prompt_of(style: ChatStyle, **fields: Any) -> str:
    generator, reply = await ask("x", style, **fields)
    assert reply.status_code == 200, reply.text
    return bytes(generator.requests[0].prompt_ids).decode()


async def test_a_template_that_knows_tools_gets_them() -> None:
    shown = await prompt_of(KNOWING)
    assert json.loads(shown[1 : shown.index("][user]")]) == TOOLS


async def test_another_one_gets_them_in_words_after_its_system_message() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    shown = await prompt_of(ChatStyle(), messages=messages)
    assert shown.startswith("[system]Be kind.\n\nYou may call functions") and shown.endswith("[user]hi[assistant]")
    assert json.dumps(TOOLS[0]) in shown and "<tool_call>" in shown


async def test_with_tool_choice_none_the_model_is_shown_none_and_nothing_is_read_as_a_call() -> None:
    assert await prompt_of(KNOWING, tool_choice="none") == "[user]hello[assistant]"
    (choice,) = (await complete(CALL, tool_choice="none")).choices
    assert (choice.message.content, choice.finish_reason) == (CALL, "stop")


HISTORY = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": PARIS}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "sun"},
]  # fmt: skip


async def test_earlier_calls_go_to_a_template_that_knows_them_as_objects() -> None:
    shown = await prompt_of(KNOWING, messages=HISTORY, tools=None)
    function = {"name": "weather", "arguments": {"city": "Paris"}}
    assert json.dumps([{"id": "c1", "type": "function", "function": function}]) in shown
    assert shown.endswith("[tool]sun[assistant]")


async def test_earlier_calls_go_to_another_template_as_the_model_would_write_them() -> None:
    shown = await prompt_of(ChatStyle(), messages=HISTORY, tools=None)
    assert shown == f"[user]hi[assistant]{CALL}[user]<tool_response>\nsun\n</tool_response>[assistant]"


async def test_mistrals_template_gets_the_ids_that_it_takes() -> None:
    mistral = replace(KNOWING, tool_format=ToolFormat.MISTRAL)
    first = (await complete("[TOOL_CALLS]add[ARGS]{}", mistral)).choices[0].message.tool_calls
    assert first is not None and len(first[0].id) == 9 and first[0].id.isalnum()
    shown = await prompt_of(mistral, messages=HISTORY, tools=None)
    assert '"id": "c1"' not in shown


async def test_arguments_that_the_model_wrote_badly_can_be_sent_back() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city'}}
    history = [HISTORY[0], {"role": "assistant", "tool_calls": [call]}]
    assert '"arguments": "{\\"city"' in await prompt_of(KNOWING, messages=history)


async def test_an_answer_with_calls_can_be_sent_back_as_it_is() -> None:
    message = (await ask(f"<think>hm</think>{CALL}", THINKING))[1].json()["choices"][0]["message"]
    assert await prompt_of(THINKING, messages=[HISTORY[0], message])


# --- the grammar --------------------------------------------------------------------------------------------------


class _Bytes:
    """The fake tokenizer, as llguidance wants it."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<s>", b"</s>"]  # noqa: RUF012 - llguidance reads it
    special_token_ids = [256, EOS]  # noqa: RUF012

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


def keeps_to(grammar: str, text: str) -> bool:
    matcher = LLMatcher(TOKENIZER, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


async def grammar_of(style: ChatStyle = KNOWING, **fields: Any) -> str:
    generator, reply = await ask("x", style, **fields)
    assert reply.status_code == 200, reply.text
    return generator.requests[0].sampling.grammar


def named(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


ADD = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'


async def test_an_answer_is_free_unless_a_call_is_demanded_or_a_function_strict() -> None:
    assert await grammar_of() == "" and await grammar_of(tool_choice="auto") == ""
    assert await grammar_of(tools=None) == ""


async def test_a_demanded_call_is_one_that_keeps_to_its_schema() -> None:
    grammar = await grammar_of(tool_choice="required")
    assert keeps_to(grammar, CALL) and keeps_to(grammar, ADD) and keeps_to(grammar, f"{CALL}\n{ADD}")
    assert not keeps_to(grammar, "hello") and not keeps_to(grammar, CALL.replace("city", "town"))
    assert not keeps_to(await grammar_of(tool_choice="required", parallel_tool_calls=False), f"{CALL}\n{ADD}")


async def test_a_named_function_is_the_one_that_is_called_once() -> None:
    grammar = await grammar_of(tool_choice=named("add"))
    assert keeps_to(grammar, ADD)
    assert not keeps_to(grammar, CALL) and not keeps_to(grammar, f"{ADD}\n{ADD}")


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_of_allowed_tools_the_others_are_no_calls(mode: str) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named("add")]}}
    grammar = await grammar_of(tool_choice=choice)
    assert (not grammar) if mode == "auto" else (keeps_to(grammar, ADD) and not keeps_to(grammar, CALL))
    assert (await complete(CALL, tool_choice=choice)).choices[0].message.content == CALL
    assert json.dumps(TOOLS[0]) in await prompt_of(ChatStyle(), tool_choice=choice)


async def test_reasoning_may_come_before_a_demanded_call() -> None:
    grammar = await grammar_of(THINKING, tool_choice="required")
    assert keeps_to(grammar, CALL) and keeps_to(grammar, f"<think>\nhm\n</think>\n\n{CALL}")
    opened = await grammar_of(THINKING, tool_choice="required", chat_template_kwargs={"ends_with": "<think>\n"})
    assert keeps_to(opened, f"hm\n</think>\n\n{CALL}") and not keeps_to(opened, CALL)


async def test_only_the_calls_of_strict_functions_keep_to_their_schema_where_text_may_be() -> None:
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    grammar = await grammar_of(tools=tools)
    assert keeps_to(grammar, "hello <tool> ") and keeps_to(grammar, f"I ask. {CALL} and {ADD}")
    assert not keeps_to(grammar, CALL.replace("city", "town")) and not keeps_to(grammar, "<tool_call>no")


@pytest.mark.parametrize("tool_format", [*ToolFormat])
@pytest.mark.parametrize("is_strict", [True, False])
async def test_what_a_grammar_asks_for_is_read_as_a_call(tool_format: ToolFormat, is_strict: bool) -> None:
    """The words of each format, as they are asked for and as they are read."""
    call = '{"name": "weather", "arguments": {"city": "Paris"}}'
    text = {
        ToolFormat.HERMES: CALL,
        ToolFormat.LLAMA3: call.replace("arguments", "parameters"),
        ToolFormat.MISTRAL: f"[TOOL_CALLS][{call}]",
        ToolFormat.JSON: call,
    }[tool_format]
    style = replace(KNOWING, tool_format=tool_format)
    fields = {"tools": [{"type": "function", "function": {**TOOLS[0]["function"], "strict": is_strict}}]}
    fields |= {} if is_strict else {"tool_choice": "required"}
    assert keeps_to(await grammar_of(style, **fields), text)
    assert taken_apart((await complete(text, style, **fields)).choices[0].message)["calls"]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"type": "foo"}, "tools"),
        ({"$ref": "http://example.com/schema"}, "tools.1.function.parameters.$ref"),
        ({"allOf": [{}] * 9}, "tools.1.function.parameters.allOf"),
    ],
)
async def test_a_schema_that_cannot_be_kept_to_is_refused_where_it_has_to_be(parameters: dict, field: str) -> None:
    tools = [TOOLS[0], {"type": "function", "function": {"name": "bad", "parameters": parameters}}]
    generator, reply = await ask("x", tools=tools, tool_choice="required")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field) and not generator.requests
    assert (await ask("x", tools=tools))[1].status_code == 200


async def test_a_form_that_is_asked_for_comes_after_the_reasoning() -> None:
    form = {"type": "json_object"}
    grammar = await grammar_of(THINKING, tools=None, response_format=form)
    assert keeps_to(grammar, '<think>hm</think>\n\n{"a": 1}') and keeps_to(grammar, '{"a": 1}')
    opened = {"chat_template_kwargs": {"ends_with": "<think>"}}
    grammar = await grammar_of(THINKING, tools=None, response_format=form, **opened)
    assert keeps_to(grammar, 'hm</think>\n\n{"a": 1}') and not keeps_to(grammar, '{"a": 1}')
    assert not keeps_to(await grammar_of(tools=None, response_format=form), 'hm {"a": 1}')


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"regex": "[0-9]{2}"}, "12", "1x"),
        ({"choice": ["ja", "nein"]}, "ja", "jein"),
        ({"grammar": 'start: thought "b"\nthought: GAP\nGAP: "a"'}, "ab", "a b"),  # names that ours has, too
        ({"json": {"enum": [1, 2]}}, "2", "3"),
    ],
    ids=["regex", "choice", "grammar", "json"],
)
async def test_every_form_binds_the_answer_and_not_the_reasoning(form: dict, good: str, bad: str) -> None:
    fields = {"tools": None, "structured_outputs": form}
    grammar = await grammar_of(THINKING, **fields)
    assert keeps_to(grammar, good) and keeps_to(grammar, f"<think>{bad} or so</think>\n{good}")
    assert not keeps_to(grammar, bad) and not keeps_to(grammar, f"<think>{good}</think>{bad}")
    opened = await grammar_of(THINKING, **fields, chat_template_kwargs={"ends_with": "<think>"})
    assert keeps_to(opened, f"{bad}</think>{good}") and not keeps_to(opened, good)
