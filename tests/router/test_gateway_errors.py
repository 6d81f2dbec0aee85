"""What a bad request and a failed generation get: OpenAI's error format, the field's name, and no harm to others."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import DeadlineExceeded, Overloaded, SteelyardError, Unavailable, WorkerLost
from engine.types import ErrorInfo, FinishReason, Request, TokenOutput
from router.chat_style import PLAIN_STYLE
from tests.router.fakes import (
    CHAT,
    COMPLETIONS,
    MAX_CONTEXT,
    FakeGenerator,
    chat,
    completion,
    events,
    fail,
    make_client,
)


def message(**fields: object) -> dict[str, object]:
    return {"model": "tiny/bytes", "messages": [{"role": "user", "content": "x", **fields}]}


def tool(name: str, **function: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, **function}}


def named(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


def allowed(name: str) -> dict[str, object]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named(name)]}}


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}

BAD = [
    # what is wrong, the endpoint, the body, the field that the answer names
    ("no body fields", CHAT, {}, "model"),
    ("model missing", CHAT, {"messages": [{"role": "user", "content": "x"}]}, "model"),
    ("model a number", CHAT, chat() | {"model": 1}, "model"),
    ("model empty", CHAT, chat() | {"model": ""}, "model"),
    ("messages missing", CHAT, {"model": "tiny/bytes"}, "messages"),
    ("messages empty", CHAT, chat() | {"messages": []}, "messages"),
    ("messages a string", CHAT, chat() | {"messages": "hi"}, "messages"),
    ("message a string", CHAT, chat() | {"messages": ["hi"]}, "messages.0"),
    ("role unknown", CHAT, message(role="wizard"), "messages.0.role"),
    ("content a number", CHAT, chat(5), "messages.0.content"),
    ("content null", CHAT, chat(None), "messages.0.content"),
    ("content without parts", CHAT, chat([]), "messages.0.content"),
    ("content with an image", CHAT, chat([{"type": "image_url", "image_url": {}}]), "messages.0.content.0.type"),
    ("text a number", CHAT, chat([{"type": "text", "text": 3}]), "messages.0.content.0.text"),
    ("message with an unknown key", CHAT, message(colour="red"), "messages.0.colour"),
    ("a user's tool calls", CHAT, message(tool_calls=[CALL]), "messages.0.tool_calls"),
    ("a tool call without a function", CHAT, message(role="assistant", tool_calls=[{"id": "a", "type": "function"}]),
     "messages.0.tool_calls.0.function"),
    ("a tool's message without its call", CHAT, message(role="tool"), "messages.0.tool_call_id"),
    ("a function's message without its name", CHAT, message(role="function"), "messages.0.name"),
    ("an assistant that says nothing", CHAT, message(role="assistant", content=None), "messages.0.content"),
    ("template refuses", CHAT, chat("unspeakable"), "messages"),
    ("unknown key", CHAT, chat(colour="red"), "colour"),
    ("temperature negative", CHAT, chat(temperature=-0.1), "temperature"),
    ("temperature over 2", CHAT, chat(temperature=2.1), "temperature"),
    ("temperature a bool", CHAT, chat(temperature=True), "temperature"),
    ("temperature a string", CHAT, chat(temperature="1"), "temperature"),
    ("temperature NaN", CHAT, chat(temperature=float("nan")), "temperature"),
    ("temperature infinite", CHAT, chat(temperature=float("inf")), "temperature"),
    ("top_p 0", CHAT, chat(top_p=0), "top_p"),
    ("top_p over 1", CHAT, chat(top_p=1.01), "top_p"),
    ("top_k negative", CHAT, chat(top_k=-2), "top_k"),
    ("max_tokens 0", CHAT, chat(max_tokens=0), "max_tokens"),
    ("max_tokens a fraction", CHAT, chat(max_tokens=1.0), "max_tokens"),
    ("max_tokens a bool", CHAT, chat(max_tokens=True), "max_tokens"),
    ("max_tokens enormous", CHAT, chat(max_tokens=10**4000), "max_tokens"),
    ("max_tokens beyond the context", CHAT, chat(max_tokens=MAX_CONTEXT), "max_tokens"),
    ("max_completion_tokens too", CHAT, chat(max_completion_tokens=MAX_CONTEXT), "max_completion_tokens"),
    ("two limits", CHAT, chat(max_tokens=1, max_completion_tokens=2), "max_completion_tokens"),
    ("prompt beyond the context", CHAT, chat("x" * 500), "messages"),
    ("prompt beyond it by far", CHAT, chat("x" * 50_000), "messages"),
    ("seed a string", CHAT, chat(seed="1"), "seed"),
    ("seed too large", CHAT, chat(seed=2**64), "seed"),
    ("stop a number", CHAT, chat(stop=1), "stop"),
    ("stop empty", CHAT, chat(stop=""), "stop"),
    ("five stops", CHAT, chat(stop=list("abcde")), "stop"),
    ("stop of numbers", CHAT, chat(stop=["a", 1]), "stop"),
    ("stop too long", CHAT, chat(stop="x" * 2000), "stop"),
    ("stream a number", CHAT, chat(stream=1), "stream"),
    ("stream_options without stream", CHAT, chat(stream_options={"include_usage": True}), "stream_options"),
    ("stream option unknown", CHAT, chat(stream=True, stream_options={"x": 1}), "stream_options.x"),
    ("n 0", CHAT, chat(n=0), "n"),
    ("n 129", COMPLETIONS, completion(n=129), "n"),
    ("prompt logprobs of a stream", CHAT, chat(stream=True, prompt_logprobs=1), "prompt_logprobs"),
    ("21 prompt logprobs", COMPLETIONS, completion(prompt_logprobs=21), "prompt_logprobs"),
    ("n true", CHAT, chat(n=True), "n"),
    ("logprobs a number", CHAT, chat(logprobs=1), "logprobs"),
    ("top_logprobs without logprobs", CHAT, chat(top_logprobs=3), "top_logprobs"),
    ("too many top_logprobs", CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    ("a tool without a function", CHAT, chat(tools=[{"type": "function"}]), "tools.0.function"),
    ("a tool of another kind", CHAT, chat(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools.0.type"),
    ("a function's name with a space", CHAT, chat(tools=[tool("a b")]), "tools.0.function.name"),
    ("two functions of one name", CHAT, chat(tools=[tool("f"), tool("f")]), "tools"),
    ("too many tools", CHAT, chat(tools=[tool(f"f{i}") for i in range(129)]), "tools"),
    ("parameters no object", CHAT, chat(tools=[tool("f", parameters=[1])]), "tools.0.function.parameters"),
    ("tool_choice without tools", CHAT, chat(tool_choice="required"), "tool_choice"),
    ("tool_choice of another word", CHAT, chat(tools=[tool("f")], tool_choice="any"), "tool_choice"),
    ("tool_choice of a stranger", CHAT, chat(tools=[tool("f")], tool_choice=named("g")), "tool_choice"),
    ("tool_choice without its function", CHAT, chat(tools=[tool("f")], tool_choice={"type": "function"}),
     "tool_choice.function"),
    ("allowed tools without a mode", CHAT, chat(tools=[tool("f")], tool_choice=allowed("f") | {"allowed_tools": {
        "tools": []}}), "tool_choice.allowed_tools.mode"),
    ("an allowed stranger", CHAT, chat(tools=[tool("f")], tool_choice=allowed("g")), "tool_choice"),
    ("tools in both forms", CHAT, chat(tools=[tool("f")], functions=[{"name": "f"}]), "functions"),
    ("function_call of a stranger", CHAT, chat(functions=[{"name": "f"}], function_call={"name": "g"}),
     "function_call"),
    ("reasoning_effort unknown", CHAT, chat(reasoning_effort="huge"), "reasoning_effort"),
    ("template variables reserved", CHAT, chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
    ("template variables hidden", CHAT, chat(chat_template_kwargs={"_budget": 1}), "chat_template_kwargs"),
    ("template variables too long", CHAT, chat(chat_template_kwargs={"a": "x" * 5000}), "chat_template_kwargs"),
    ("response_format", CHAT, chat(response_format={"type": "xml"}), "response_format"),
    ("logit_bias a list", CHAT, chat(logit_bias=[1]), "logit_bias"),
    ("logit_bias of a word", CHAT, chat(logit_bias={"the": 5}), "logit_bias"),
    ("logit_bias of a token by two names", CHAT, chat(logit_bias={"1": 5, "01": 4}), "logit_bias"),
    ("logit_bias too strong", CHAT, chat(logit_bias={"1": 101}), "logit_bias"),
    ("logit_bias not a number", CHAT, chat(logit_bias={"1": "5"}), "logit_bias"),
    ("logit_bias of too many", CHAT, chat(logit_bias={str(i): 1 for i in range(301)}), "logit_bias"),
    ("logit_bias of an unknown token", CHAT, chat(logit_bias={"258": 5}), "logit_bias.258"),
    ("frequency_penalty beyond 2", CHAT, chat(frequency_penalty=2.5), "frequency_penalty"),
    ("presence_penalty below -2", CHAT, chat(presence_penalty=-2.5), "presence_penalty"),
    ("repetition_penalty 0", CHAT, chat(repetition_penalty=0), "repetition_penalty"),
    ("min_p beyond 1", CHAT, chat(min_p=1.5), "min_p"),
    ("typical_p 0", CHAT, chat(typical_p=0), "typical_p"),
    ("min_tokens negative", CHAT, chat(min_tokens=-1), "min_tokens"),
    ("min_tokens above max_tokens", CHAT, chat(min_tokens=6, max_tokens=5), "min_tokens"),
    ("stop_token_ids unknown", CHAT, chat(stop_token_ids=[1, 258]), "stop_token_ids.1"),
    ("stop_token_ids negative", CHAT, chat(stop_token_ids=[-1]), "stop_token_ids.0"),
    ("too many stop_token_ids", CHAT, chat(stop_token_ids=[1] * 65), "stop_token_ids"),
    ("bad_words empty", CHAT, chat(bad_words=[""]), "bad_words.0"),
    ("too many bad_words", CHAT, chat(bad_words=["x"] * 65), "bad_words"),
    ("presence_penalty false", CHAT, chat(presence_penalty=False), "presence_penalty"),
    ("unsupported in depth", CHAT, chat(prediction={"a": [1, {"b": None}]}), "prediction"),
    ("prompt missing", COMPLETIONS, {"model": "tiny/bytes"}, "prompt"),
    ("prompt null", COMPLETIONS, completion(None), "prompt"),
    ("prompt empty", COMPLETIONS, completion(""), "prompt"),
    ("prompt without ids", COMPLETIONS, completion([]), "prompt"),
    ("prompts of which one is empty", COMPLETIONS, completion(["a", ""]), "prompt"),
    ("prompts of ids and words", COMPLETIONS, completion([[1], ["a"]]), "prompt"),
    ("129 prompts", COMPLETIONS, completion(["a"] * 129), "prompt"),
    ("65 prompts with two answers", COMPLETIONS, completion(["a"] * 65, n=2), "prompt"),
    ("a second prompt beyond the context", COMPLETIONS, completion(["a", "x" * 500]), "prompt"),
    ("ids with a bool", COMPLETIONS, completion([1, True]), "prompt"),
    ("ids with a string", COMPLETIONS, completion([1, "a"]), "prompt"),
    ("id negative", COMPLETIONS, completion([-1]), "prompt"),
    ("id beyond the vocabulary", COMPLETIONS, completion([1, 258]), "prompt"),
    ("id enormous", COMPLETIONS, completion([10**4000]), "prompt"),
    ("too many ids", COMPLETIONS, completion([1] * MAX_CONTEXT), "prompt"),
    ("best_of below n", COMPLETIONS, completion(best_of=2, n=3), "best_of"),
    ("best_of of a stream", COMPLETIONS, completion(best_of=2, stream=True), "best_of"),
    ("best_of beyond 20", COMPLETIONS, completion(best_of=21), "best_of"),
    ("best_of of many prompts", COMPLETIONS, completion(["a"] * 20, best_of=20), "best_of"),
    ("echo a number", COMPLETIONS, completion(echo=1), "echo"),
    ("max_tokens 0 without echo", COMPLETIONS, completion(max_tokens=0), "max_tokens"),
    ("suffix", COMPLETIONS, completion(suffix="x"), "suffix"),
    ("too many logprobs of completions", COMPLETIONS, completion(logprobs=6), "logprobs"),
    ("messages in a completion", COMPLETIONS, completion(messages=[]), "messages"),
]  # fmt: skip


def error_of(reply: httpx.Response) -> dict:
    assert set(reply.json()) == {"error"}
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    return reply.json()["error"]


async def send(body: bytes, path: str = CHAT, generator: FakeGenerator | None = None, **limits: int) -> httpx.Response:
    async with make_client(generator or FakeGenerator(), PLAIN_STYLE, **limits) as client:
        return await client.post(path, content=body)


@pytest.mark.parametrize(("path", "body", "field"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
async def test_bad_input_is_refused_by_the_fields_name(path: str, body: dict, field: str) -> None:
    generator = FakeGenerator()
    async with make_client(generator) as client:
        reply = await client.post(path, content=json.dumps(body).encode())
        error = error_of(reply)
        assert (reply.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_request")
        assert error["param"] == field
        assert field.split(".")[0] in error["message"]
        assert len(error["message"]) < 400
        assert generator.requests == []
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_an_unsupported_field_is_called_unsupported() -> None:
    error = error_of(await send(json.dumps(completion(suffix="x")).encode(), COMPLETIONS))
    assert error["message"] == "'suffix': This value is not supported yet"


async def test_a_context_error_tells_both_numbers() -> None:
    prompt = error_of(await send(json.dumps(completion("x" * 300)).encode(), COMPLETIONS))
    assert "301" in prompt["message"]
    assert "256" in prompt["message"]
    limit = error_of(await send(json.dumps(completion("x" * 200, max_tokens=100)).encode(), COMPLETIONS))
    assert "100" in limit["message"]
    assert "55" in limit["message"]


async def test_an_unknown_model_is_not_found() -> None:
    reply = await send(json.dumps(chat() | {"model": "gpt-" + "9" * 1000}).encode())
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"a":1}x', b'"\\ud800"', b"\xff\xfe", b"[" * 100_000, b'{"seed":1' + b"0" * 5000 + b"}"],
)
async def test_broken_json_is_a_400(body: bytes) -> None:
    reply = await send(body)
    assert reply.status_code == 400
    assert "JSON" in error_of(reply)["message"]


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"text"'])
async def test_a_body_that_is_no_object_is_a_400(body: bytes) -> None:
    reply = await send(body)
    assert reply.status_code == 400
    assert "object" in error_of(reply)["message"]


async def test_any_content_type_will_do() -> None:
    async with make_client(FakeGenerator()) as client:
        body = json.dumps(chat()).encode()
        assert (await client.post(CHAT, content=body, headers={"content-type": "text/plain"})).status_code == 200


async def test_unknown_routes_and_wrong_methods() -> None:
    async with make_client(FakeGenerator()) as client:
        missing = await client.get("/v1/nothing")
        assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
        wrong = await client.get(CHAT)
        assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"


async def test_a_body_at_the_limit_passes_and_one_byte_more_does_not() -> None:
    body = json.dumps(chat()).encode()
    full = body + b" " * (2048 - len(body))
    assert (await send(full, max_body_bytes=2048)).status_code == 200
    reply = await send(full + b" ", max_body_bytes=2048)
    assert (reply.status_code, error_of(reply)["code"]) == (413, "body_too_large")


async def test_a_chunked_body_is_judged_while_it_comes() -> None:
    num_sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_sent
        while True:
            num_sent += 1
            yield b" " * 1024

    async with make_client(FakeGenerator(), max_body_bytes=10 * 1024) as client:
        reply = await client.post(CHAT, content=chunks())
    assert reply.status_code == 413
    assert num_sent == 11


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("too much"), 429, "rate_limit_error"),
        (Unavailable("no decode worker"), 503, "server_error"),
        (DeadlineExceeded("too late"), 504, "server_error"),
        (SteelyardError("odd"), 500, "server_error"),
    ],
)
async def test_an_error_before_the_first_output_has_its_own_status(
    error: SteelyardError, status: int, kind: str, stream: bool
) -> None:
    generator = FakeGenerator(fail(error))
    reply = await send(json.dumps(chat(stream=stream)).encode(), generator=generator)
    assert reply.status_code == status
    assert error_of(reply) == {"message": error.message, "type": kind, "param": None, "code": error.code}
    assert generator.live == {}


@pytest.mark.parametrize(("retry_after_s", "header"), [(None, "1"), (0.0, "1"), (-3.0, "1"), (0.2, "1"), (2.1, "3")])
async def test_a_refusal_for_load_says_when_to_come_back(retry_after_s: float | None, header: str) -> None:
    script = fail(Overloaded("too much", retry_after_s=retry_after_s))
    reply = await send(json.dumps(chat()).encode(), generator=FakeGenerator(script))
    assert reply.headers["retry-after"] == header


@pytest.mark.parametrize("after", [0, 2])
async def test_an_unexpected_error_leaks_nothing(after: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    generator = FakeGenerator(fail(RuntimeError("secret\nplace"), after))
    reply = await send(json.dumps(chat()).encode(), generator=generator)
    assert (reply.status_code, error_of(reply)["code"]) == (500, "internal_error")
    assert "secret" not in reply.text
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "RuntimeError" in line
    assert "\n" not in line


async def test_an_error_after_the_first_output_is_a_whole_replys_status() -> None:
    reply = await send(json.dumps(chat()).encode(), generator=FakeGenerator(fail(WorkerLost("gone"), after=2)))
    assert (reply.status_code, error_of(reply)["code"]) == (503, "worker_lost")


@pytest.mark.parametrize(
    ("error", "code"), [(WorkerLost("gone"), "worker_lost"), (RuntimeError("secret"), "internal_error")]
)
async def test_an_error_after_the_first_output_is_a_streams_last_event(error: Exception, code: str) -> None:
    generator = FakeGenerator(fail(error, after=2))
    reply = await send(json.dumps(chat(stream=True)).encode(), generator=generator)
    assert reply.status_code == 200
    *chunks, last = events(reply)
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "x", "x"]
    assert last["error"]["code"] == code
    assert "[DONE]" not in reply.text
    assert "secret" not in reply.text
    assert generator.live == {}


@pytest.mark.parametrize(
    ("finish", "info", "status"),
    [
        (FinishReason.ERROR, ErrorInfo("overloaded", "full"), 429),
        (FinishReason.ERROR, None, 500),
        (FinishReason.ABORT, None, 503),
        (None, None, 500),
    ],
)
async def test_an_output_that_is_no_answer_is_an_error(
    finish: FinishReason | None, info: ErrorInfo | None, status: int
) -> None:
    async def script(request: Request) -> AsyncIterator[TokenOutput]:
        yield TokenOutput(request.key, 0, (), finish, info)

    reply = await send(json.dumps(chat()).encode(), generator=FakeGenerator(script))
    assert reply.status_code == status


# --- junk ----------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 1e308, "user", "text", "tiny/bytes"])
)
KEYS = st.sampled_from(
    "model messages prompt stop stream stream_options include_usage role content type n text max_tokens temperature "
    "top_p top_k seed logprobs tools metadata logit_bias".split()
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
BODIES = st.builds(
    lambda base, junk: base | junk,
    st.sampled_from([chat(), completion(), {}]),
    st.dictionaries(KEYS, JUNK, max_size=4),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=BODIES | JUNK, path=st.sampled_from([CHAT, COMPLETIONS]))
def test_junk_never_gives_a_5xx(body: object, path: str) -> None:
    reply = asyncio.run(send(json.dumps(body).encode(), path))
    assert reply.status_code < 500
    if reply.status_code != 200:
        assert error_of(reply)["message"]


@settings(max_examples=50, deadline=None)
@given(body=st.binary(max_size=200))
def test_noise_never_gives_a_5xx(body: bytes) -> None:
    assert 400 <= asyncio.run(send(body)).status_code < 500
