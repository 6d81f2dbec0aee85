"""Token streams: one batched stream per gateway, keep-alives, the newest subscriber, orphans.

Times are short, and nothing is asserted about how long a thing takes: only that it comes, or that it has not come
although a later one has.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from engine.step_shape import StepRecord, decode_shape
from engine.streams import MAX_BATCH_STEPS, StreamBatch, TokenStreams
from engine.types import EngineStats, FinishReason, Key, TokenLogprob, TokenOutput

SOON = 0.01  # seconds until an orphan is aborted, where one is wanted
NEVER = 3600.0
LIMIT_S = 10.0


class Streams(TokenStreams):
    """Remembers what was aborted."""

    def __init__(self, orphan_s: float = NEVER, keepalive_s: float = NEVER) -> None:
        self.aborted: list[Key] = []
        self._news = asyncio.Event()
        super().__init__(orphan_s, self._note, keepalive_s)

    async def wait_for_abort(self, count: int) -> list[Key]:
        async with asyncio.timeout(LIMIT_S):
            while len(self.aborted) < count:
                self._news.clear()
                await self._news.wait()
        return self.aborted

    def _note(self, key: Key) -> None:
        self.aborted.append(key)
        self._news.set()


def key(name: str) -> Key:
    return Key(name, 0)


def record(step_s: float) -> StepRecord:
    return StepRecord(decode_shape([7]), step_s)


def output(name: str, index: int = 0, finish: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(key(name), index, (index + 100,), finish)


async def read(stream: AsyncGenerator[StreamBatch]) -> StreamBatch:
    async with asyncio.timeout(LIMIT_S):
        return await anext(stream)


async def open_stream(streams: TokenStreams, gateway_id: str) -> AsyncGenerator[StreamBatch]:
    stream = streams.subscribe(gateway_id)
    assert (await read(stream)).outputs == ()  # says at once that the stream is there
    return stream


async def turn_loop() -> None:
    """Let everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


# --- batches --------------------------------------------------------------------------------------------------


async def test_all_that_came_since_the_last_batch_comes_in_the_next() -> None:
    streams = Streams()
    for name in "ab":
        streams.register(key(name), "gateway")
    stream = await open_stream(streams, "gateway")
    streams.publish([output("a"), output("b")], EngineStats())
    streams.publish([output("a", 1)], EngineStats(num_steps=2))
    batch = await read(stream)
    assert batch == StreamBatch((output("a"), output("b"), output("a", 1)), EngineStats(num_steps=2))
    await stream.aclose()


async def test_every_gateway_gets_the_records_of_all_steps_once() -> None:
    streams = Streams(keepalive_s=SOON)
    streams.register(key("a"), "one")
    one, two = await open_stream(streams, "one"), await open_stream(streams, "two")
    for step_s in (0.1, 0.2):
        streams.publish([], EngineStats(), [record(step_s)])
    streams.publish([output("a")], EngineStats(), [record(0.3)])
    expected = (record(0.1), record(0.2), record(0.3))
    batch = await read(one)
    assert (batch.outputs, batch.steps) == ((output("a"),), expected)
    assert (await read(two)).steps == expected
    assert (await read(one)).steps == ()
    await one.aclose()
    await two.aclose()


async def test_a_step_without_tokens_wakes_no_reader() -> None:
    streams = Streams()
    stream = await open_stream(streams, "gateway")
    reading = asyncio.create_task(read(stream))
    await turn_loop()
    streams.publish([], EngineStats(), [record(0.1)])
    await turn_loop()
    assert not reading.done()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await stream.aclose()


async def test_of_a_reader_that_is_behind_the_oldest_records_are_dropped() -> None:
    streams = Streams(keepalive_s=SOON)
    stream = await open_stream(streams, "gateway")
    for number in range(MAX_BATCH_STEPS + 3):
        streams.publish([], EngineStats(), [record(number)])
    steps = (await read(stream)).steps
    assert [step.step_s for step in steps] == list(range(3, MAX_BATCH_STEPS + 3))
    await stream.aclose()


