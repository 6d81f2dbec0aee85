"""POST /v1/embeddings in front of a Generator that follows a script, also by OpenAI's own client."""

from __future__ import annotations

import base64
import json
import math
import struct
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from engine.errors import WorkerLost
from engine.models.pooling import NO_POOLING
from engine.types import LAST, Request
from router.config import RouterConfig
from router.embeddings.body import MAX_INPUTS
from router.embeddings.lanes import MAX_LANES
from router.gateway import create_app
from router.step_history import StepHistory
from router.targets import DEADLINE, TPOT, TTFT
from router.tenants import KeyRing
from tests.cluster.serving import serve
from tests.openai_schemas import check_schema
from tests.router.fakes import BOS, MAX_CONTEXT, MODEL, FakeGenerator, echo, fail, make_client, text_model, vector_of

PATH = "/v1/embeddings"
TEXTS = ["hello", "naïve 日本", "a"]


def body(value: object = "hello", **fields: object) -> dict[str, object]:
    return {"model": MODEL, "input": value, **fields}


def ids_of(text: str) -> list[int]:
    return [BOS, *text.encode()]


def floats(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


async def ask(asked: dict[str, object], generator: FakeGenerator | None = None, **headers: str) -> httpx.Response:
    async with make_client(generator or FakeGenerator()) as client:
        return await client.post(
            PATH, json=asked, headers={name.replace("_", "-"): one for name, one in headers.items()}
        )


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("hello", [ids_of("hello")]),
        (TEXTS, [ids_of(text) for text in TEXTS]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_each_input_gets_its_vector_in_order(value: object, prompts: list[list[int]]) -> None:
    generator = FakeGenerator()
    reply = (await ask(body(value), generator)).json()
    num_tokens = sum(map(len, prompts))
    assert [one["index"] for one in reply["data"]] == list(range(len(prompts)))
    for one, prompt in zip(reply["data"], prompts, strict=True):
        assert struct.pack("<4f", *one["embedding"]) == vector_of(prompt)
    assert (reply["object"], reply["model"]) == ("list", MODEL)
    assert reply["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert {one.sampling.embed for one in generator.requests} == {LAST}
    assert not generator.live
    check_schema("CreateEmbeddingResponse", reply)


async def test_base64_and_floats_are_the_same_numbers() -> None:
    text, plain = [(await ask(body(encoding_format=form))).json()["data"][0] for form in ("base64", "float")]
    assert struct.pack("<4f", *plain["embedding"]) == base64.b64decode(text["embedding"]) == vector_of(ids_of("hello"))


async def test_an_embedding_is_cut_only_to_what_its_model_was_trained_for() -> None:
    whole, half = [(await ask(body(dimensions=size))).json()["data"][0]["embedding"] for size in (4, 2)]
    length = math.hypot(*whole[:2])
    assert half == pytest.approx([number / length for number in whole[:2]])
    for size in (1, 3, 5):
        refused = await ask(body(dimensions=size))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [[1], [1.5]]}, "input"),
        ({"input": [1, 5000]}, "input"),
        ({"input": "a" * MAX_CONTEXT}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"stream": True}, "stream"),
    ],
)
async def test_bad_input_is_refused_and_its_field_named(wrong: dict[str, Any], param: str) -> None:
    reply = await ask(body() | wrong)
    assert reply.status_code == 400
    assert str(reply.json()["error"]["param"]).split(".")[0] == param


def client_of(model: Any, config: RouterConfig | None = None, **more: Any) -> httpx.AsyncClient:
    app = create_app(
        FakeGenerator(), model, config or RouterConfig(), steps=StepHistory(), wall_clock=lambda: 0.0, **more
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


async def test_a_model_that_does_not_embed_says_so_and_what_would_change_it() -> None:
    async with client_of(text_model(pooling=NO_POOLING)) as client:
        reply = await client.post(PATH, json=body())
        other = await client.post(PATH, json=body() | {"model": "other"})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (404, "model_cannot_embed", "model")
    assert "model.pooling" in error["message"] and "files do not say" in error["message"]
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


async def test_keys_are_asked_for_here_too() -> None:
    keys = KeyRing()
    async with client_of(text_model(), keys=lambda: keys) as client:
        assert (await client.post(PATH, json=body())).status_code == 401


async def test_targets_go_along_but_no_pace_is_promised_where_nothing_follows() -> None:
    generator = FakeGenerator()
    await ask(body(), generator, **{TTFT: "500", TPOT: "50", DEADLINE: "3000"})
    (request,) = generator.requests
    assert 0 < request.service.ttft_s <= 0.5 and math.isinf(request.service.tpot_s)
    assert 0 < request.timeout_s <= 3
    assert request.sampling.max_tokens == 1


async def test_so_many_inputs_run_at_a_time_and_no_more() -> None:
    most = 0

    async def counted(request: Request):
        nonlocal most
        most = max(most, len(generator.live))
        async for output in echo(request):
            yield output

    generator = FakeGenerator(counted)
    reply = (await ask(body([[1 + index % 200] for index in range(300)]), generator)).json()
    assert [one["index"] for one in reply["data"]] == list(range(300))
    assert most <= MAX_LANES


async def test_what_fails_one_input_fails_all_and_leaves_nothing_running() -> None:
    async def script(request: Request):
        if request.prompt_ids == (9,):
            raise WorkerLost("gone")
        async for output in echo(request):
            yield output

    generator = FakeGenerator(script)
    reply = await ask(body([[5], [9], [7]]), generator)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "worker_lost")
    assert not generator.live


async def test_an_end_without_an_embedding_is_an_error() -> None:
    async def script(request: Request):
        async for output in echo(request):
            yield replace(output, embedding=b"")

    assert (await ask(body(), FakeGenerator(script))).status_code == 500
    assert (await ask(body(), FakeGenerator(fail(WorkerLost("gone"))))).status_code == 503


async def test_the_ledger_of_an_embedding_is_kept_and_shown() -> None:
    async with make_client(FakeGenerator()) as client:
        reply = (await client.post(PATH, json=body(TEXTS), headers={"x-timeline": "1"})).json()
        (kept,) = (await client.get("/debug/requests")).json()["requests"]
        metrics = (await client.get("/metrics")).text
    assert {"prepare", "unattributed"} <= set(reply["timeline"]["stages"])
    assert (kept["end"], kept["prompt_tokens"], kept["completion_tokens"]) == (
        "stop",
        sum(len(ids_of(text)) for text in TEXTS),
        0,
    )
    assert "prompt_tokens_total" in metrics


async def test_openai_s_client_reads_what_was_computed() -> None:
    async with (
        serve(FakeGenerator()) as served,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        reply = await client.embeddings.create(model=MODEL, input=TEXTS, user="u")  # asks for base64 by itself
        cut = await client.embeddings.create(model=MODEL, input="hello", dimensions=2, encoding_format="float")
        raw = await client.embeddings.with_raw_response.create(model=MODEL, input=[[1, 2]], encoding_format="base64")
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="other", input="hello")
    assert [one.embedding for one in reply.data] == [floats(vector_of(ids_of(text))) for text in TEXTS]
    assert len(cut.data[0].embedding) == 2
    assert json.loads(raw.text)["data"][0]["embedding"] == base64.b64encode(vector_of([1, 2])).decode()
