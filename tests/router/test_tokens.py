"""POST /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from router.tokens import MAX_CHARS
from tests.router.fakes import BOS, EOS, MAX_CONTEXT, MODEL, FakeGenerator, chat, make_client


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with make_client(FakeGenerator()) as client:
        yield client


async def test_a_prompt_has_its_special_tokens(client: httpx.AsyncClient) -> None:
    reply = (await client.post("/tokenize", json={"model": MODEL, "prompt": "hé"})).json()
    ids = [BOS, *"hé".encode()]
    assert reply == {"count": len(ids), "max_model_len": MAX_CONTEXT, "tokens": ids, "token_strs": None}
    bare = await client.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False, "return_token_strs": True})
    assert bare.json()["tokens"] == ids[1:]
    assert bare.json()["token_strs"] == ["<0x68>", "<0xC3>", "<0xA9>"]


async def test_messages_are_rendered_as_for_chat(client: httpx.AsyncClient) -> None:
    asked = {"messages": chat("hi")["messages"]}
    reply = (await client.post("/tokenize", json=asked)).json()
    assert bytes(reply["tokens"]) == b"[user]hi[assistant]"
    reply = (await client.post("/tokenize", json={**asked, "add_generation_prompt": False})).json()
    assert bytes(reply["tokens"]) == b"[user]hi"
    reply = (await client.post("/tokenize", json={**asked, "add_special_tokens": True})).json()
    assert reply["tokens"][0] == BOS


async def test_tokens_become_the_text_again(client: httpx.AsyncClient) -> None:
    text = "naïve 日本 " * 3000  # longer than what is done on the loop
    made = (await client.post("/tokenize", json={"prompt": text})).json()
    assert made["count"] == len(text.encode()) + 1
    assert (await client.post("/detokenize", json={"tokens": made["tokens"]})).json() == {"prompt": text}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "messages"),
        ("/tokenize", {"prompt": "x" * (MAX_CHARS + 1)}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * (MAX_CHARS // 2 + 1)}] * 2}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "unspeakable"}]}, "messages"),
        ("/tokenize", {"prompt": "x", "chat_template": "{{"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [EOS + 1]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [True]}, "tokens.0"),
        ("/detokenize", {"tokens": [1] * (2**18 + 1)}, "tokens"),
    ],
)
async def test_faults(client: httpx.AsyncClient, path: str, body: dict[str, object], param: str) -> None:
    reply = await client.post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_another_model_is_not_found(client: httpx.AsyncClient) -> None:
    for path, fields in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        reply = await client.post(path, json={"model": "other", **fields})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
