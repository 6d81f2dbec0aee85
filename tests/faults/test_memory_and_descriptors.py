"""A host that has no descriptor or address space left for the producer's pool, or whose shared-memory folder is full.

The blocks come by gRPC then, and the log says why; nothing stays open. No file of ours lies in the folder.
"""

from __future__ import annotations

import logging
import os
import resource
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.spec import WorkerSpec
from cluster.worker import Worker
from engine.errors import WorkerLost
from engine.planes import CacheLayout
from engine.types import Role
from kv_transfer.carriers import choice, door
from kv_transfer.carriers.door import OpenPool, open_pool
from kv_transfer.carriers.sample import SAMPLE_BYTES
from tests.cluster.tiny_model import write_tiny_model
from tests.kv_transfer.fakes import Transfer
from tests.kv_transfer.test_shm_carrier import SECRET, Served, case, committed, serve

__all__ = ["case"]  # a fixture

ENOUGH = 11  # descriptors for both ends
FULL = "mount -t tmpfs -o size=4k tmpfs /dev/shm && ! head -c 1M /dev/zero >/dev/shm/full 2>/dev/null"


@contextmanager
def limit(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def lowest_free() -> int:
    free = os.dup(0)
    os.close(free)
    return free


def address_space_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


async def connect(served: Served) -> None:
    """The channel is there before anything is short."""
    await served.channels(served.lease.address, served.lease.incarnation).channel_ready()


@pytest.mark.parametrize("num_left", range(ENOUGH + 1))
async def test_with_few_descriptors_left_the_blocks_come_and_none_stays_open(
    case: Transfer, num_left: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both ends live in this process, so that each may be the one that is short, at each of their steps."""
    caplog.set_level(logging.INFO, "kv_transfer")
    monkeypatch.setattr(door, "DOOR_TIMEOUT_S", 0.3)
    monkeypatch.setattr(door, "ACCEPT_PAUSE_S", 0.05)
    async with serve(committed(case)) as served:
        await connect(served)
        before = descriptors()
        with limit(resource.RLIMIT_NOFILE, lowest_free() + num_left):
            pulled = await served.pull()
        assert all(case.arrived())
        assert case.others_untouched()
        can_share = "shm" in [path.carrier for path in served.carriers.paths()]
        assert can_share == ("not shm: " not in caplog.text)
        assert can_share or pulled.carrier == "grpc"
        assert num_left not in (0, ENOUGH) or can_share == bool(num_left)
        await served.carriers.close()
        assert [fd for fd in descriptors() if fd not in before] == []


async def test_a_pool_that_does_not_fit_the_address_space_is_read_by_grpc(
    case: Transfer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The pool does, and then its sample does not."""
    caplog.set_level(logging.INFO, "kv_transfer")

    async def open_in_little_space(layout: CacheLayout, token: str, incarnation: str) -> OpenPool:
        with limit(resource.RLIMIT_AS, address_space_bytes() + SAMPLE_BYTES // 2):
            return await open_pool(layout, token, incarnation)

    monkeypatch.setattr(choice, "open_pool", open_in_little_space)
    async with serve(committed(case)) as served:
        await connect(served)
        before = descriptors()
        pulled = await served.pull()
        assert (pulled.carrier, pulled.num_resumes) == ("grpc", 0)
        assert all(case.arrived())
        assert "can be read on this host: Cannot allocate memory" in caplog.text
        await served.carriers.close()
        assert [fd for fd in descriptors() if fd not in before] == []


async def test_a_worker_that_cannot_have_a_pool_does_not_start_and_says_why(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    config = load_config("configs/local.yaml", {"model.name": str(model), "model.max_context": 2048})
    spec = WorkerSpec("prefill-0", secrets.token_hex(4), Role.PREFILL, "127.0.0.1")
    with limit(resource.RLIMIT_FSIZE, 2**22), pytest.raises(WorkerLost, match="for the KV pool: File too large"):
        await Worker(spec, config, SECRET).start()


def test_a_full_shared_memory_folder_is_not_missed() -> None:
    """In a mount namespace of its own, where not a byte more goes into /dev/shm, blocks are shared as ever."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("another /dev/shm needs root and unshare")
    if subprocess.run(["unshare", "--mount", "sh", "-c", FULL], check=False, capture_output=True).returncode:
        pytest.skip("no other /dev/shm can be mounted here")
    tests = "tests/kv_transfer/test_shm_carrier.py -k 'copied_out_of or configuration_says'"
    run = f"{FULL}; exec {sys.executable} -m pytest -q -p no:cacheprovider {tests}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", run], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