async def test_a_reader_is_woken_by_news() -> None:
    streams = Streams()
    streams.register(key("a"), "gateway")
    stream = await open_stream(streams, "gateway")
    reading = asyncio.create_task(read(stream))
    await turn_loop()
    assert not reading.done()
    streams.publish([output("a")], EngineStats())
    assert (await reading).outputs == (output("a"),)
    reading = asyncio.create_task(read(stream))
    await turn_loop()
    assert not reading.done(), "the news was read"
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await stream.aclose()


async def test_each_gateway_hears_of_its_own_requests_only() -> None:
    streams = Streams()
    streams.register(key("a"), "one")
    streams.register(key("b"), "two")
    one, two = await open_stream(streams, "one"), await open_stream(streams, "two")
    streams.publish([output("b"), output("a"), output("b", 1)], EngineStats())
    assert (await read(one)).outputs == (output("a"),)
    assert (await read(two)).outputs == (output("b"), output("b", 1))
    await one.aclose()
    await two.aclose()


async def test_outputs_without_an_owner_are_dropped() -> None:
    streams = Streams()
    for name in ("kept", "forgotten"):
        streams.register(key(name), "gateway")
    stream = await open_stream(streams, "gateway")
    streams.forget(key("forgotten"))
    streams.publish([output("forgotten"), output("unknown"), output("kept")], EngineStats())
    assert (await read(stream)).outputs == (output("kept"),)
    await stream.aclose()


async def test_another_epoch_is_another_request() -> None:
    streams = Streams()
    streams.register(Key("a", 1), "gateway")
    stream = await open_stream(streams, "gateway")
    late, new = TokenOutput(Key("a", 0), 3, (5,)), TokenOutput(Key("a", 1), 3, (6,))
    streams.publish([late, new], EngineStats())
    assert (await read(stream)).outputs == (new,)
    await stream.aclose()


async def test_a_finished_request_is_forgotten() -> None:
    streams = Streams()
    streams.register(key("a"), "gateway")
    stream = await open_stream(streams, "gateway")
    last = output("a", 7, FinishReason.STOP)
    streams.publish([last, output("a", 8)], EngineStats())
    assert (await read(stream)).outputs == (last,)
    assert streams.num_keys == 0
    await stream.aclose()


async def test_what_comes_before_the_subscriber_waits_for_it() -> None:
    streams = Streams()
    streams.register(key("a"), "gateway")
    streams.publish([output("a")], EngineStats())
    stream = await open_stream(streams, "gateway")
    assert (await read(stream)).outputs == (output("a"),)
    await stream.aclose()


async def test_silence_is_broken_by_empty_batches_with_the_newest_stats() -> None:
    streams = Streams(keepalive_s=0.001)
    stream = await open_stream(streams, "gateway")
    streams.publish([], EngineStats(num_steps=3))
    assert [await read(stream) for _ in range(3)] == [StreamBatch((), EngineStats(num_steps=3))] * 3
    streams.register(key("a"), "gateway")
    streams.publish([output("a")], EngineStats())
    assert (await read(stream)).outputs == (output("a"),)
    await stream.aclose()


# --- subscribers ----------------------------------------------------------------------------------------------


async def test_a_newer_subscriber_ends_the_older_one_and_gets_what_it_did_not_read() -> None:
    streams = Streams(orphan_s=0)
    streams.register(key("a"), "gateway")
    older = await open_stream(streams, "gateway")
    streams.publish([output("a")], EngineStats())
    newer = await open_stream(streams, "gateway")
    with pytest.raises(StopAsyncIteration):
        await read(older)
    assert (await read(newer)).outputs == (output("a"),)
    streams.publish([output("a", 1)], EngineStats())
    assert (await read(newer)).outputs == (output("a", 1),)
    await turn_loop()
    assert streams.aborted == [], "the end of the older stream orphans nothing"
    await newer.aclose()


