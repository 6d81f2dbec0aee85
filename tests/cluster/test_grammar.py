"""Constrained answers of running clusters: the same tokens as one engine's, whatever happens on the way."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from cluster.config import load_config
from engine.build import build_engine
from engine.setup import plan_engine
from engine.types import Key, Request, SamplingParams
from router.grammar import json_schema_grammar
from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.test_moving_streams import migrate
from tests.cluster.tiny_model import EOS, byte_tokenizer, write_tiny_model
from tests.engine.tiny import run

TEXT = {"type": "string", "pattern": "^[a-z]{30,40}$"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": TEXT, "kind": {"enum": ["grün", "rot"]}, "more": {"type": "array", "items": TEXT,
        "minItems": 2, "maxItems": 3}},
    "required": ["name", "kind", "more"],
    "additionalProperties": False,
}  # fmt: skip
SAMPLING = SamplingParams(max_tokens=250, temperature=1.5, seed=7, grammar=json_schema_grammar(SCHEMA))
ASKED = Request("asked", tuple(7 + token % 90 for token in range(45)), SAMPLING)


async def answer(cluster: LocalCluster, name: str, every: int = 0, stops: str = "") -> tuple[int, ...]:
    """The tokens; with a migration each time when so many more have come, or a worker that ends after the 20th."""
    tokens: list[int] = []
    async with aclosing(cluster.dispatcher.generate(replace(ASKED, request_id=name))) as outputs:
        async for output in outputs:
            num_before = len(tokens)
            tokens += output.token_ids
            if every and num_before // every < len(tokens) // every and len(tokens) < 90:
                await migrate(cluster, name)
            if stops and num_before < 20 <= len(tokens):
                here = next(one.worker for one in cluster.dispatcher.moves.generating() if one.request_id == name)
                await cluster.workers[here.worker_id].stop()
    return tuple(tokens)


def several_of(num: int) -> list[Request]:
    first = replace(ASKED, request_id="many")
    return [first, *(first.sibling(Key(f"many.{choice}", 0), choice) for choice in range(1, num))]


def one_engine(overrides: dict[str, object], num: int) -> list[tuple[int, ...]]:
    """The same answers, by one engine, each for itself."""
    config = load_config("configs/local.yaml", overrides)
    built = build_engine(plan_engine(config.model, config.engine, b"one"), None)
    return [tuple(run(built.engine, built.runner, [one])[one.key]) for one in several_of(num)]


async def answers(cluster: LocalCluster, num: int) -> list[tuple[int, ...]]:
    """Of several to one prompt, by their choice."""
    requests = several_of(num)
    tokens: dict[str, list[int]] = {one.request_id: [] for one in requests}
    async with aclosing(cluster.dispatcher.generate(*requests)) as outputs:
        async for output in outputs:
            tokens[output.key.request_id] += output.token_ids
    return [tuple(tokens[one.request_id]) for one in requests]


def check(tokens: tuple[int, ...]) -> None:
    assert tokens[-1] == EOS
    jsonschema.validate(json.loads(byte_tokenizer().decode(list(tokens[:-1]))), SCHEMA)


async def test_the_same_answer_wherever_it_is_computed(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    overrides = {
        "model.name": str(model), "engine.runner": "thread", "engine.block_size": 8, "router.canary_s": 600.0,
        "engine.kernels": "torch",  # the slower way: an answer shall not end before it has moved
    }  # fmt: skip
    wanted, *several = one_engine(overrides, 3)
    several.insert(0, wanted)
    check(wanted)
    assert len(set(several)) == 3
    async with local_cluster(overrides, num_decode=2) as cluster:
        assert await answer(cluster, "handed over") == wanted
        assert await answers(cluster, 3) == several
        assert await answer(cluster, "moves", every=7) == wanted
        assert dict(cluster.dispatcher.moves.counts).get("moved", 0) >= 3
        assert await asyncio.gather(*(answer(cluster, f"at once {index}") for index in range(3))) == [wanted] * 3
        assert await answer(cluster, "loses its worker", stops="decode") == wanted


async def test_clients_get_what_they_ask_for(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    overrides = {"model.name": str(model), "engine.runner": "process"}
    async with local_cluster(overrides) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        body = {"model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 250, "temperature": 1.5}
        wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
        whole = (await client.post("/v1/chat/completions", json=body | {"seed": 1, "response_format": wanted})).json()
        assert whole["choices"][0]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(whole["choices"][0]["message"]["content"]), SCHEMA)
        cut = {"seed": 1, "response_format": {"type": "json_object"}, "max_tokens": 1}
        choice = (await client.post("/v1/chat/completions", json=body | cut)).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("{", "length")
        plain = {"model": "model", "prompt": "x", "max_tokens": 50, "structured_outputs": {"choice": ["ja", "nein"]}}
        text = (await client.post("/v1/completions", json=plain)).json()["choices"][0]["text"]
        assert text in ("ja", "nein")
        deferred = {"regex": "[0-9]{3}-[a-z]{2}"}
        text = (await client.post("/v1/completions", json=plain | {"structured_outputs": deferred})).json()
        assert len(text["choices"][0]["text"]) == 6
