"""POST /v1/responses: chat's generation in the words of the Responses API, and what is kept of it."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx
import pytest

from engine.errors import Overloaded, WorkerLost
from engine.types import FinishReason
from router.chat_style import ChatStyle
from router.parts import CallArguments, CallStart, Content, Reasoning
from router.reasoning import STYLES
from router.responses.body import InputMessage, ResponseBody
from router.responses.output import Output
from router.responses.store import ResponseStore, StoredResponse
from router.responses.translate import messages_of
from tests.openai_schemas import check_schema
from tests.router.fakes import MODEL, FakeGenerator, fail, make_client, say, say_with_logprobs

RESPONSES = "/v1/responses"


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture
def client(generator: FakeGenerator) -> httpx.AsyncClient:
    return make_client(generator)


def asked(said: object = "hello", **fields: object) -> dict[str, object]:
    return {"model": MODEL, "input": said, **fields}


def events_of(reply: httpx.Response) -> list[dict]:
    """Each event's name is its data's type, and they are numbered from 0."""
    events = []
    for block in reply.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


# --- answers --------------------------------------------------------------------------------------------------


async def test_a_whole_answer(generator: FakeGenerator, client: httpx.AsyncClient) -> None:
    reply = (await client.post(RESPONSES, json=asked(temperature=0.5, metadata={"a": "b"}))).json()
    (item,) = reply["output"]
    assert (item["role"], item["status"]) == ("assistant", "completed")
    assert item["content"] == [
        {"type": "output_text", "text": "[user]hello[assistant]", "annotations": [], "logprobs": []}
    ]
    assert reply["id"] == f"resp_{generator.requests[0].request_id}"
    assert (reply["status"], reply["temperature"], reply["metadata"]) == ("completed", 0.5, {"a": "b"})
    assert reply["usage"] == {
        "input_tokens": 22, "output_tokens": 23, "total_tokens": 45,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip
    assert generator.live == {}


async def test_an_answer_that_is_cut_off_says_so(client: httpx.AsyncClient) -> None:
    reply = (await client.post(RESPONSES, json=asked(max_output_tokens=4))).json()
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert reply["output"][0]["status"] == "incomplete"
    assert reply["output"][0]["content"][0]["text"] == "[use"


async def test_a_stream_has_its_events_in_order(client: httpx.AsyncClient) -> None:
    events = events_of(await client.post(RESPONSES, json=asked("hé", stream=True)))
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "[user]hé[assistant]"
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    last = events[-1]["response"]
    assert last["output"] == [events[-2]["item"]]
    assert last["usage"]["output_tokens"] == len("[user]hé[assistant]".encode()) + 1
    assert "usage" not in events[0]["response"]
    assert await kept(client, last["id"]) == last


async def test_a_stream_and_a_whole_answer_say_the_same(generator: FakeGenerator) -> None:
    generator.script = say_with_logprobs("naïve", size=2)
    fields = asked(include=["message.output_text.logprobs"], top_logprobs=2)
    async with make_client(generator) as client:
        whole = (await client.post(RESPONSES, json=fields)).json()
        streamed = events_of(await client.post(RESPONSES, json={**fields, "stream": True}))[-1]["response"]
    assert len(whole["output"][0]["content"][0]["logprobs"]) == len("naïve".encode())
    names = {"id": None, "output": None}
    assert {**whole, **names} == {**streamed, **names}
    assert whole["output"][0]["content"] == streamed["output"][0]["content"]


async def test_a_stop_token_at_once_gives_an_empty_message(generator: FakeGenerator) -> None:
    async def nothing(request):
        async for one in say("x", finish=FinishReason.STOP)(request):
            yield replace(one, token_ids=(257,))

    generator.script = nothing
    async with make_client(generator) as client:
        reply = (await client.post(RESPONSES, json=asked())).json()
    assert reply["output"][0]["content"][0]["text"] == ""


async def test_a_stream_that_breaks_off_fails(generator: FakeGenerator) -> None:
    generator.script = fail(WorkerLost("the worker is gone"), after=2)
    async with make_client(generator) as client:
        events = events_of(await client.post(RESPONSES, json=asked(stream=True)))
        *_, error, failed = events
        assert (error["type"], error["code"], error["message"]) == ("error", "worker_lost", "the worker is gone")
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert failed["response"]["error"] == {"code": "server_error", "message": "the worker is gone"}
        assert failed["response"]["output"][0]["content"][0]["text"] == "xx"
        assert (await client.get(f"{RESPONSES}/{failed['response']['id']}")).status_code == 404


async def test_a_refusal_before_the_stream_has_its_own_status(generator: FakeGenerator) -> None:
    generator.script = fail(Overloaded("full", retry_after_s=2.5))
    async with make_client(generator) as client:
        reply = await client.post(RESPONSES, json=asked(stream=True))
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "3")


# --- tools and reasoning --------------------------------------------------------------------------------------

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": None}
SAID = '<think>hm</think>Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
STYLE = ChatStyle(reasoning=STYLES["think"], shows_tools=True, shows_calls=True)


async def test_reasoning_and_calls_come_out_alike_whole_and_streamed() -> None:
    async with make_client(FakeGenerator(say(SAID, size=3, finish=FinishReason.STOP)), STYLE) as client:
        whole = (await client.post(RESPONSES, json=asked(tools=[TOOL]))).json()
        events = events_of(await client.post(RESPONSES, json=asked(tools=[TOOL], stream=True)))
    streamed = events[-1]["response"]
    check_schema("Response", whole)
    check_schema("ResponseStreamEvent", *events)
    for reply in (whole, streamed):
        thought, said, call = reply["output"]
        assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
        assert said["content"][0]["text"] == "Let me see."
        assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Paris"})
        assert reply["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert whole["usage"] == streamed["usage"] and whole["tools"] == [TOOL]


async def test_a_call_is_answered_in_the_next_response() -> None:
    generator = FakeGenerator(say(SAID, finish=FinishReason.STOP))
    async with make_client(generator, STYLE) as client:
        first = (await client.post(RESPONSES, json=asked(tools=[TOOL]))).json()
        result = {"type": "function_call_output", "call_id": first["output"][2]["call_id"], "output": "sunny"}
        fields = asked([result], tools=[TOOL], previous_response_id=first["id"])
        assert (await client.post(RESPONSES, json=fields)).status_code == 200
    prompt = bytes(generator.requests[1].prompt_ids).decode()
    assert first["output"][2]["call_id"] in prompt and prompt.endswith("[tool]sunny[assistant]")


# --- what is kept ---------------------------------------------------------------------------------------------


async def kept(client: httpx.AsyncClient, response_id: str) -> dict:
    reply = await client.get(f"{RESPONSES}/{response_id}")
    assert reply.status_code == 200
    return reply.json()


async def test_a_response_goes_on_after_another_one(generator: FakeGenerator, client: httpx.AsyncClient) -> None:
    first = (await client.post(RESPONSES, json=asked("one", instructions="be brief"))).json()
    fields = asked("two", previous_response_id=first["id"], instructions="be kind")
    second = (await client.post(RESPONSES, json=fields)).json()
    assert second["previous_response_id"] == first["id"]
    said = "[system]be brief[user]one[assistant]"
    prompt = f"[system]be kind[user]one[assistant]{said}[user]two[assistant]"  # instructions are not kept
    assert bytes(generator.requests[1].prompt_ids).decode() == prompt
    assert await kept(client, second["id"]) == second


async def test_a_response_is_deleted_and_then_unknown(client: httpx.AsyncClient) -> None:
    made = (await client.post(RESPONSES, json=asked())).json()
    deleted = await client.delete(f"{RESPONSES}/{made['id']}")
    assert deleted.json() == {"id": made["id"], "object": "response", "deleted": True}
    for again in (await client.get(f"{RESPONSES}/{made['id']}"), await client.delete(f"{RESPONSES}/{made['id']}")):
        assert (again.status_code, again.json()["error"]["code"]) == (404, "response_not_found")
    reply = await client.post(RESPONSES, json=asked(previous_response_id=made["id"]))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "previous_response_id")


async def test_nothing_is_kept_that_is_not_to_be(generator: FakeGenerator, client: httpx.AsyncClient) -> None:
    made = (await client.post(RESPONSES, json=asked(store=False))).json()
    assert (await client.get(f"{RESPONSES}/{made['id']}")).status_code == 404
    async with make_client(generator, max_stored_responses=0) as forgetful:
        made = (await forgetful.post(RESPONSES, json=asked())).json()
        assert (await forgetful.get(f"{RESPONSES}/{made['id']}")).status_code == 404


def test_the_store_lets_go_of_the_least_recently_used_and_knows_tenants_apart() -> None:
    item = InputMessage.model_validate({"role": "user", "content": "x" * 100})
    store = ResponseStore(max_responses=3, max_bytes=10_000)
    for name in "abc":
        store.put("t", name, StoredResponse(b"", (item,)))
    assert store.get("other", "a") is None and not store.delete("other", "a")
    assert store.get("t", "a") is not None
    store.put("t", "d", StoredResponse(b"", (item,)))
    assert [name for name in "abcd" if store.get("t", name)] == ["a", "c", "d"]
    store.put("t", "e", StoredResponse(b"x" * 9_000, ()))
    assert [name for name in "acde" if store.get("t", name)] == ["e"]
    store.put("t", "huge", StoredResponse(b"x" * 10_001, ()))
    assert store.get("t", "huge") is None and store.get("t", "e") is not None
    store.put("t", "a", StoredResponse(b"x" * 10_000, ()))
    assert store.get("t", "a") is not None


# --- what goes in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "file_search_call", "id": "1"}]}, "input.0"),
        ({"input": [{"role": "user", "content": 5}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id"),
        ({"input": "x" * 900}, "input"),
        ({"max_output_tokens": 900}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"metadata": {"x" * 65: ""}}, "metadata"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"seed": 1}, "seed"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
    ],
)
async def test_faults_are_told_by_the_name_of_the_field(
    client: httpx.AsyncClient, fields: dict[str, object], param: str
) -> None:
    reply = await client.post(RESPONSES, json=asked() | fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert f"'{param}'" in reply.json()["error"]["message"]


async def test_get_takes_no_parameters(client: httpx.AsyncClient) -> None:
    made = (await client.post(RESPONSES, json=asked())).json()
    reply = await client.get(f"{RESPONSES}/{made['id']}", params={"stream": "true"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stream")


def test_items_become_the_messages_of_chat() -> None:
    body = ResponseBody.model_validate(
        asked([
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
            {"type": "reasoning", "id": "r", "summary": []},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": "a", "id": "m", "status": "completed"},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": "[]"},
            {"type": "function_call_output", "call_id": "1", "output": "one"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "two"}]},
            {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
        ])
    )  # fmt: skip

    def call(call_id: str, name: str, arguments: str) -> dict[str, object]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert list(messages_of("i", body.input)) == [
        {"role": "system", "content": "i"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}]},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}],
            "reasoning_content": "hm",
            "tool_calls": (call("1", "f", "{}"), call("2", "g", "[]")),
        },
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "assistant", "content": None, "tool_calls": (call("3", "f", "{}"),)},
    ]


def test_reasoning_and_calls_are_items_of_their_own() -> None:
    numbers = iter(range(100))
    output = Output("r", lambda: next(numbers))
    parts = [Reasoning("hm"), Content("so "), Content("it is"), CallStart(0, "f"), CallArguments(0, "{}")]
    events = [event for part in parts for event in output.take((part,))]
    events += output.close("completed")
    assert [(item.type, item.id, item.status) for item in output.items] == [
        ("reasoning", "rs_r_0", "completed"),
        ("message", "msg_r_1", "completed"),
        ("function_call", "fc_r_2", "completed"),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == output.items
    assert [event.type for event in events][-4:] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
