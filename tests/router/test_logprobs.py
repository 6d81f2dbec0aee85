"""Logprobs in replies and streams of both endpoints: each token once, in order, with texts, bytes and offsets."""

from __future__ import annotations

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.router.fakes import (
    CHAT,
    COMPLETIONS,
    FakeGenerator,
    chat,
    completion,
    events,
    make_client,
    say_with_logprobs,
)
from tests.router.test_gateway_answers import check_schema

TEXT = "abcab"


async def ask(path: str, body: dict, text: str = TEXT, size: int = 1):
    generator = FakeGenerator(say_with_logprobs(text, size))
    async with make_client(generator) as client:
        return generator, await client.post(path, json=body)


async def test_chat_tells_each_tokens_logprob_and_the_likelier_ones() -> None:
    generator, reply = await ask(CHAT, chat(logprobs=True, top_logprobs=2))
    content = ChatCompletion.model_validate(reply.json()).choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and generator.requests[0].sampling.logprobs == 2
    assert [one.token for one in content] == list(TEXT)
    assert content[0].logprob == pytest.approx(-0.97) and content[0].bytes == [97]
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("b", -0.01), ("c", -0.02)]
    check_schema("CreateChatCompletionResponse", reply.json())


async def test_chat_without_top_logprobs_tells_only_the_tokens_own() -> None:
    generator, reply = await ask(CHAT, chat(logprobs=True))
    assert generator.requests[0].sampling.logprobs == 0
    assert [one["top_logprobs"] for one in reply.json()["choices"][0]["logprobs"]["content"]] == [[]] * 5


@pytest.mark.parametrize("body", [chat(), chat(logprobs=False), chat(logprobs=None, top_logprobs=0)])
async def test_nothing_is_told_where_nothing_was_asked(body: dict) -> None:
    generator, reply = await ask(CHAT, body)
    assert generator.requests[0].sampling.logprobs == -1
    assert reply.json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("size", [1, 2, 5])
async def test_a_chat_stream_tells_each_token_once(size: int) -> None:
    _, reply = await ask(CHAT, chat(logprobs=True, top_logprobs=1, stream=True), size=size)
    chunks = events(reply)
    check_schema("CreateChatCompletionStreamResponse", *chunks)
    parsed = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
    told = [one for chunk in parsed if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content or ()]
    assert [one.token for one in told] == list(TEXT)


async def test_completions_tell_tokens_logprobs_and_offsets() -> None:
    _, reply = await ask(COMPLETIONS, completion("x", logprobs=1), text="aé")
    told = Completion.model_validate(reply.json()).choices[0].logprobs
    assert told is not None
    assert told.tokens == ["a", "\ufffd", "\ufffd"] and told.text_offset == [0, 1, 2]
    assert told.token_logprobs == pytest.approx([-0.97, -1.95, -1.69])
    assert told.top_logprobs is not None and told.top_logprobs[0] == pytest.approx({"b": -0.01, "a": -0.97})


async def test_parts_of_a_character_have_no_bytes() -> None:
    _, reply = await ask(CHAT, chat(logprobs=True), text="é")
    assert [one["bytes"] for one in reply.json()["choices"][0]["logprobs"]["content"]] == [None, None]


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_after_a_stop_string_are_not_told_and_held_back_ones_are(size: int, stream: bool) -> None:
    _, reply = await ask(CHAT, chat(logprobs=True, stop="ca", stream=stream), size=size)
    if stream:
        choices = [choice for chunk in events(reply) for choice in chunk["choices"]]
        told = [one["token"] for choice in choices if choice["logprobs"] for one in choice["logprobs"]["content"]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
    else:
        choice = reply.json()["choices"][0]
        told, text = [one["token"] for one in choice["logprobs"]["content"]], choice["message"]["content"]
        assert reply.json()["usage"]["completion_tokens"] == 4
    assert text == "ab" and told == list("abca"), "as many as usage counts"
