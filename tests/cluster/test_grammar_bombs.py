"""Grammars that take long, for ever, or much memory are refused in time, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.grammar_check import GrammarProcess
from cluster.grammar_process import vocabulary_message
from router.grammar import HEADER, json_schema_grammar
from tests.cluster.harness import local_cluster
from tests.cluster.tiny_model import EOS, VOCAB, byte_tokenizer, write_tiny_model

LIMIT_S = 2.0
SLACK_S = 4.0  # of a machine with other things to do: that a process is ended and another one started
AMBIGUOUS = "start: e e e e e e e e\ne: e e | e e e | A\nA: /a+/"  # takes for ever, whatever llguidance's limits
DIVISIBLE: dict[str, Any] = {"type": "integer", "multipleOf": 999983}  # a state for each remainder
DOUBLING = "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(24)) + '\nT24: "a"'
GOOD = json_schema_grammar({"type": "object", "properties": {"x": {"enum": [1, 2]}}})
BOMBS = {
    "ambiguous": AMBIGUOUS,
    "divisible": json_schema_grammar(DIVISIBLE),
    "doubling": DOUBLING,
    "optional": f"{HEADER}start: A\nA: /{'a?' * 5000}/",
    "repeated": f"{HEADER}start: A\nA: /((a{{0,100}}b?){{0,100}}c?){{0,100}}/",
    "many items": "start: x0\n" + "\n".join(f"x{i}: x{i + 1}{{0,9}} x{i + 1}{{3,9}}" for i in range(30)) + '\nx30: "a"',
}


@asynccontextmanager
async def check(limit_s: float = LIMIT_S) -> AsyncIterator[GrammarProcess]:
    made = GrammarProcess(vocabulary_message(byte_tokenizer().to_str(), VOCAB, (EOS,)), limit_s)
    try:
        yield made
    finally:
        await made.stop()


async def test_every_bomb_ends_in_time_and_what_comes_after_is_tried_again() -> None:
    async with check() as grammars:
        assert not await grammars.problem_with(GOOD)
        for name, grammar in BOMBS.items():
            begun = time.monotonic()
            problem = await grammars.problem_with(grammar)
            assert time.monotonic() - begun < LIMIT_S + SLACK_S, name
            assert problem or name == "repeated", name
        assert not await grammars.problem_with(json_schema_grammar({"enum": ["after", "them"]}))


async def test_who_asks_for_a_known_grammar_does_not_wait_for_a_stranger_s() -> None:
    async with check(limit_s=30.0) as grammars:
        await grammars.problem_with(GOOD)
        bomb = asyncio.create_task(grammars.problem_with(AMBIGUOUS))
        await asyncio.sleep(0.2)
        async with asyncio.timeout(1.0):
            assert not await grammars.problem_with(GOOD)
        assert not bomb.done()
        bomb.cancel()  # its client went away: the process is ended, and the next one is tried by another
        await asyncio.gather(bomb, return_exceptions=True)
        assert not await grammars.problem_with(json_schema_grammar({"enum": [3]}))


async def test_what_is_wrong_is_told_as_llguidance_does() -> None:
    async with check() as grammars:
        assert "unknown name" in await grammars.problem_with("start: nothing")


@pytest.mark.slow
async def test_a_bomb_is_a_400_and_answers_go_on_beside_it(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    settings = {"model.name": str(folder), "engine.runner": "process", "router.grammar_compile_s": LIMIT_S}
    plain = {"model": "model", "prompt": "x", "max_tokens": 8, "temperature": 0}
    async with local_cluster(settings) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        await client.post("/v1/completions", json=plain)
        wanted = {"structured_outputs.grammar": {"grammar": AMBIGUOUS}, "structured_outputs.json": {"json": DIVISIBLE}}
        for field, form in wanted.items():
            asked = asyncio.create_task(client.post("/v1/completions", json=plain | {"structured_outputs": form}))
            longest_s, num = 0.0, 0
            while not asked.done():
                begun = time.monotonic()
                assert (await client.post("/v1/completions", json=plain)).status_code == 200
                longest_s, num = max(longest_s, time.monotonic() - begun), num + 1
            reply = await asked
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, field), reply.text
            assert any(words in reply.text for words in ("router.grammar_compile_s", "lexer", "hold up")), reply.text
            assert num >= 3 and longest_s < LIMIT_S / 2
