"""The guard of a local Ray: whatever becomes of the process that started it, nothing of it stays.

Run as a script beside the owner: `guard.py DIRECTORY OWNER_PID`, its standard input a pipe from the owner.
1. It waits for the pipe's end, which comes when the owner closes it or dies, even by SIGKILL.
2. It kills every process that holds a file below DIRECTORY open, or has it in its environment (all of a local Ray
   does; its agents would otherwise stay for over a minute), until there is none, the owner excepted.
3. It removes DIRECTORY, and with that it ends.
It imports the standard library only, so that it is there in milliseconds.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LIMIT_S = 10.0
PAUSE_S = 0.02


def main(directory: str, owner_pid: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal's Ctrl-C is for the owner
    sys.stdin.buffer.read()
    spared = {os.getpid(), owner_pid}
    deadline = time.monotonic() + LIMIT_S
    while (pids := set(processes_of(directory)) - spared) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_S)
    shutil.rmtree(directory, ignore_errors=True)


def processes_of(directory: str) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if directory.encode() in (entry / "environ").read_bytes() or _holds_open(entry / "fd", directory):
                yield int(entry.name)


def _holds_open(descriptors: Path, directory: str) -> bool:
    for descriptor in descriptors.iterdir():
        with suppress(OSError):  # closed meanwhile
            if os.readlink(descriptor).startswith(f"{directory}/"):
                return True
    return False


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
