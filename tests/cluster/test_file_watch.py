"""Files are read again by a timer, broken ones change nothing but the log."""

from __future__ import annotations

import asyncio
import logging

import pytest

from cluster import file_watch
from cluster.file_watch import FileWatch
from engine.errors import ConfigError


class File:
    """Read again each time; broken the second."""

    def __init__(self) -> None:
        self.num_reads = 0
        self.news = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def reload(self) -> bool:
        self.num_reads += 1
        self._loop.call_soon_threadsafe(self.news.set)
        if self.num_reads == 2:
            raise ConfigError("a line is torn")
        return True


async def test_it_reads_on_after_a_broken_file_until_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_watch, "RELOAD_S", 0.01)
    caplog.set_level(logging.INFO, "cluster.file_watch")
    file = File()
    watch = FileWatch(file.reload, "keys")
    async with asyncio.timeout(10):
        while file.num_reads < 4:
            file.news.clear()
            await file.news.wait()
    await watch.stop()
    num_reads = file.num_reads
    await asyncio.sleep(0.05)
    assert file.num_reads <= num_reads + 1, "a read that was under way may end"
    told = [record.message for record in caplog.records]
    assert told[:3] == ["keys: read again", "a line is torn; what was read before stays valid", "keys: read again"]
