"""Files that are read again when they change on disk, without a restart: keys and certificates.

1. `stamps_of` tells by times, sizes and inodes whether files are other ones than before. A mounted Kubernetes secret is
   renewed by turning a link to another folder, so its files have other inodes then;
2. a FileWatch has them read every RELOAD_S. What is broken changes nothing but the log, and is looked at again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.errors import ConfigError

RELOAD_S = 2.0

log = logging.getLogger(__name__)

Stamp = tuple[str, int, int, int]


def stamps_of(paths: Iterable[Path]) -> tuple[Stamp, ...]:
    """OSError for one that is not there."""
    found = [(path, path.stat()) for path in paths]
    return tuple((str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino) for path, stat in found)


class FileWatch:
    def __init__(self, reload: Callable[[], bool], what: str) -> None:
        """`reload`: read anew if something has changed, and say whether it had; ConfigError, once for each state of the
        files. `what` is read, for the log."""
        self._reload = reload
        self._what = what
        self._task = asyncio.create_task(self._watch(), name=what)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_S)
            try:
                if await asyncio.to_thread(self._reload):
                    log.info("%s: read again", self._what)
            except ConfigError as error:
                log.warning("%s; what was read before stays valid", error.message)
