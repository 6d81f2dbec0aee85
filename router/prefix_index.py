"""The prefix index: which workers have which cached blocks, as their block events tell.

1. `apply` takes what a worker says: names that can be found there now, and names that are lost;
2. `num_cached` says of a prompt's chain of names how many of the first ones each worker has;
3. `forget` drops a life that is down or has left. When it is heard again it tells all that it has.

Each name has a bit mask of the workers that have it, so a walk down the chain costs an AND for each block and one look
at each worker that falls out, whatever number of workers there are. Names are cut to 8 bytes: two that fall together
make a placement a little worse, and nothing wrong, for workers go by whole names.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from engine.types import CacheNews

FEW = 16  # workers, that are found one by one
BITS = bytes(digit == ord("1") for digit in range(256))  # from digits to 0 and 1
Name = tuple[str, str]  # one life of a worker: its id and its incarnation


class PrefixIndex:
    def __init__(self) -> None:
        self._masks: dict[int, int] = {}  # by the name of a block; none is 0
        self._names: dict[Name, dict[int, None]] = {}  # of each worker
        self._bits: dict[Name, int] = {}
        self._workers: list[Name] = []  # by bit; of a bit that nobody has now, who had it last
        self.version = 0  # rises with every change

    def apply(self, worker: Name, news: CacheNews) -> None:
        if news.anew:
            self.forget(worker)
        if not (news.kept or news.lost):
            return
        self.version += 1
        bit = 1 << self._bit_of(worker)
        names = self._names[worker]
        for name in news.kept:
            names[name] = None
            self._masks[name] = self._masks.get(name, 0) | bit
        for name in news.lost:
            if names.pop(name, 0) is None:
                self._clear(name, bit)

    def forget(self, worker: Name) -> None:
        bit = self._bits.pop(worker, None)
        if bit is None:
            return
        self.version += 1
        for name in self._names.pop(worker):
            self._clear(name, 1 << bit)

    def num_cached(self, names: Sequence[int], size: int = 1) -> dict[Name, int]:
        """How many blocks from the start of this chain each worker has, times `size`; of those only that have any."""
        counts: dict[Name, int] = {}
        masks = self._masks
        have = masks.get(names[0], 0) if names else 0
        for index, name in enumerate(names):
            still = have & masks.get(name, 0)
            if still != have:
                counts |= dict.fromkeys(self._of(have ^ still), index * size)
                have = still
            if not have:
                return counts
        return counts | dict.fromkeys(self._of(have), len(names) * size)

    @property
    def num_names(self) -> int:
        """Different ones, of all workers."""
        return len(self._masks)

    def _clear(self, name: int, bit: int) -> None:
        left = self._masks[name] & ~bit
        if left:
            self._masks[name] = left
        else:
            del self._masks[name]

    def _bit_of(self, worker: Name) -> int:
        """The lowest that is free, so that masks stay short."""
        bit = self._bits.get(worker)
        if bit is None:
            taken = set(self._bits.values())
            bit = next(bit for bit in range(len(taken) + 1) if bit not in taken)
            self._bits[worker], self._workers[bit : bit + 1], self._names[worker] = bit, [worker], {}
        return bit

    def _of(self, mask: int) -> list[Name]:
        if mask.bit_count() > FEW:
            return list(compress(self._workers, bin(mask)[:1:-1].encode().translate(BITS)))  # the lowest first
        found: list[Name] = []
        while mask:
            bit = mask.bit_length() - 1
            found.append(self._workers[bit])
            mask ^= 1 << bit
        return found
