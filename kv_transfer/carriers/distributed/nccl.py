"""Payloads from one GPU to another by NCCL, beside a gloo group that carries the heads. Loads torch.

Not run on two GPUs yet. NCCL has no tags and its receives must know their size, so each payload is received when its
head has come. What hangs is ended by NCCL's own watchdog, which ends the process; the worker then replaces the porter.
"""

from __future__ import annotations

import datetime
from typing import cast

import torch
from torch.distributed import ProcessGroupNCCL, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from kv_transfer.carriers.distributed.group import CONSUMER, PRODUCER, Group, TwoSided

_ADDRESS_BYTES = 256


class NcclLane:
    """Implements kv_transfer.carriers.distributed.group.PayloadLane."""

    def __init__(self, group: Group, rank: int, host: str, timeout_s: float) -> None:
        """Both members at once. The store's port is told over the group, whose members have shown who they are."""
        timeout = datetime.timedelta(seconds=timeout_s)
        store = TCPStore(host, 0, 2, True, timeout, wait_for_workers=False) if rank == PRODUCER else None
        mine = f"{host} {store.port}" if store is not None else ""
        theirs = group.exchange(mine.encode().ljust(_ADDRESS_BYTES, b"\0")).rstrip(b"\0").decode()
        if store is None:
            address, port = theirs.split(" ")
            store = TCPStore(address, int(port), 2, False, timeout)
        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        self._nccl = cast(TwoSided, ProcessGroupNCCL(store, rank, 2, options))

    def send(self, payload: torch.Tensor) -> None:
        self._nccl.send([payload.cuda()], CONSUMER, 0).wait()
        torch.cuda.current_stream().synchronize()

    def receive(self, into: torch.Tensor) -> None:
        landed = torch.empty(len(into), dtype=torch.uint8, device="cuda")
        self._nccl.recv([landed], PRODUCER, 0).wait()
        into.copy_(landed)
