"""The sample: known bytes of a worker, which others fetch to measure how fast a path to it is."""

from __future__ import annotations

import mmap
import os

import xxhash

SAMPLE_BYTES = 2**23  # as much as the KV of a prompt of a few hundred tokens; at 1 GB/s it takes 8 ms


class Sample:
    """Anonymous shared memory with random bytes."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("steelyard-sample")
        os.ftruncate(self.fd, SAMPLE_BYTES)
        self.memory = mmap.mmap(self.fd, SAMPLE_BYTES)
        self.memory[:] = os.urandom(SAMPLE_BYTES)
        self.digest = xxhash.xxh3_64_intdigest(self.memory)

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)
