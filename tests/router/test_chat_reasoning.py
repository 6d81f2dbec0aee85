"""Reasoning through the HTTP face: apart from the content, its tokens counted in every path."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine.types import FinishReason, Request, TokenOutput
from router.chat_style import PLAIN_STYLE, ChatStyle, chat_style
from router.reasoning import STYLES
from router.tools.formats import ToolFormat
from tests.router.fakes import CHAT, FakeGenerator, Script, chat, events, make_client, output, say
from tests.router.test_chat_tools import put_together, taken_apart
from tests.router.test_gateway_answers import check_schema

THINKING = replace(PLAIN_STYLE, reasoning=STYLES["think"])
OPENED = {"chat_template_kwargs": {"ends_with": "<think>\n"}}
TEXT = "<think>\nwhy é\n</think>\n\nso"
NUM_REASONING = len("\nwhy é\n".encode())  # a token is a byte


async def ask(script: Script, **fields: object) -> ChatCompletion:
    async with make_client(FakeGenerator(script), THINKING) as client:
        reply = (await client.post(CHAT, json=chat(**fields))).json()
    check_schema("CreateChatCompletionResponse", reply)
    return ChatCompletion.model_validate(reply)


async def stream(script: Script, **fields: object) -> list[ChatCompletionChunk]:
    body = chat(stream=True, stream_options={"include_usage": True}, **fields)
    async with make_client(FakeGenerator(script), THINKING) as client:
        return [ChatCompletionChunk.model_validate(event) for event in events(await client.post(CHAT, json=body))]


def num_reasoning(reply: ChatCompletion | ChatCompletionChunk) -> int | None:
    assert reply.usage is not None and reply.usage.completion_tokens_details is not None
    return reply.usage.completion_tokens_details.reasoning_tokens


@pytest.mark.parametrize("size", [1, 4, 1000])
async def test_reasoning_is_apart_from_the_content_and_counted(size: int) -> None:
    reply = await ask(say(TEXT, size, FinishReason.STOP))
    told = taken_apart(reply.choices[0].message)
    assert told == {"content": "so", "reasoning": "why é", "reasoning_content": "why é", "calls": []}
    assert num_reasoning(reply) == NUM_REASONING
    assert reply.usage is not None and reply.usage.completion_tokens == len(TEXT.encode())
    chunks = await stream(say(TEXT, size, FinishReason.STOP))
    assert put_together(chunks) == told and num_reasoning(chunks[-1]) == NUM_REASONING


async def test_reasoning_that_the_prompt_opened_needs_no_mark_of_the_answers() -> None:
    text = TEXT.removeprefix("<think>\n")
    reply = await ask(say(text), **OPENED)
    assert taken_apart(reply.choices[0].message)["reasoning"] == "why é"
    assert num_reasoning(reply) == len("why é\n".encode())
    assert taken_apart((await ask(say(text))).choices[0].message)["content"] == text


@pytest.mark.parametrize("end", [7, 8, 9, 11, 12, 13, 14, 20, 22, 24])
async def test_a_cut_answer_is_counted_to_its_last_token(end: int) -> None:
    cut = TEXT.encode()[:end].decode(errors="ignore")
    reply = await ask(say(cut), max_tokens=200)
    inside = len(cut.encode()) - len("<think>")
    closed = "</think>" in cut
    assert num_reasoning(reply) == (NUM_REASONING if closed else inside)
    assert (reply.choices[0].message.content or "") == cut.partition("</think>")[2].lstrip()


async def test_a_stop_string_in_the_reasoning_ends_the_answer_and_its_count() -> None:
    reply = await ask(say(TEXT, 5), stop="hy")
    assert taken_apart(reply.choices[0].message)["reasoning"] == "w"
    assert num_reasoning(reply) == len("\nwhy") and reply.choices[0].finish_reason == "stop"


async def test_answers_to_one_prompt_are_counted_together() -> None:
    async def script(request: Request) -> AsyncIterator[TokenOutput]:
        text = (TEXT, "none", "<think>a</think>b")[request.sampling.choice]
        async for one in say(text, 2 + request.sampling.choice)(request):
            yield one

    reply = await ask(script, n=3)
    assert num_reasoning(reply) == NUM_REASONING + 1
    assert [taken_apart(one.message)["reasoning"] for one in reply.choices] == ["why é", "", "a"]
    assert num_reasoning((await stream(script, n=3))[-1]) == NUM_REASONING + 1


async def test_usage_in_every_chunk_grows_to_that_of_the_last() -> None:
    body = chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    async with make_client(FakeGenerator(say(TEXT, 3)), THINKING) as client:
        seen = [ChatCompletionChunk.model_validate(event) for event in events(await client.post(CHAT, json=body))]
    counts = [chunk.usage.completion_tokens for chunk in seen if chunk.usage is not None]
    assert len(counts) == len(seen) and counts == sorted(counts) and counts[-1] == len(TEXT.encode())


async def test_efforts_and_variables_are_the_templates() -> None:
    generator = FakeGenerator()
    async with make_client(generator) as client:
        for fields in ({"reasoning_effort": "low"}, {"chat_template_kwargs": {"enable_thinking": False}}):
            assert (await client.post(CHAT, json=chat(**fields))).status_code == 200
        await client.post(CHAT, json=chat(reasoning_effort="none", chat_template_kwargs={"thinking": True}))
    prompts = [bytes(one.prompt_ids).decode().partition("[user]")[0] for one in generator.requests]
    assert prompts[:2] == ['[{"reasoning_effort": "low"}]', '[{"enable_thinking": false}]']
    assert prompts[2] == '[{"reasoning_effort": "none", "enable_thinking": false, "thinking": true}]'


async def test_half_a_character_of_reasoning_is_counted() -> None:
    async def script(request: Request) -> AsyncIterator[TokenOutput]:
        yield output(request, 0, (*b"<think>", 0xC3), FinishReason.LENGTH)

    assert num_reasoning(await ask(script)) == 1


@pytest.mark.parametrize(
    ("template", "tool_format", "reasoning", "expected"),
    [
        ("<tool_call> tool_calls </think>", "auto", "auto", ChatStyle(ToolFormat.HERMES, STYLES["think"], True, True)),
        ("[TOOL_CALLS]", "auto", "auto", ChatStyle(ToolFormat.MISTRAL, None, True, False)),
        ("{{ tools }} in words of its own", "auto", "none", ChatStyle()),
        ("{{ tools }} tool_calls", "json", "bracket", ChatStyle(ToolFormat.JSON, STYLES["bracket"], True, True)),
    ],
)
def test_a_style_is_what_the_template_shows_or_the_config_says(
    template: str, tool_format: str, reasoning: str, expected: ChatStyle
) -> None:
    assert chat_style(template, True, tool_format, reasoning) == expected
    assert not chat_style(template, False, tool_format, reasoning).shows_tools
