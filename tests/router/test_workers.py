from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine.streams import StreamBatch
from engine.types import EngineStats, Key
from router.membership import Member
from router.workers import LONGEST_PAUSE_S, SILENCE_S, WorkerLink
from tests.router.fake_workers import FakeWorker, member, token
from tests.virtual import in_virtual_time, settle

KEY = Key("r", 0)


class Watched:
    """A link to one worker, and what it told its owner."""

    def __init__(self) -> None:
        self.worker = FakeWorker(member("d0"))
        self.batches: list[StreamBatch] = []
        self.downs: list[str] = []
        self.link = WorkerLink(self.worker.member, self.worker, "g0", self._on_batch, self._on_down)

    def _on_batch(self, of: Member, batch: StreamBatch) -> None:
        assert of == self.link.member
        self.batches.append(batch)

    def _on_down(self, of: Member, reason: str) -> None:
        assert not self.link.connected
        self.downs.append(reason)


@in_virtual_time
async def test_a_link_is_up_with_the_first_batch_and_passes_all_on() -> None:
    w = Watched()
    assert not w.link.connected
    await settle()
    assert w.link.connected
    w.worker.stats = EngineStats(num_running=3)
    w.worker.say(token(KEY, 0))
    await settle()
    assert [batch.outputs for batch in w.batches] == [(), (token(KEY, 0),)]
    assert w.link.stats == EngineStats(num_running=3)
    await w.link.close()


@in_virtual_time
async def test_a_worker_that_has_nothing_to_say_stays_up() -> None:
    w = Watched()
    await asyncio.sleep(100 * SILENCE_S)
    assert w.link.connected
    assert w.downs == []
    await w.link.close()


@in_virtual_time
async def test_silence_takes_a_link_down_once_and_it_comes_back() -> None:
    w = Watched()
    await settle()
    w.worker.mute = True
    w.worker.say()
    await asyncio.sleep(SILENCE_S + 0.05)
    assert not w.link.connected
    (reason,) = w.downs
    assert "silent" in reason
    w.worker.mute = False
    await asyncio.sleep(1)
    assert w.link.connected
    assert len(w.downs) == 1
    await w.link.close()


@in_virtual_time
async def test_a_broken_stream_takes_a_link_down_and_it_comes_back() -> None:
    w = Watched()
    for turn in range(3):
        await asyncio.sleep(1)
        assert w.link.connected
        w.worker.break_stream()
        await settle()
        assert w.downs == ["the stream broke"] * (turn + 1)
    await w.link.close()


@in_virtual_time
async def test_a_worker_that_cannot_be_reached_is_tried_ever_more_rarely() -> None:
    w = Watched()
    w.worker.reachable = False
    await asyncio.sleep(100 * LONGEST_PAUSE_S)
    assert w.downs == []  # it was never up
    assert 100 <= w.worker.num_streams <= 110
    w.worker.reachable = True
    await asyncio.sleep(LONGEST_PAUSE_S)
    assert w.link.connected
    await w.link.close()


@in_virtual_time
async def test_a_fault_that_nobody_foresaw_takes_the_link_down_and_does_not_end_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    w = Watched()
    await settle()
    w.worker.break_stream(ValueError("'boredom' is not a valid FinishReason"))
    await settle()
    assert "boredom" in w.downs[0]
    await asyncio.sleep(1)
    assert w.link.connected
    await w.link.close()


@in_virtual_time
async def test_closing_a_link_tells_its_owner_once_and_leaves_no_task() -> None:
    w = Watched()
    await settle()
    await w.link.close()
    assert w.downs == ["it left the membership"]
    assert w.worker.closed
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_virtual_time
async def test_closing_a_link_that_is_down_tells_nothing_new() -> None:
    w = Watched()
    await settle()
    w.worker.die()
    await settle()
    await w.link.close()
    assert w.downs == ["the stream broke"]


@in_virtual_time
async def test_a_changed_role_is_the_same_link() -> None:
    w = Watched()
    await settle()
    w.link.member = replace(w.link.member, role_epoch=1)
    w.worker.say(token(KEY, 0))
    await settle()
    assert len(w.batches) == 2
    await w.link.close()
