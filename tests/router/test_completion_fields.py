"""Plain completions: echo, best_of, several prompts, and what usage says of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
from openai.types import Completion

from engine.errors import Overloaded
from engine.types import FinishReason, Request, TokenLogprob, TokenOutput
from tests.router.fakes import (
    BOS,
    COMPLETIONS,
    FakeGenerator,
    Script,
    completion,
    echo,
    events,
    make_client,
    output,
    say,
    say_with_logprobs,
)
from tests.router.test_gateway_answers import check_schema


async def post(script: Script, prompt: object = "hello", **fields: object) -> tuple[FakeGenerator, httpx.Response]:
    generator = FakeGenerator(script)
    async with make_client(generator) as client:
        reply = await client.post(COMPLETIONS, json=completion(prompt, **fields))
    assert not generator.live
    return generator, reply


async def ask(script: Script, prompt: object = "hello", **fields: object) -> Completion:
    """The first token of a prompt has no logprob, and chunks no reason: null where the schema knows no null."""
    reply = (await post(script, prompt, **fields))[1].json()
    if not (fields.get("echo") and "logprobs" in fields):
        check_schema("CreateCompletionResponse", reply)
    return Completion.construct(**reply)


async def stream(script: Script, prompt: object = "hello", **fields: object) -> list[Completion]:
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return [Completion.construct(**event) for event in events((await post(script, prompt, **fields))[1])]


def texts_of(chunks: list[Completion]) -> list[str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return [texts[index] for index in sorted(texts)]


# --- several prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [["ab", "c", "é"], [[97, 98], [99], list("é".encode())]])
async def test_each_prompt_is_answered_under_its_own_index(prompt: list) -> None:
    reply = await ask(echo, prompt, n=2)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert [choice.text for choice in reply.choices] == ["ab", "ab", "c", "c", "é", "é"]
    assert texts_of(await stream(echo, prompt, n=2)) == ["ab", "ab", "c", "c", "é", "é"]


async def test_usage_counts_each_prompt_once_and_all_answers() -> None:
    reply = await ask(echo, ["ab", "cde"], n=2)
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3 + 4, 2 * (3 + 4))
    assert reply.usage.prompt_tokens_details.cached_tokens == 3 + 3
    assert (await stream(echo, ["ab", "cde"], n=2))[-1].usage == reply.usage


async def test_prompts_are_requests_of_their_own_with_one_seed() -> None:
    generator, _ = await post(echo, ["ab", "c"], n=2, seed=9)
    asked = {one.request_id: (one.prompt_ids, one.sampling.choice, one.sampling.seed) for one in generator.requests}
    assert sorted(asked.values()) == [
        ((BOS, 97, 98), 0, 9), ((BOS, 97, 98), 1, 9), ((BOS, 99), 0, 9), ((BOS, 99), 1, 9)
    ]  # fmt: skip


async def test_what_fails_one_prompt_fails_all() -> None:
    async def script(request: Request) -> AsyncIterator[TokenOutput]:
        if request.prompt_ids[-1] == ord("b"):
            raise Overloaded("full", retry_after_s=1)
        await asyncio.Event().wait()
        yield output(request, 0, (1,))

    generator, reply = await post(script, ["a", "b"])
    assert reply.status_code == 429 and not generator.live


# --- echo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["hé", ["hé"], list("hé".encode())])
async def test_an_echo_is_the_prompt_as_it_was_written(prompt: object) -> None:
    reply = await ask(say("yes"), prompt, echo=True, n=2)
    assert [choice.text for choice in reply.choices] == ["héyes", "héyes"]
    assert reply.usage is not None and reply.usage.completion_tokens == 6
    assert texts_of(await stream(say("yes"), prompt, echo=True, n=2)) == ["héyes", "héyes"]


async def test_a_stop_string_in_the_prompt_ends_nothing() -> None:
    assert (await ask(say("yes no"), "a no", echo=True, stop=" no")).choices[0].text == "a noyes"


async def test_with_max_tokens_0_there_is_only_the_echo() -> None:
    generator, reply = await post(say("yes"), "hé", echo=True, max_tokens=0)
    whole = Completion.model_validate(reply.json())
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("hé", "length")
    assert whole.usage is not None and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 0)
    assert generator.requests[0].sampling.max_tokens == 1, "which nobody gets to see"
    chunks = await stream(say("yes"), "hé", echo=True, max_tokens=0)
    assert texts_of(chunks) == ["hé"] and chunks[-1].usage == whole.usage


def with_prompt_logprobs(text: str) -> Script:
    """Of the prompt a token's logprob is minus its byte / 1000; they come with the first answer's first output."""

    async def script(request: Request) -> AsyncIterator[TokenOutput]:
        if request.sampling.choice == 0:
            await asyncio.sleep(0.01)  # the others come first
        async for one in say_with_logprobs(text)(request):
            has_prompt = one.first_index == 0 and request.sampling.choice == 0
            num_top = request.sampling.prompt_logprobs
            scored = tuple(
                TokenLogprob(-byte / 1000, 1, ((byte, -byte / 1000), (byte + 1, -9.0))[:num_top])
                for byte in request.prompt_ids[1:]
            )
            yield replace(one, prompt_logprobs=scored if has_prompt and num_top >= 0 else ())

    return script


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_echo_with_logprobs_tells_those_of_the_prompt_first(is_stream: bool) -> None:
    fields = {"echo": True, "logprobs": 1, "n": 2}
    script = with_prompt_logprobs("ba")
    replies = await stream(script, [97, 98], **fields) if is_stream else [await ask(script, [97, 98], **fields)]
    for index in range(2):
        told = [c.logprobs for reply in replies for c in reply.choices if c.index == index and c.logprobs]
        tokens = [token for one in told for token in one.tokens or ()]
        logprobs = [logprob for one in told for logprob in one.token_logprobs or ()]
        tops = [top for one in told for top in one.top_logprobs or ()]
        offsets = [offset for one in told for offset in one.text_offset or ()]
        assert tokens == ["a", "b", "b", "a"] and offsets == [0, 1, 2, 3]
        assert logprobs == [None, pytest.approx(-0.098), pytest.approx(-0.98), pytest.approx(-0.97)]
        assert tops[0] is None and tops[1] == pytest.approx({"b": -0.098})
    assert texts_of(replies) == ["abba", "abba"]


async def test_only_the_prompts_logprobs_can_be_asked_for() -> None:
    reply = await ask(with_prompt_logprobs("x"), [97, 98], echo=True, logprobs=0, max_tokens=0)
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.tokens == ["a", "b"]


# --- best_of ------------------------------------------------------------------------------------------------------


async def by_choice(request: Request) -> AsyncIterator[TokenOutput]:
    """Answers of different lengths, of which the third is the likeliest by its mean, then the first."""
    text, logprob = (("a", -1.0), ("bb", -2.0), ("cccc", -0.5), ("d", -3.0))[request.sampling.choice]
    async for one in say(text, finish=FinishReason.STOP)(request):
        scored = tuple(TokenLogprob(logprob, 1) for _ in one.token_ids)
        yield replace(one, logprobs=scored if request.sampling.logprobs >= 0 else ())


async def test_the_likeliest_by_their_mean_are_sent_and_all_are_counted() -> None:
    reply = await ask(by_choice, best_of=4, n=2)
    assert [(choice.index, choice.text) for choice in reply.choices] == [(0, "cccc"), (1, "a")]
    assert all(choice.logprobs is None for choice in reply.choices), "nobody asked for them"
    assert reply.usage is not None and reply.usage.completion_tokens == 8
    assert reply.usage.prompt_tokens == len("hello") + 1


async def test_the_best_of_each_prompt_is_sent() -> None:
    reply = await ask(by_choice, ["x", "y"], best_of=3, logprobs=0)
    assert [(choice.index, choice.text) for choice in reply.choices] == [(0, "cccc"), (1, "cccc")]
    assert all(choice.logprobs is not None for choice in reply.choices)


async def test_without_a_choice_to_make_they_come_in_order_and_without_logprobs() -> None:
    generator, reply = await post(by_choice, best_of=2, n=2)
    assert [choice["text"] for choice in reply.json()["choices"]] == ["a", "bb"]
    assert generator.requests[0].sampling.logprobs == -1
