"""Several answers to one prompt, as clients see them, and as the dispatcher places them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from engine.errors import InvalidRequest, Overloaded, SteelyardError, TransferFailed
from engine.types import ErrorInfo, FinishReason, Key, Request, TokenLogprob, TokenOutput
from tests.router.fake_workers import Cluster, ready, request, token
from tests.router.fakes import CHAT, COMPLETIONS, FakeGenerator, chat, completion, events, make_client, output
from tests.virtual import in_virtual_time, settle

# --- the face ---------------------------------------------------------------------------------------------------


async def count(request: Request) -> AsyncIterator[TokenOutput]:
    """As many letters as the choice says, and one: b, cc, ddd."""
    choice = request.sampling.choice
    for index in range(choice + 1):
        await asyncio.sleep(0)
        finish = FinishReason.STOP if index == choice else None
        yield output(request, index, (ord("b") + choice,), finish)


async def test_a_whole_reply_has_all_choices_in_order_and_their_tokens_in_its_usage() -> None:
    generator = FakeGenerator(count)
    async with make_client(generator) as client:
        reply = (await client.post(CHAT, json=chat(n=3, seed=5))).json()
        plain = (await client.post(COMPLETIONS, json=completion(n=3))).json()
    assert [(one["index"], one["message"]["content"]) for one in reply["choices"]] == [(0, "b"), (1, "cc"), (2, "ddd")]
    assert [(one["index"], one["text"]) for one in plain["choices"]] == [(0, "b"), (1, "cc"), (2, "ddd")]
    assert reply["usage"]["completion_tokens"] == 6 and plain["usage"]["completion_tokens"] == 6
    assert reply["usage"]["prompt_tokens"] == len(generator.requests[0].prompt_ids)
    asked = generator.requests[:3]
    assert [one.sampling.choice for one in asked] == [0, 1, 2] and {one.sampling.seed for one in asked} == {5}
    assert not generator.live


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_tells_its_choices_apart_and_closes_each(path: str) -> None:
    body = {**(chat() if path == CHAT else completion()), "n": 3, "stream": True}
    async with make_client(FakeGenerator(count)) as client:
        seen = events(await client.post(path, json=body))
    texts, finishes = ["", "", ""], [None, None, None]
    for event in seen:
        for choice in event["choices"]:
            text = choice["delta"].get("content", "") if path == CHAT else choice["text"]
            assert finishes[choice["index"]] is None, "nothing comes after a choice was closed"
            texts[choice["index"]] += text
            finishes[choice["index"]] = choice["finish_reason"]
    assert (texts, finishes) == (["b", "cc", "ddd"], ["stop"] * 3)
    if path == CHAT:
        assert [event["choices"][0]["index"] for event in seen[:3]] == [0, 1, 2]
        assert all(event["choices"][0]["delta"]["role"] == "assistant" for event in seen[:3])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_its_choice_alone(stream: bool) -> None:
    generator = FakeGenerator(count)
    async with make_client(generator) as client:
        response = await client.post(COMPLETIONS, json=completion(n=3, stop="cc", stream=stream))
    parts = events(response) if stream else [response.json()]
    texts = ["", "", ""]
    for part in parts:
        for choice in part["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["b", "", "ddd"]
    assert not generator.live


async def test_a_choice_that_is_stopped_early_is_cancelled_where_it_is_made() -> None:
    async def long(request: Request) -> AsyncIterator[TokenOutput]:
        for index in range(6):
            yield output(
                request, index, (ord("a") + request.sampling.choice,), FinishReason.LENGTH if index == 5 else None
            )

    generator = FakeGenerator(long)
    async with make_client(generator) as client:
        reply = (await client.post(COMPLETIONS, json=completion(n=2, stop="bb"))).json()
    assert [(one["text"], one["finish_reason"]) for one in reply["choices"]] == [("aaaaaa", "length"), ("", "stop")]
    assert generator.cancelled == [f"{generator.requests[0].request_id}.1"]
    assert reply["usage"]["completion_tokens"] == 8


async def with_prompt(request: Request) -> AsyncIterator[TokenOutput]:
    following = request.prompt_ids[1:]
    scored = tuple(TokenLogprob(-one / 100, 2, ((one + 1, -0.01),)) for one in following)
    own = scored if request.sampling.choice == 0 and request.sampling.prompt_logprobs >= 0 else ()
    yield replace(output(request, 0, (ord("x"),), FinishReason.LENGTH), prompt_logprobs=own)


async def test_prompt_logprobs_stand_where_peers_put_them() -> None:
    async with make_client(FakeGenerator(with_prompt)) as client:
        whole: dict[str, Any] = (await client.post(COMPLETIONS, json=completion("abc", prompt_logprobs=1, n=2))).json()
        reply: dict[str, Any] = (await client.post(CHAT, json=chat("abc", prompt_logprobs=1))).json()
        without = (await client.post(CHAT, json=chat("abc"))).json()
    first, second = (choice["prompt_logprobs"] for choice in whole["choices"])
    assert first == second and first[0] is None and len(first) == 4  # BOS, a, b, c
    assert first[1] == {
        "98": {"logprob": -0.01, "rank": 1, "decoded_token": "b"},
        "97": {"logprob": -0.97, "rank": 2, "decoded_token": "a"},
    }
    assert reply["prompt_logprobs"][0] is None and "prompt_logprobs" not in reply["choices"][0]
    assert "prompt_logprobs" not in without


# --- the dispatcher ---------------------------------------------------------------------------------------------


class Answers:
    """Consumes a request of several answers: the tokens of each by its id, and the error that ended it."""

    def __init__(self, cluster: Cluster, num: int) -> None:
        first = request("r", max_tokens=5)
        siblings = [first.sibling(Key(f"r.{choice}", 0), choice) for choice in range(1, num)]
        self.ids: dict[str, list[int]] = {one.request_id: [] for one in (first, *siblings)}
        self.finished: list[str] = []
        self.error: SteelyardError | None = None
        self._outputs = cluster.dispatcher.generate(first, *siblings)
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            async with aclosing(self._outputs) as outputs:
                async for one in outputs:
                    assert one.first_index == len(self.ids[one.key.request_id]) or one.finish is FinishReason.ABORT
                    self.ids[one.key.request_id] += one.token_ids
                    self.finished += [one.key.request_id] if one.finish else []
        except SteelyardError as error:
            self.error = error


def key(choice: int, epoch: int = 0) -> Key:
    return Key(f"r.{choice}" if choice else "r", epoch)


async def asked(cluster: Cluster, num: int = 3) -> Answers:
    answers = Answers(cluster, num)
    await settle()
    return answers


def failure(key: Key, error: SteelyardError) -> TokenOutput:
    return TokenOutput(key, 0, (), FinishReason.ERROR, ErrorInfo(error.code, error.message))


@in_virtual_time
async def test_all_answers_are_one_submission_and_end_each_on_its_own() -> None:
    cluster = await ready("p0", "d0")
    answers = await asked(cluster)
    (submission,) = cluster["p0"].submissions
    assert [one.key for one in submission.requests] == [key(0), key(1), key(2)]
    cluster["p0"].say(*(token(key(choice), 0, 10 + choice) for choice in range(3)))
    await settle()
    for choice in range(3):
        cluster["d0"].say(token(key(choice), 1, 20 + choice, finish=FinishReason.LENGTH))
        await settle()
    assert answers.ids == {"r": [10, 20], "r.1": [11, 21], "r.2": [12, 22]}
    assert answers.task.done() and answers.error is None
    assert not cluster["d0"].aborted and not cluster["p0"].aborted
    await cluster.dispatcher.close()


@in_virtual_time
async def test_a_placement_that_fails_before_the_first_tokens_is_made_again_for_all() -> None:
    cluster = await ready("p0", "d0")
    answers = await asked(cluster)
    cluster["p0"].say(*(failure(key(choice), Overloaded("full")) for choice in range(3)))
    await asyncio.sleep(1)
    first, second = cluster["p0"].submissions
    assert len(first.siblings) == 2 and [one.key for one in second.requests] == [key(0, 1), key(1, 1), key(2, 1)]
    cluster["p0"].say(*(token(key(choice, 1), 0, 7, finish=FinishReason.STOP) for choice in range(3)))
    await settle()
    assert answers.task.done() and answers.ids == {"r": [7], "r.1": [7], "r.2": [7]}
    await cluster.dispatcher.close()


@in_virtual_time
async def test_a_lost_worker_before_the_first_tokens_costs_one_placement() -> None:
    cluster = await ready("p0", "p1", "d0")
    await asked(cluster)
    cluster["p0"].die()
    await asyncio.sleep(1)
    (again,) = cluster["p1"].submissions
    assert [one.key for one in again.requests] == [key(0, 1), key(1, 1), key(2, 1)]
    await cluster.dispatcher.close()


@in_virtual_time
async def test_first_tokens_of_a_placement_that_was_given_up_do_not_part_the_answers() -> None:
    cluster = await ready("p0", "p1", "d0", "d1")
    answers = await asked(cluster, 2)
    (before,) = cluster["p0"].submissions
    assert before.decode is not None and before.decode.worker_id == "d0"
    cluster["d0"].die()
    await settle()
    cluster["p0"].say(token(key(0), 0), token(key(1), 0))
    await asyncio.sleep(1)
    (again,) = [one for name in ("p0", "p1") for one in cluster[name].submissions if one is not before]
    assert [one.key for one in again.requests] == [key(0, 1), key(1, 1)]
    assert answers.ids == {"r": [], "r.1": []}
    await cluster.dispatcher.close()


@in_virtual_time
async def test_after_its_first_token_each_goes_its_own_way() -> None:
    cluster = await ready("p0", "d0")
    answers = await asked(cluster)
    cluster["p0"].say(*(token(key(choice), 0, 10 + choice) for choice in range(3)))
    cluster["d0"].say(*(failure(key(choice), TransferFailed("broken")) for choice in range(2)))
    await asyncio.sleep(1)
    again = {one.request.request_id: one for one in cluster["d0"].submissions}
    assert again.keys() == {"r", "r.1"} and not any(one.siblings for one in again.values())
    assert again["r.1"].request.generated_ids == (11,) and again["r.1"].request.sampling.choice == 1
    cluster["d0"].say(*(token(key(choice, 1), 1, 5, finish=FinishReason.LENGTH) for choice in range(2)))
    cluster["d0"].say(token(key(2), 1, 6, finish=FinishReason.LENGTH))
    await settle()
    assert answers.ids == {"r": [10, 5], "r.1": [11, 5], "r.2": [12, 6]} and answers.error is None
    await cluster.dispatcher.close()


@in_virtual_time
async def test_one_that_is_cancelled_is_aborted_alone_and_what_still_comes_of_it_is_dropped() -> None:
    cluster = await ready("p0", "d0")
    answers = await asked(cluster, 2)
    cluster["p0"].say(*(token(key(choice), 0, 10 + choice) for choice in range(2)))
    await settle()
    cluster.dispatcher.cancel("r.1")
    cluster["d0"].say(token(key(1), 1, 99), token(key(0), 1, 20, finish=FinishReason.LENGTH))
    await settle()
    assert answers.ids == {"r": [10, 20], "r.1": [11]} and answers.finished == ["r.1", "r"]
    assert set(cluster["d0"].aborted) == {key(1)} and answers.task.done()
    await cluster.dispatcher.close()


@in_virtual_time
@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.5])
async def test_one_that_is_cancelled_while_it_is_placed_again_ends_there(after_s: float) -> None:
    """In the pause before that, or after it."""
    cluster = await ready("p0", "d0")
    answers = await asked(cluster, 2)
    cluster["p0"].say(*(token(key(choice), 0, 10 + choice) for choice in range(2)))
    await settle()
    cluster["d0"].say(failure(key(1), TransferFailed("broken")))
    await asyncio.sleep(after_s)
    cluster.dispatcher.cancel("r.1")
    await settle()
    num_before = len(cluster["d0"].submissions)
    cluster["d0"].say(token(key(0), 1, 20, finish=FinishReason.LENGTH))
    await asyncio.sleep(30)
    assert answers.ids == {"r": [10, 20], "r.1": [11]} and answers.finished == ["r.1", "r"]
    assert answers.task.done() and answers.error is None
    assert len(cluster["d0"].submissions) == num_before, "nobody computes it again"
    await cluster.dispatcher.close()


@in_virtual_time
async def test_a_client_that_leaves_takes_all_answers_along() -> None:
    cluster = await ready("p0", "d0")
    answers = await asked(cluster)
    answers.task.cancel()
    await settle()
    assert set(cluster["p0"].aborted) == {key(choice) for choice in range(3)}
    assert cluster.dispatcher.health().num_live_requests == 0
    await cluster.dispatcher.close()


@in_virtual_time
async def test_answers_count_as_live_requests() -> None:
    cluster = await ready("p0", "d0", max_live_requests=4)
    first, second, third = await asked(cluster, 3), Answers(cluster, 5), await asked(cluster, 2)
    assert first.error is None and isinstance(second.error, InvalidRequest) and second.error.param == "n"
    assert isinstance(third.error, Overloaded)
    await cluster.dispatcher.close()


@in_virtual_time
async def test_what_fails_one_for_good_fails_all() -> None:
    cluster = await ready("p0", "d0")
    answers = await asked(cluster)
    cluster["p0"].say(*(failure(key(choice), InvalidRequest("no")) for choice in range(3)))
    await settle()
    assert isinstance(answers.error, InvalidRequest) and cluster.dispatcher.health().num_live_requests == 0
    await cluster.dispatcher.close()
