"""NIXL over UCX, for benchmarks.transfer: `PYTHON benchmarks/nixl_peer.py SIZE`, in an environment of its own.

One process owns SIZE bytes of host memory, this one reads them: for each number of bytes that comes on a line, the
seconds that it took go out on one. A read is one descriptor, in one run: the best case. Nothing is checked.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config  # pyright: ignore[reportMissingImports]


def own(pipe: Connection, size: int) -> None:
    agent, memory = new_agent("owner", size)
    pipe.send((agent.get_agent_metadata(), memory.ctypes.data))
    pipe.recv()


def new_agent(name: str, size: int):
    agent, memory = nixl_agent(name, nixl_agent_config(backends=["UCX"])), np.ones(size, np.uint8)
    agent.register_memory([(memory.ctypes.data, size, 0, "")], "DRAM")
    return agent, memory


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # NIXL talks on standard output
    size = int(sys.argv[1])
    ours, theirs = multiprocessing.Pipe()
    owner = multiprocessing.get_context("spawn").Process(target=own, args=(theirs, size), daemon=True)
    owner.start()
    agent, memory = new_agent("reader", size)
    metadata, address = ours.recv()
    peer = agent.add_remote_agent(metadata)
    for line in sys.stdin:
        begun = time.perf_counter()
        mine = agent.get_xfer_descs([(memory.ctypes.data, int(line), 0)], "DRAM")
        theirs_ = agent.get_xfer_descs([(address, int(line), 0)], "DRAM")
        reading = agent.initialize_xfer("READ", mine, theirs_, peer, b"")
        state = agent.transfer(reading)
        while state == "PROC":
            state = agent.check_xfer_state(reading)
        assert state == "DONE", state
        print(time.perf_counter() - begun, file=answers, flush=True)
        agent.release_xfer_handle(reading)
    ours.send(None)
    owner.join()


if __name__ == "__main__":
    main()
