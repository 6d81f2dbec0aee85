"""A file of lines that is written by a thread of its own: bounded in memory and on disk.

1. `put` hands a line over without waiting; when MAX_QUEUED wait already, it is dropped and counted;
2. the thread appends what has come. At `max_bytes` the file becomes `FILE.1`, in place of an older one;
3. a fault of the disk is told once, and lines are dropped from then on; 4. `close` writes what waits, and returns.
"""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path

MAX_QUEUED = 10_000
CLOSE_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


class LineFile:
    """Implements router.ledger_log.LineSink."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.num_dropped = 0
        self._path = path
        self._max_bytes = max_bytes
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name="ledger-file", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.num_dropped += 1

    def close(self) -> None:
        """Takes at most CLOSE_TIMEOUT_S, even of a disk that hangs. Blocks."""
        try:
            self._lines.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while (lines := self._take()) is not None:
                self._append(lines)
        except OSError as error:
            log.error("%s cannot be written any more: %s", self._path, error)
            while self._lines.get() is not None:
                self.num_dropped += 1

    def _take(self) -> list[str] | None:
        """All that wait, at least one; None at the end."""
        lines: list[str] = []
        while not lines or not self._lines.empty():
            line = self._lines.get()
            if line is None:
                if lines:
                    self._append(lines)
                return None
            lines.append(line)
        return lines

    def _append(self, lines: list[str]) -> None:
        if self._path.exists() and self._path.stat().st_size >= self._max_bytes:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
