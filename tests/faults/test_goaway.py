"""gRPC's client and the GOAWAYs that hurt links bring: what kills it, and that NamedCodes keeps that away."""

from __future__ import annotations

import asyncio
import signal
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.goaway import GOAWAY, HEADER_BYTES, LAST_NAMED, LOWEST_BYTE, NamedCodes
from tests.faults.relay import relay_to

CALL = """
import resource, sys, grpc
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
with grpc.insecure_channel(sys.argv[1]) as channel:
    try:
        channel.unary_unary("/service/method")(b"", timeout=10.0)
    except grpc.RpcError as error:
        print(error.code().name)
"""  # in a process of its own
LIMIT_S = 60.0
PREFACE_BYTES = 24  # with which a client begins; RFC 9113, 3.4
HEADERS, SETTINGS = 1, 4
CODES = {"the first": 13, "the last": 254, "what a PING may hold": 0x7D25_DA2B}  # without a name, in their lowest byte


def frame(kind: int, payload: bytes = b"", stream: int = 0) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, 0]) + struct.pack(">I", stream) + payload


def goaway(code: int, debug_data: bytes = b"") -> bytes:
    return frame(GOAWAY, struct.pack(">II", 0, code) + debug_data)


@asynccontextmanager
async def going_away(code: int) -> AsyncIterator[str]:
    """The address of a server that answers each call with it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(frame(SETTINGS))
            await reader.readexactly(PREFACE_BYTES)
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                await reader.readexactly(int.from_bytes(header[:3]))
                if header[3] == HEADERS:
                    writer.write(goaway(code))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def call(address: str) -> tuple[int | None, str]:
    """How a process that calls there ends, and what it printed."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CALL, address, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(LIMIT_S):
            printed = b"".join(await process.communicate())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, printed.decode()


@pytest.mark.parametrize("kind", CODES)
async def test_a_code_without_a_name_aborts_grpc_unless_it_is_given_one(kind: str) -> None:
    """When this fails because gRPC lives, NamedCodes has had its time."""
    async with going_away(CODES[kind]) as server, relay_to(server, NamedCodes) as (_, relay):
        (bare, told), (named, printed) = await asyncio.gather(call(server), call(relay))
    assert (bare, "UNREACHABLE CODE" in told) == (-signal.SIGABRT, True), told
    assert (named, "UNAVAILABLE" in printed) == (0, True), printed


def with_a_name(one: bytes) -> bytes:
    at = HEADER_BYTES + LOWEST_BYTE
    return one[:at] + bytes([min(one[at], LAST_NAMED)]) + one[at + 1 :] if one[3] == GOAWAY else one


OTHERS = st.builds(
    frame, st.integers(0, 255).filter(lambda kind: kind != GOAWAY), st.binary(max_size=40), st.integers(0, 2**31)
)


@given(
    frames=st.lists(OTHERS | st.builds(goaway, st.integers(0, 2**32 - 1), st.binary(max_size=5)), max_size=6),
    cuts=st.lists(st.integers(0, 200)),
)
def test_only_codes_without_a_name_change_however_the_bytes_are_cut(frames: list[bytes], cuts: list[int]) -> None:
    data, named, got = b"".join(frames), NamedCodes(), b""
    for start, stop in pairwise(sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})):
        got += named(data[start:stop])
    assert got == b"".join(map(with_a_name, frames))
