"""Tap: what it takes and what it leaves, and a fault in it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.types import FinishReason, TokenOutput
from router.ledger import Ledger
from router.live import LiveRequest
from router.policies.snapshot import Placement
from router.tap import Tap
from router.text_stream import TextStream
from tests.router.fake_workers import member, request, token
from tests.router.fakes import ByteDetokenizer
from tests.virtual import in_virtual_time, settle


@dataclass(slots=True)
class FakeLine:
    open: bool = True
    written: list[bytes] = field(default_factory=list)

    def is_open(self) -> bool:
        return self.open

    def write_now(self, body: bytes, /) -> None:
        self.written.append(body)


class Faulty(ByteDetokenizer):
    def push(self, ids: Iterable[int]) -> str:
        raise ValueError("no such token")


@dataclass(slots=True)
class Counts:
    gaps_s: list[float] = field(default_factory=list)
    charged: list[int] = field(default_factory=list)

    def charge(self, num_tokens: int, _now_s: float) -> None:
        self.charged.append(num_tokens)


def tap_on(line: FakeLine, counts: Counts, detokenizer: ByteDetokenizer | None = None) -> Tap:
    texts = TextStream(detokenizer or ByteDetokenizer(), ())
    return Tap(line, texts, Ledger(0.0), str.encode, counts.gaps_s.append, counts.charge, lambda: 2.0)


def live_request() -> LiveRequest:
    live = LiveRequest(request(), deadline=100.0)
    live.place(Placement(member("p0"), None))
    return live


@in_virtual_time
async def test_it_takes_what_comes_while_the_reader_waits_and_the_reader_all_else() -> None:
    live, line, read = live_request(), FakeLine(), []

    async def reader() -> None:
        while not read or read[-1].finish is None:
            output = await live.next_event()
            assert isinstance(output, TokenOutput)
            read.append(output)

    live.tap = tap_on(line, Counts()).take
    reading = asyncio.ensure_future(reader())
    live.take(token(live.key, 0, ord("a")), "p0")  # nobody waits yet
    await settle()
    live.take(token(live.key, 1, ord("b")), "p0")
    live.take(token(live.key, 2, ord("c")), "p0")
    line.open = False
    live.take(token(live.key, 3, ord("d")), "p0")
    line.open = True
    live.take(token(live.key, 4, ord("e")), "p0")  # not past what waits
    await settle()
    live.note("recovery", 1.0)
    live.take(token(live.key, 5, ord("f")), "p0")  # somebody has to be told of it
    await settle()
    live.take(token(live.key, 6, ord("g"), finish=FinishReason.LENGTH), "p0")
    await reading
    assert line.written == [b"b", b"c"]
    assert [output.token_ids for output in read] == [(97,), (100, 101), (102,), (103,)]
    assert live.tokens == list(b"abcdefg")


def test_it_keeps_the_times_and_charges() -> None:
    line, counts = FakeLine(), Counts()
    tap, key = tap_on(line, counts), live_request().key
    assert tap.take(token(key, 0, ord("a"))) and tap.take(token(key, 1, *b"bc"))
    assert (line.written, counts.gaps_s, counts.charged) == ([b"a", b"bc"], [2.0, 0.0], [1, 2])
    assert (tap.ledger.num_tokens, tap.texts.num_tokens) == (3, 3)


def test_half_a_character_writes_nothing_and_counts() -> None:
    line, counts = FakeLine(), Counts()
    tap, key = tap_on(line, counts), live_request().key
    for index, one in enumerate("é".encode()):
        assert tap.take(token(key, index, one))
    assert (line.written, tap.ledger.num_tokens) == (["é".encode()], 2)


def test_a_line_that_would_have_to_wait_is_left_alone() -> None:
    line, counts = FakeLine(open=False), Counts()
    tap = tap_on(line, counts)
    assert not tap.take(token(live_request().key, 0, ord("a")))
    assert (line.written, counts.charged, tap.texts.num_tokens) == ([], [], 0)


def test_after_a_fault_everything_is_the_readers() -> None:
    line = FakeLine()
    tap, key = tap_on(line, Counts(), Faulty()), live_request().key
    assert not tap.take(token(key, 0, ord("a")))
    assert isinstance(tap.fault, ValueError)
    assert not tap.take(token(key, 1, ord("b")))
    assert line.written == []
