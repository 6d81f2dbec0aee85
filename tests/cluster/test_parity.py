"""The face is the same with and without a hand-off: 200 requests over all parameters, answered by one worker and by a
prefill and a decode worker, give equal JSON, byte for byte, but for ids and times.

How a stream is cut into events depends on how quickly tokens and their reader come, so the events of each choice are
put together. `cached_tokens` is compared, too. The pools hold all blocks of all requests, because one worker alone has
more to hold than a prefill worker, and would evict others. No prompt here goes on after another one's answer, because
how much of that the prefill worker has depends on whether fetching it is quicker than computing it
(prefill_worker/fetching.py).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.harness import local_cluster
from tests.cluster.parity_requests import CHAT, NUM_LANES, Asked, parity_requests
from tests.cluster.tiny_model import NAME, write_tiny_model

pytestmark = pytest.mark.slow

SETTINGS: dict[str, object] = {"engine.num_blocks": 8192, "engine.host_tier_bytes": 0, "engine.runner": "thread"}
IDS_AND_TIMES = re.compile(rb'"(?:id|created)":(?:"[^"]*"|\d+)')
TEXTS = ("content", "text", "reasoning", "reasoning_content")  # whose pieces follow one another
TIMEOUT_S = 60.0


async def answers(folder: Path, asked: list[Asked], num_decode: int) -> list[bytes]:
    settings = {"model.name": str(folder), **SETTINGS}
    async with (
        local_cluster(settings, num_decode=num_decode) as cluster,
        httpx.AsyncClient(base_url=cluster.url, timeout=TIMEOUT_S) as client,
    ):
        by_lane = await asyncio.gather(*(lane(client, asked[number::NUM_LANES]) for number in range(NUM_LANES)))
    return [by_lane[number % NUM_LANES][number // NUM_LANES] for number in range(len(asked))]


async def lane(client: httpx.AsyncClient, asked: list[Asked]) -> list[bytes]:
    """One after the other, so that what lies in the caches is the same each time."""
    return [await answer(client, one) for one in asked]


async def answer(client: httpx.AsyncClient, one: Asked) -> bytes:
    reply = await client.post(one.path, json=one.body)
    assert reply.status_code == 200, (one, reply.text)
    data = IDS_AND_TIMES.sub(b'"":0', reply.content)
    return put_together(data) if one.is_streamed else data


def put_together(stream: bytes) -> bytes:
    """A stream's choices and usage as one JSON text; its other fields must be the same in all events."""
    *events, last = stream.removesuffix(b"\n\n").split(b"\n\n")
    assert last == b"data: [DONE]", last
    parsed = [json.loads(event.removeprefix(b"data: ")) for event in events]
    choices: dict[int, dict[str, Any]] = {}
    for event in parsed:
        for choice in event.pop("choices"):
            index = choice["index"]
            choices[index] = joined(choices.get(index), choice)
    usages = [event.pop("usage") for event in parsed if "usage" in event]
    assert not any(usages[:-1])
    (rest,) = {json.dumps(event) for event in parsed}
    return json.dumps([rest, usages[-1:], sorted(choices.items())]).encode()


def joined(left: Any, right: Any, name: str = "") -> Any:
    """What two pieces say together: texts and lists one after the other, the fields of objects likewise."""
    if left is None or right is None:
        return right if left is None else left
    if isinstance(left, dict):
        return {key: joined(left.get(key), right.get(key), key) for key in {**left, **right}}
    if isinstance(left, list):
        return left + right
    if name == "index":
        return left
    assert isinstance(left, str) and name in TEXTS, (name, left, right)
    return left + right


async def test_one_worker_and_two_answer_alike(tmp_path: Path) -> None:
    asked = parity_requests()
    folder = write_tiny_model(tmp_path / NAME)
    alone = await answers(folder, asked, num_decode=0)
    handed_off = await answers(folder, asked, num_decode=1)
    different = [both for both in zip(asked, alone, handed_off, strict=True) if both[1] != both[2]]
    assert not different, "\n".join(f"{one}\n{first}\n{second}" for one, first, second in different[:3])
    assert any(re.search(rb'"cached_tokens": ?[1-9]', reply) for reply in alone)


def test_the_requests_are_over_all_parameters() -> None:
    asked = parity_requests()
    sent = Counter(name for one in asked for name in one.body)
    assert len(asked) == 200
    assert 80 < sum(one.path == CHAT for one in asked) < 120 and 80 < sum(one.is_streamed for one in asked) < 120
    assert min(sent.values()) >= 5, sent


def test_every_form_of_answers_is_among_them_streamed_and_not() -> None:
    asked = parity_requests()
    forms = Counter((_form_of(one), one.is_streamed) for one in asked if _form_of(one))
    wanted = {"regex", "choice", "grammar", "json", "json_object", "json_schema", "text"}
    assert {form for form, _ in forms} == wanted and len(forms) == 2 * len(wanted), forms
    beside = Counter(name for one in asked if _form_of(one) for name in one.body)
    sent = {name for one in asked for name in one.body}
    assert sent - beside.keys() == set(), "some parameter is never sent beside a form"


def _form_of(one: Asked) -> str:
    """The name of the form that an answer is to have; empty: it is free."""
    named = one.body.get("response_format") or one.body.get("structured_outputs") or {}
    assert isinstance(named, dict)
    return str(named.get("type") or next(iter(named), ""))


@pytest.mark.parametrize("cuts", [[0, 9], [0, 1, 2, 9], [0, 4, 5, 9]])
def test_a_stream_says_the_same_however_it_is_cut(cuts: list[int]) -> None:
    text = "a text 日本"
    events = [
        {"choices": [{"index": 0, "text": text[start:end], "logprobs": {"tokens": list(text[start:end])}}]}
        for start, end in pairwise(cuts)
    ]
    stream = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    choice = json.loads(put_together(stream))[2][0][1]
    assert choice == {"index": 0, "text": text, "logprobs": {"tokens": list(text)}}
