"""The relay itself: between a client and a server that sends numbered bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.faults.relay import CHUNK_BYTES, HEALED, Fault, Relay, relay_to
from tests.virtual import until

SENT = bytes(index * 7 % 251 for index in range(4 * CHUNK_BYTES))


@asynccontextmanager
async def link(fault: Fault) -> AsyncIterator[tuple[Relay, asyncio.StreamReader, asyncio.StreamWriter]]:
    """To a server that answers each byte with SENT, and closes when we do."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1):
                writer.write(SENT)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with relay_to(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as (relay, address):
        relay.set(fault)
        reader, writer = await asyncio.open_connection(*address.split(":"))
        try:
            yield relay, reader, writer
        finally:
            writer.transport.abort()
            server.close()


async def received(fault: Fault, num_bytes: int = len(SENT)) -> bytes:
    async with asyncio.timeout(5), link(fault) as (_, reader, writer):
        writer.write(b"?")
        return await reader.readexactly(num_bytes)


@pytest.mark.parametrize("fault", [HEALED, Fault(delay_s=0.01)], ids=["healed", "delay"])
async def test_what_is_not_hurt_arrives_as_it_was_sent(fault: Fault) -> None:
    assert await received(fault) == SENT


async def test_one_bit_of_each_so_many_bytes_is_flipped() -> None:
    hurt = await received(Fault(flip_every=1000))
    assert [at for at, (a, b) in enumerate(zip(hurt, SENT, strict=True)) if a != b] == [*range(0, len(SENT), 1000)]


async def test_one_bit_is_flipped_once() -> None:
    hurt = await received(Fault(flip_once_at=40_000))
    assert [at for at, (a, b) in enumerate(zip(hurt, SENT, strict=True)) if a != b] == [40_000]


async def test_chunks_come_twice() -> None:
    twice = await received(Fault(duplicates=True), 2 * len(SENT))
    assert twice != SENT * 2
    assert sorted(twice) == sorted(SENT * 2)


async def test_chunks_change_places() -> None:
    swapped = await received(Fault(reorders=True))
    assert swapped != SENT
    assert sorted(swapped) == sorted(SENT)


async def test_a_truncated_connection_is_closed_after_so_many_bytes() -> None:
    async with asyncio.timeout(5), link(Fault(truncate_at=100)) as (_, reader, writer):
        writer.write(b"?")
        assert await reader.read() == SENT[:100]


async def test_a_half_open_connection_stays_and_is_silent_until_it_is_healed() -> None:
    async with asyncio.timeout(5), link(Fault(swallows=True)) as (relay, reader, writer):
        writer.write(b"?")
        await until(lambda: relay.num_bytes >= len(SENT))
        relay.set(HEALED)
        writer.write(b"?")
        assert await reader.readexactly(len(SENT)) == SENT, "and nothing of what was swallowed"


async def test_a_cut_resets_what_is_open_and_what_is_opened_until_it_is_healed() -> None:
    async with asyncio.timeout(5), link(HEALED) as (relay, reader, writer):
        writer.write(b"?")
        await reader.readexactly(len(SENT))
        relay.set(Fault(is_cut=True))
        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert relay._server is not None
        host, port = relay._server.sockets[0].getsockname()
        later, _ = await asyncio.open_connection(host, port)
        with pytest.raises(ConnectionResetError):
            await later.read()
        relay.set(HEALED)
        again, writes = await asyncio.open_connection(host, port)
        writes.write(b"?")
        assert await again.readexactly(len(SENT)) == SENT
        writes.transport.abort()
