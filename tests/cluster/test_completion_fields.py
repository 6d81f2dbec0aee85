"""Echo, several prompts and best_of over real workers: what a hand-off and several submissions make of them."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.cluster.harness import local_cluster
from tests.cluster.tiny_model import NAME, write_tiny_model

PROMPTS = ["hello there", "abc"]
ECHO = {"prompt": PROMPTS, "max_tokens": 5, "n": 2, "echo": True, "logprobs": 2, "seed": 3}


def texts_of(chunks: list[dict]) -> list[str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return [texts[index] for index in sorted(texts)]


async def test_real_workers_answer_all_fields_alike_whole_and_streamed(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / NAME)
    settings = {
        "model.name": str(folder),
        "engine.num_blocks": 256,
        "engine.host_tier_bytes": 0,
        "engine.runner": "thread",
    }
    async with local_cluster(settings) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:

        async def post(**fields: object) -> httpx.Response:
            reply = await client.post("/v1/completions", json={"model": NAME, **fields})
            assert reply.status_code == 200, reply.text
            return reply

        whole = (await post(**ECHO)).json()
        usage = {"stream_options": {"include_usage": True}}
        lines = (await post(**ECHO, stream=True, **usage)).text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert texts_of(chunks) == [choice["text"] for choice in whole["choices"]]
        assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 20
        assert whole["usage"]["prompt_tokens"] == sum(map(len, PROMPTS))
        for index, choice in enumerate(whole["choices"]):
            told, prompt = choice["logprobs"], PROMPTS[index // 2]
            assert choice["text"].startswith(prompt) and "".join(told["tokens"][: len(prompt)]) == prompt
            assert told["token_logprobs"][0] is None and len(told["tokens"]) == len(prompt) + 5

        alone = (await post(**ECHO | {"max_tokens": 0, "n": 1})).json()
        assert [choice["text"] for choice in alone["choices"]] == PROMPTS
        assert alone["usage"]["completion_tokens"] == 0
        first = whole["choices"][0]["logprobs"]["token_logprobs"]
        assert alone["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(first[1 : len(PROMPTS[0])])

        every = (await post(prompt="abc", max_tokens=4, n=4, seed=3, logprobs=0)).json()["choices"]
        best = (await post(prompt="abc", max_tokens=4, n=2, best_of=4, seed=3)).json()
        means = {choice["text"]: sum(choice["logprobs"]["token_logprobs"]) / 4 for choice in every}
        ranked = sorted(means, key=lambda text: -means[text])
        assert [choice["text"] for choice in best["choices"]] == ranked[:2]
        assert best["usage"]["completion_tokens"] == 16
        assert not cluster.dispatcher._live
