"""Writes of a turn leave at its end, in order; a close sends what waits, an abort drops it."""

from __future__ import annotations

import asyncio

from cluster.turn_writer import Turn, TurnWriter


class Wire(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[bytes | str] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.told.append(bytes(data))

    def is_closing(self) -> bool:
        return "closed" in self.told

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        self.told.append("closed")

    def abort(self) -> None:
        self.told.append("aborted")


def writers(count: int) -> list[tuple[Wire, TurnWriter]]:
    turn = Turn(asyncio.get_running_loop())
    wires = [Wire() for _ in range(count)]
    return [(wire, TurnWriter(wire, turn)) for wire in wires]


async def test_what_is_written_in_a_turn_leaves_at_its_end_and_counts_as_buffered_until_then() -> None:
    pairs = writers(2)
    for wire, writer in pairs:
        writer.write(b"one")
        writer.write(b"two")
        assert (wire.told, writer.get_write_buffer_size()) == ([], 6)
    await asyncio.sleep(0)
    assert [wire.told for wire, _ in pairs] == [[b"onetwo"], [b"onetwo"]]
    pairs[0][1].write(b"three")
    await asyncio.sleep(0)
    assert pairs[0][0].told == [b"onetwo", b"three"]


async def test_a_close_sends_what_waits_and_an_abort_drops_it() -> None:
    (closed, first), (aborted, second) = writers(2)
    for writer in (first, second):
        writer.write(b"end")
    first.close()
    second.abort()
    await asyncio.sleep(0)
    assert (closed.told, aborted.told) == ([b"end", "closed"], ["aborted"])
