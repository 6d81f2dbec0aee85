"""What a well-formed request gets: whole replies and streams of both endpoints, models, health, version, docs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import httpx
import pytest
from jsonschema import Draft202012Validator

from engine.types import FinishReason
from tests.router.fakes import (
    BOS,
    CHAT,
    COMPLETIONS,
    CREATED,
    MODEL,
    FakeGenerator,
    chat,
    completion,
    events,
    make_client,
    say,
    worker,
)

SCHEMAS = Path(__file__).parents[3] / "shared/data/openai-openapi/chat_schemas.json"


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture
def client(generator: FakeGenerator) -> httpx.AsyncClient:
    return make_client(generator)


@cache
def validator_of(name: str) -> Draft202012Validator:
    definitions = json.loads(SCHEMAS.read_text())["$defs"]
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions})


def check_schema(name: str, *replies: object) -> None:
    if not SCHEMAS.exists():
        pytest.skip("shared/data/openai-openapi is not here")
    validator = validator_of(name)
    for reply in replies:
        validator.validate(reply)


def text_of(chunks: list[dict]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


async def test_chat_reply(generator: FakeGenerator, client: httpx.AsyncClient) -> None:
    reply = await client.post(CHAT, json=chat("hello"))
    prompt = "[user]hello[assistant]"
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"] == generator.requests[0].request_id
    assert reply.json() == {
        "id": f"chatcmpl-{generator.requests[0].request_id}",
        "object": "chat.completion",
        "created": CREATED,
        "model": MODEL,
        "system_fingerprint": "fp_1.2.3",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": prompt, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(prompt) + 1,
            "total_tokens": 2 * len(prompt) + 1,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    assert generator.live == {}


async def test_completion_reply(generator: FakeGenerator, client: httpx.AsyncClient) -> None:
    reply = await client.post(COMPLETIONS, json=completion("hello", max_tokens=3))
    assert reply.json()["object"] == "text_completion"
    assert reply.json()["choices"] == [{"index": 0, "text": "hel", "logprobs": None, "finish_reason": "length"}]
    assert reply.json()["usage"]["completion_tokens"] == 3
    assert generator.requests[0].prompt_ids == (BOS, *b"hello")


async def test_chat_stream_begins_with_the_role_and_ends_with_the_reason(client: httpx.AsyncClient) -> None:
    reply = await client.post(CHAT, json=chat("hé", stream=True))
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("data: [DONE]\n\n")
    chunks = events(reply)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == "[user]hé[assistant]"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (COMPLETIONS, completion())])
async def test_a_stream_ends_with_its_usage_if_asked_to(client: httpx.AsyncClient, path: str, body: dict) -> None:
    whole = (await client.post(path, json=body)).json()
    reply = await client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    *chunks, last = events(reply)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]


async def test_completion_stream(client: httpx.AsyncClient) -> None:
    chunks = events(await client.post(COMPLETIONS, json=completion("hello", stream=True)))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["object"] == "text_completion" for chunk in chunks)


async def test_a_stop_string_ends_the_request_and_trims_its_usage(generator: FakeGenerator) -> None:
    generator.script = say("one two three", size=5)
    async with make_client(generator) as client:
        reply = (await client.post(CHAT, json=chat(stop=["zzz", "wo"]))).json()
    assert reply["choices"][0]["message"]["content"] == "one t"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == len("one two")
    assert generator.live == {}


async def test_a_stop_string_ends_a_stream_likewise(generator: FakeGenerator) -> None:
    generator.script = say("one two three", size=5)
    async with make_client(generator) as client:
        body = chat(stop="wo", stream=True, stream_options={"include_usage": True})
        chunks = events(await client.post(CHAT, json=body))
    assert text_of(chunks) == "one t"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == len("one two")
    assert generator.live == {}


async def test_half_a_character_is_never_sent(generator: FakeGenerator) -> None:
    generator.script = say("naïve 日本 🙂")
    async with make_client(generator) as client:
        chunks = events(await client.post(CHAT, json=chat(stream=True)))
    assert text_of(chunks) == "naïve 日本 🙂"
    assert "�" not in text_of(chunks)


async def test_sampling_reaches_the_request(generator: FakeGenerator, client: httpx.AsyncClient) -> None:
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": -1, "ignore_eos": True, "max_completion_tokens": 5}
    await client.post(CHAT, json=chat(**asked))
    await client.post(CHAT, json=chat(temperature=0))
    sampling = generator.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.seed, sampling.ignore_eos, sampling.max_tokens) == (2**64 - 1, True, 5)
    defaults = generator.requests[1].sampling
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.seed) == (0, 1, 0, 42)


async def test_replies_match_openais_schemas(generator: FakeGenerator, client: httpx.AsyncClient) -> None:
    usage = {"stream_options": {"include_usage": True}}
    check_schema("CreateChatCompletionResponse", (await client.post(CHAT, json=chat())).json())
    check_schema(
        "CreateChatCompletionStreamResponse",
        *events(await client.post(CHAT, json=chat(stream=True))),
        *events(await client.post(CHAT, json=chat(stream=True, **usage))),
    )
    check_schema("CreateCompletionResponse", (await client.post(COMPLETIONS, json=completion(max_tokens=2))).json())
    check_schema("CreateCompletionResponse", (await client.post(COMPLETIONS, json=completion())).json())
    check_schema("ListModelsResponse", (await client.get("/v1/models")).json())
    check_schema("Model", (await client.get(f"/v1/models/{MODEL}")).json())
    check_schema("ErrorResponse", (await client.post(CHAT, json={})).json())


async def test_models(client: httpx.AsyncClient) -> None:
    card = (await client.get(f"/v1/models/{MODEL}")).json()
    assert (card["id"], card["max_model_len"]) == (MODEL, 256)
    assert (await client.get("/v1/models")).json() == {"object": "list", "data": [card]}
    missing = await client.get("/v1/models/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_health_tells_the_workers_either_way(generator: FakeGenerator, client: httpx.AsyncClient) -> None:
    reply = await client.get("/health")
    assert reply.status_code == 200
    assert [one["worker_id"] for one in reply.json()["workers"]] == ["p0", "d0"]
    generator.view = replace(generator.view, healthy=False, reason="no canary", workers=(worker(),))
    reply = await client.get("/health")
    assert reply.status_code == 503
    assert (reply.json()["reason"], len(reply.json()["workers"])) == ("no canary", 1)


async def test_version_and_docs(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": "1.2.3"}
    assert (await client.get("/docs")).status_code == 200
    schema = (await client.get("/openapi.json")).json()
    body = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    chat_body = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert chat_body["properties"]["model"]["enum"] == [MODEL]
    message = chat_body["properties"]["messages"]["items"]["$ref"].rpartition("/")[2]
    assert schema["components"]["schemas"][message]["title"] == "Message"


async def test_every_answer_has_its_own_request_id(client: httpx.AsyncClient) -> None:
    replies = [await client.get("/version"), await client.get("/nowhere"), await client.post(CHAT, json=chat())]
    assert len({reply.headers["x-request-id"] for reply in replies}) == 3


async def test_a_stop_string_at_once_gives_an_empty_answer(generator: FakeGenerator) -> None:
    generator.script = say("x", finish=FinishReason.STOP)
    async with make_client(generator) as client:
        reply = await client.post(CHAT, json=chat(stop="x"))
    assert reply.json()["choices"][0]["message"]["content"] == ""
