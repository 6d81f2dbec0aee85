"""Processor cores of an engine's own: as many as it has threads, which no other engine of this host computes on.

1. An engine's process claims cores before it loads its model: each by a lock on a file, which ends with the process.
2. It may run on no others from then on, nor may threads that it starts.
3. Once the model is there, each thread that computes gets one core of them (`kernels.dispatch.pin_threads`).
Two threads of one physical core share what computes: such cores are taken when all others are.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from engine.config import Cores
from engine.errors import ConfigError

_TOPOLOGY = Path("/sys/devices/system/cpu")

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed_cores(cores: Cores, num_threads: int, folder: Path | None = None) -> Iterator[tuple[int, ...]]:
    """As many as there are threads; none where none are wanted, or where too few are free, which is told.

    The caller may run on no others from then on, and after that as before. folder: where the locks lie. Raises
    ConfigError."""
    if cores == "any":
        yield ()
        return
    before = os.sched_getaffinity(0)
    found = _candidates(cores, before, num_threads)
    with ExitStack() as locks:
        mine = _claim(found, num_threads, folder or _folder(), locks)
        if mine:
            os.sched_setaffinity(0, mine)
        else:
            logger.warning("engine.cores: of %s, %d are not to be had: threads are not pinned", found, num_threads)
        try:
            yield mine
        finally:
            os.sched_setaffinity(0, before)


def _candidates(cores: Cores, allowed: Collection[int], num_threads: int) -> list[int]:
    named = allowed if isinstance(cores, str) else cores
    if strange := sorted(set(named) - set(allowed)):
        raise ConfigError(f"{strange} are not cores that this process may use", param="engine.cores")
    if len(named) < num_threads:
        raise ConfigError(f"{num_threads} threads cannot have {len(named)} cores", param="engine.cores")
    return in_order(sorted(named), {core: _siblings(core) for core in named})


def in_order(cores: Sequence[int], siblings: dict[int, frozenset[int]]) -> list[int]:
    """Those first that have a physical core to themselves as long as no later one is taken.

    siblings: of each core, those that share its physical core, itself included."""
    firsts = [core for core in cores if core == min(siblings[core] & set(cores))]
    return firsts + [core for core in cores if core not in firsts]


def _siblings(core: int) -> frozenset[int]:
    """As Linux tells them (Documentation/admin-guide/cputopology.rst)."""
    try:
        text = (_TOPOLOGY / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return frozenset((core,))
    ranges = [part.split("-") for part in text.strip().split(",")]
    return frozenset(core for one in ranges for core in range(int(one[0]), int(one[-1]) + 1)) | {core}


def _claim(cores: Sequence[int], count: int, folder: Path, locks: ExitStack) -> tuple[int, ...]:
    """So many of them; none, and nothing locked, if fewer are free or the locks are somebody else's."""
    mine: list[int] = []
    with ExitStack() as taken, contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for core in cores:
            if len(mine) < count and _lock(folder / f"core-{core}.lock", taken):
                mine.append(core)
        if len(mine) == count:
            locks.push(taken.pop_all())
            return tuple(mine)
    return ()


def _lock(path: Path, taken: ExitStack) -> bool:
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    taken.enter_context(file)
    return True


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"steelyard-cores-{os.getuid()}"
