"""What gateways hear of a prefix cache: all of it, in messages of a bounded size, whenever they come or fall behind."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from engine.block_manager import BlockManager
from engine.cache_feed import MAX_BEHIND, MAX_NAMES, CacheFeed
from engine.host_tier import HostTier
from engine.planes import attention_layout
from engine.pool import SharedPool
from engine.step_shape import StepRecord, decode_shape
from engine.streams import StreamBatch
from engine.types import CacheNews, Key
from tests.engine.test_block_manager import chain, fill, holder
from tests.engine.test_streams import Streams, open_stream, output, read


def hear(known: set[int], news: CacheNews) -> set[int]:
    assert len(news.kept) + len(news.lost) <= MAX_NAMES
    return ((set() if news.anew else known) | set(news.kept)) - set(news.lost)


async def heard(stream: AsyncGenerator[StreamBatch], known: set[int], enough: set[int]) -> set[int]:
    while known != enough:
        known = hear(known, (await read(stream)).cache)
    return known


# --- a worker's stream ----------------------------------------------------------------------------------------


async def test_whoever_comes_hears_all_that_there_is_then_what_changes() -> None:
    streams, num_names = Streams(), 2 * MAX_NAMES + 5
    streams.publish_cache(CacheNews(tuple(range(num_names))))
    stream = await open_stream(streams, "gateway")
    known = await heard(stream, set(), set(range(num_names)))
    streams.publish_cache(CacheNews((num_names,), (0, 1)))
    assert hear(known, (await read(stream)).cache) == set(range(2, num_names + 1))


async def test_a_gateway_that_comes_again_forgets_what_it_has_missed_the_loss_of() -> None:
    streams = Streams()
    streams.publish_cache(CacheNews((1, 2, 3)))
    first = await open_stream(streams, "gateway")
    known = await heard(first, set(), {1, 2, 3})
    await first.aclose()
    streams.publish_cache(CacheNews((4,), (2,)))
    again = await open_stream(streams, "gateway")
    assert hear(known, (await read(again)).cache) == {1, 3, 4}


async def test_what_came_and_went_between_two_batches_is_told_as_it_is_at_last() -> None:
    streams = Streams()
    stream = await open_stream(streams, "gateway")
    for kept, lost in (((1, 2), ()), ((), (1,)), ((1,), (2,))):
        streams.publish_cache(CacheNews(kept, lost))
    assert (await read(stream)).cache == CacheNews((1,), (2,))


async def test_news_of_the_cache_waits_for_no_token() -> None:
    streams = Streams()
    streams.register(Key("a", 0), "gateway")
    stream = await open_stream(streams, "gateway")
    streams.publish_cache(CacheNews((1,)))
    batch = await read(stream)
    assert (batch.outputs, batch.cache) == ((), CacheNews((1,)))
    streams.publish([output("a")], batch.stats)
    assert (await read(stream)).cache == CacheNews()


async def test_a_calibration_is_told_to_each_gateway_once() -> None:
    streams, records = Streams(), (StepRecord(decode_shape([7]), 0.5),)
    early = await open_stream(streams, "early")
    streams.publish_calibration(records)
    late = await open_stream(streams, "late")
    for stream in (early, late):
        assert (await read(stream)).calibration == records
        streams.publish_cache(CacheNews((1,)))
        assert (await read(stream)).calibration == ()


def test_a_reader_that_falls_far_behind_costs_no_more_than_what_there_is() -> None:
    feed, known = CacheFeed(), dict[int, None]()
    feed.add(CacheNews((1,)), {1: None})
    told = hear(set(), feed.take())
    for name in range(2, 3 * MAX_BEHIND):  # each goes again with the next
        known = {name: None}
        feed.add(CacheNews((name,), (name - 1,)), known)
        assert len(feed._changes) <= MAX_BEHIND + 1
    while feed:
        told = hear(told, feed.take())
    assert told == set(known)


# --- the block manager ----------------------------------------------------------------------------------------


def test_it_tells_which_names_have_come_and_which_have_gone() -> None:
    blocks = BlockManager(4)
    blocks.free(holder("a"), fill(blocks, "a", 3))
    assert blocks.take_changes() == (chain("a", 3), [])
    assert blocks.take_changes() == ([], [])
    fill(blocks, "b", 2)
    kept, lost = blocks.take_changes()
    assert (sorted(kept), lost) == (chain("b", 2), chain("a", 3)[2:]), "tails go first"


def test_what_the_host_tier_keeps_is_not_lost_and_what_it_forgets_is() -> None:
    layout = attention_layout(1, 1, 4, 4, "float32")
    blocks = BlockManager(2, HostTier(layout, SharedPool(layout, 2), 2 * layout.bytes_per_block))
    for name in "abc":
        blocks.free(holder(name), fill(blocks, name, 2))
    known = set(chain("b", 2) + chain("c", 2))
    kept, lost = blocks.take_changes()
    assert (set(kept), set(lost)) == (known, set(chain("a", 2)))
    assert all(map(blocks.is_known, kept)) and not any(map(blocks.is_known, lost))
