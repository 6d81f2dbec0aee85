"""Transfer times: how long a request waits for KV that still has to move, from worker to worker.

A fixed cost and bytes over a bandwidth, of each pair of workers of which enough is known, else of all pairs. Where
nothing has moved yet, the bandwidth is what the receiver measured at first contact (KvPath), else a guess.

Most of a transfer hides behind the computing of its prompt, so its whole duration says little. What is learnt is the
exposed part: the bytes that had not arrived with the first token, and the time from then to the COMMIT.
"""

from __future__ import annotations

from engine.types import KvPath, KvTransfer, TransferReport
from router.fit import Fit

FIXED_S = 0.005  # a guess: the COMMIT, its answer, the adoption
BYTES_PER_S = 5e8  # a guess, on the safe side of a 10 Gbit/s network
UNIT_BYTES = 2**20
ENOUGH = 8  # transfers of a pair
SHORTEST_S = 0.001  # what is exposed for less says no more than that it was hidden

Pair = tuple[str, str]  # worker ids: from, to


class TransferTimes:
    def __init__(self) -> None:
        self._pairs: dict[Pair, Fit] = {}
        self._all = _new_fit(BYTES_PER_S)
        self._paths: dict[Pair, float] = {}  # bytes/s, by the fastest carrier
        self._told: dict[str, tuple[KvPath, ...]] = {}  # by worker id, what was heard last

    def transfer_s(self, source: str, target: str, size_bytes: int) -> float:
        """Of so many bytes that have not moved yet, to the COMMIT."""
        features = _features(size_bytes)
        pair = self._pairs.get((source, target))
        if pair is not None and pair.num_learnt >= ENOUGH:
            return pair.predict(features)
        bytes_per_s = self._paths.get((source, target))
        if bytes_per_s is not None and self._all.num_learnt < ENOUGH:
            return _new_fit(bytes_per_s).predict(features)
        return self._all.predict(features)

    def learn(self, source: str, target: str, transfer: KvTransfer) -> None:
        features = _features(transfer.size_bytes - transfer.hidden_bytes)
        pair = self._pairs.get((source, target))
        if pair is None:
            pair = self._pairs[(source, target)] = _new_fit(self._paths.get((source, target), BYTES_PER_S))
        for fit in (pair, self._all):
            fit.learn(features, max(transfer.exposed_s, SHORTEST_S))

    def hear(self, target: str, report: TransferReport) -> None:
        """What a worker has measured of the paths to it, told again with every batch."""
        if report.paths == self._told.get(target, ()):
            return
        self._told[target] = report.paths
        for path in sorted(report.paths, key=lambda path: path.bytes_per_s):
            self._paths[(path.peer, target)] = path.bytes_per_s

    def forget(self, worker_id: str) -> None:
        self._told.pop(worker_id, None)
        for table in (self._pairs, self._paths):
            for pair in [pair for pair in table if worker_id in pair]:
                del table[pair]


def _new_fit(bytes_per_s: float) -> Fit:
    return Fit((FIXED_S, UNIT_BYTES / max(bytes_per_s, 1.0)))


def _features(size_bytes: int) -> tuple[float, float]:
    return 1.0, max(size_bytes, 0) / UNIT_BYTES
