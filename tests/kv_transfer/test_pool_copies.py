"""Copies from pool to pool, in place: the same bytes as read and write, whatever the block ids."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import pool as pools
from engine.pool import SharedPool, copy_records, records_in_place
from tests.kv_transfer.fakes import LAYOUT, NUM_BLOCKS, poisoned_pool, random_pool


@given(st.data(), st.sampled_from([1, 200, 2**18]))
def test_what_is_copied_is_what_read_and_write_would_have_moved(data: st.DataObject, piece_bytes: int) -> None:
    count = data.draw(st.integers(1, NUM_BLOCKS))
    order = random.Random(data.draw(st.integers(0, 999)))
    start = data.draw(st.integers(0, NUM_BLOCKS - count))
    neighbours = list(range(start, start + count))
    from_ids, to_ids = (data.draw(st.sampled_from([neighbours, order.sample(range(NUM_BLOCKS), count)])) for _ in "ab")
    layers = range(data.draw(st.integers(0, 1)), data.draw(st.integers(2, 3)))
    source, copied, written = random_pool(), poisoned_pool(), poisoned_pool()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pools, "PIECE_BYTES", piece_bytes)
            for plane in range(len(LAYOUT.planes)):
                payload = source.read(plane, layers, from_ids)
                written.write(plane, layers, to_ids, memoryview(payload))
                assert b"".join(copy_records(source, copied, plane, layers, from_ids, to_ids)) == payload
                assert b"".join(records_in_place(source, plane, layers, from_ids)) == payload
        assert copied.memory[:] == written.memory[:]
    finally:
        for pool in (source, copied, written):
            pool.close()


def test_neighbouring_records_are_one_piece_up_to_a_bound() -> None:
    source, target = random_pool(), poisoned_pool()
    record = LAYOUT.planes[0].bytes_per_block
    pieces = [len(one) // record for one in copy_records(source, target, 0, range(1), [3, 4, 5, 9], [1, 2, 3, 4])]
    assert pieces == [3, 1]
    assert [len(one) // record for one in records_in_place(source, 0, range(2), [7, 8, 2])] == [2, 1, 2, 1]
    source.close()
    target.close()


class _Elsewhere:
    """A pool of another kind, as on a device. Implements engine.pool.BlockBytes."""

    def __init__(self) -> None:
        self.inner = poisoned_pool()

    def read(self, plane: int, layers: range, block_ids: list[int]) -> bytes:
        return self.inner.read(plane, layers, block_ids)

    def write(self, plane: int, layers: range, block_ids: list[int], payload: memoryview) -> None:
        self.inner.write(plane, layers, block_ids, payload)


def test_a_pool_of_another_kind_takes_and_gives_the_same_bytes() -> None:
    source, target = random_pool(), _Elsewhere()
    payload = source.read(1, range(3), [5, 2])
    assert b"".join(copy_records(source, target, 1, range(3), [5, 2], [0, 7])) == payload  # pyright: ignore[reportArgumentType]
    assert target.read(1, range(3), [0, 7]) == payload == b"".join(records_in_place(target, 1, range(3), [0, 7]))  # pyright: ignore[reportArgumentType]
    source.close()
    target.inner.close()


def test_a_pool_that_is_mapped_to_be_read_cannot_be_written() -> None:
    import mmap
    import os

    source = random_pool()
    view = SharedPool(LAYOUT, NUM_BLOCKS, os.dup(source.fd), access=mmap.ACCESS_READ)
    with pytest.raises(ValueError, match="read-only"):
        view.write(0, range(1), [0], memoryview(bytes(LAYOUT.planes[0].bytes_per_block)))
    assert isinstance(view.record_run(0, 0, 0, 1), np.ndarray)
    view.close()
    source.close()