async def test_a_waiting_older_subscriber_ends_with_the_next_news() -> None:
    streams = Streams()
    streams.register(key("a"), "gateway")
    older = await open_stream(streams, "gateway")
    waiting = asyncio.create_task(read(older))
    await turn_loop()
    newer = await open_stream(streams, "gateway")
    streams.publish([output("a")], EngineStats())
    assert (await read(newer)).outputs == (output("a"),)
    with pytest.raises(StopAsyncIteration):
        await waiting
    await newer.aclose()


# --- orphans --------------------------------------------------------------------------------------------------


async def test_requests_of_a_gateway_whose_stream_ended_are_aborted_after_a_while() -> None:
    streams = Streams(orphan_s=SOON)
    for name, gateway_id in (("a", "gone"), ("b", "gone"), ("c", "here")):
        streams.register(key(name), gateway_id)
    here, gone = await open_stream(streams, "here"), await open_stream(streams, "gone")
    await gone.aclose()
    assert streams.aborted == [], "not at once"
    assert await streams.wait_for_abort(2) == [key("a"), key("b")]
    assert streams.num_keys == 1
    streams.publish([output("a"), output("c")], EngineStats())
    assert (await read(here)).outputs == (output("c"),)
    await here.aclose()


async def test_requests_of_a_gateway_that_never_came_are_aborted_after_a_while() -> None:
    streams = Streams(orphan_s=SOON)
    streams.register(key("a"), "gateway")
    assert await streams.wait_for_abort(1) == [key("a")]
    assert streams.num_keys == 0


async def test_a_gateway_that_comes_back_in_time_keeps_its_requests_and_misses_nothing() -> None:
    streams = Streams(orphan_s=SOON)
    for name, gateway_id in (("a", "back"), ("z", "gone")):
        streams.register(key(name), gateway_id)
    first, gone = await open_stream(streams, "back"), await open_stream(streams, "gone")
    await first.aclose()
    streams.publish([output("a")], EngineStats())
    again = await open_stream(streams, "back")
    await gone.aclose()
    assert await streams.wait_for_abort(1) == [key("z")], "whose time began later and is over"
    assert (await read(again)).outputs == (output("a"),)
    await again.aclose()


async def test_a_cancelled_reader_counts_as_a_stream_that_ended() -> None:
    streams = Streams(orphan_s=SOON)
    streams.register(key("a"), "gateway")

    async def follow() -> None:
        async for _ in streams.subscribe("gateway"):
            pass

    reader = asyncio.create_task(follow())
    await turn_loop()
    reader.cancel()
    assert await streams.wait_for_abort(1) == [key("a")]


async def test_a_gateway_can_start_anew_after_its_requests_were_aborted() -> None:
    streams = Streams(orphan_s=SOON)
    streams.register(key("a"), "gateway")
    await streams.wait_for_abort(1)
    streams.register(key("b"), "gateway")
    stream = await open_stream(streams, "gateway")
    streams.publish([output("a"), output("b")], EngineStats())
    assert (await read(stream)).outputs == (output("b"),)
    await stream.aclose()


async def test_large_outputs_come_in_batches_that_fit_a_message() -> None:
    """Logprobs of prompts are many: several at once would break the message that carries everybody's tokens."""
    streams = Streams()
    stream = await open_stream(streams, "g")
    likely = (TokenLogprob(-1.0, 1, ((1, -1.0),) * 20),) * 2000  # about 670 kB
    names = [f"r{index}" for index in range(5)]
    for name in names:
        streams.register(key(name), "g")
    streams.publish([replace(output(name), prompt_logprobs=likely) for name in names], EngineStats())
    streams.publish([output(names[0], 1)], EngineStats())
    batches = [(await read(stream)).outputs for _ in range(5)]
    assert [[one.key.request_id for one in batch] for batch in batches[:4]] == [["r0"], ["r1"], ["r2"], ["r3"]]
    assert [one.first_index for one in batches[4]] == [0, 1]
    await stream.aclose()
