"""Chance: everything random in a simulation, as a function of one seed and of a name.

Counter-based (keyed blake2b of the counter), so streams of different names are independent, and what one part draws
never changes what another gets.
"""

from __future__ import annotations

import hashlib
import math


class Chance:
    """One stream of random numbers."""

    def __init__(self, seed: int, name: str = "") -> None:
        self._seed = seed
        self._name = name
        self._key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=32).digest()
        self._counter = 0

    def fork(self, name: str) -> Chance:
        """The stream of this name below ours; the same whenever it is asked for."""
        return Chance(self._seed, f"{self._name}/{name}")

    def bits(self, count: int) -> int:
        """0 <= bits < 2**count, count at most 512."""
        self._counter += 1
        drawn = hashlib.blake2b(self._counter.to_bytes(8, "little"), key=self._key).digest()
        return int.from_bytes(drawn, "little") & ((1 << count) - 1)

    def below(self, stop: int) -> int:
        """0 <= below < stop, as good as even for a stop far below 2**64."""
        return self.bits(64) % stop

    def between(self, first: int, last: int) -> int:
        """first <= between <= last."""
        return first + self.below(last - first + 1)

    def unit(self) -> float:
        """0 <= unit < 1."""
        return self.bits(53) / 2**53

    def exponential(self, mean: float) -> float:
        """Time to the next arrival of a Poisson process."""
        return -mean * math.log(1.0 - self.unit())

    def hex(self, num_bytes: int) -> str:
        return self.bits(8 * num_bytes).to_bytes(num_bytes, "little").hex()


class SeededNames:
    """Ids and seeds of requests. Implements router.dispatch.Names."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance

    def new_request_id(self) -> str:
        return self._chance.hex(12)

    def new_seed(self) -> int:
        return self._chance.bits(63)
