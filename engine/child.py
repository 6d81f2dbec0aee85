"""Child processes of a worker: what they inherit, and how they end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

STOP_TIMEOUT_S = 3.0


def child_env(threads: int) -> dict[str, str]:
    """The child finds our packages where we did; its libraries start no more threads than it may use."""
    paths = [path for path in sys.path if path] + [os.getcwd()]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}


async def end_child(process: subprocess.Popen[bytes], writer: asyncio.StreamWriter) -> None:
    """Closing the pipe ends the child; if not in time, a signal does."""
    writer.close()
    try:
        await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        await asyncio.to_thread(process.wait)
