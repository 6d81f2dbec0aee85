"""The search for a plan: which placement serves a rate within the targets, and what a number of GPUs can serve at most.

1. each phase alone, at each tensor-parallel size: the highest rate of one worker (a bisection over simulations);
2. the fewest GPUs: whole clusters, from the smallest that might do, until one keeps the targets at the rate asked for;
3. the most: of the splits of all GPUs, the most promising first, until none can promise more than was found. Where KV
   stays in its node, that is asked of a node, which is then repeated.

Every rate is that of the simulated cluster; what the phases promise only orders and prunes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cluster.simulator.network import LinkTimes
from cluster.simulator.planning.placements import (
    PhaseGoodput,
    Split,
    all_splits,
    fewest_gpus,
    most_promising,
    nodes,
    replicas,
)
from cluster.simulator.planning.rates import highest_rate
from cluster.simulator.planning.targets import Verdict
from cluster.simulator.planning.trials import Fleet, WorkerKind

MAX_TRIED = 4  # splits of which the highest rate is sought


class Runs(Protocol):
    """What the search asks of simulations: whether a cluster, or a worker that has one phase to itself, keeps the
    targets at a rate. planning.trials.Trials implements it."""

    def together(self, fleet: Fleet, rate: float, links: LinkTimes | None = None) -> Verdict: ...

    def prefill_guess(self, kind: WorkerKind) -> float:
        """Requests per second, of the right order."""
        ...

    def decode_guess(self, kind: WorkerKind) -> float: ...

    def prefill_alone(self, kind: WorkerKind, rate: float) -> Verdict: ...

    def decode_alone(self, kind: WorkerKind, rate: float) -> Verdict: ...


class Affinity(StrEnum):
    """Between nodes, links are as fast as inside of them (high), or so slow that KV stays in its node (low)."""

    HIGH = "high"
    LOW = "low"


@dataclass(frozen=True, slots=True)
class Question:
    """`kinds`: what a worker is at each tensor-parallel size that fits in a node."""

    rate: float
    num_gpus: int
    gpus_per_node: int
    affinity: Affinity
    kinds: Mapping[int, WorkerKind]
    node_links: LinkTimes


@dataclass(frozen=True, slots=True)
class Tried:
    """A cluster and a rate that it was simulated at; with Algorithm 2 `split` is of one of `num_nodes` equal nodes,
    each with its part of the rate."""

    split: Split
    rate: float
    verdict: Verdict
    num_nodes: int = 1

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.split.num_gpus


@dataclass(frozen=True, slots=True)
class Plan:
    """`fewest`: None where none of the GPUs' splits serves the rate. `most`: None where no rate at all is served.
    `tried`: every cluster at every rate, in the order of the search."""

    prefill: tuple[PhaseGoodput, ...]
    decode: tuple[PhaseGoodput, ...]
    fewest: Tried | None
    most: Tried | None
    tried: tuple[Tried, ...]


def search(question: Question, runs: Runs, tell: Callable[[str], None]) -> Plan:
    """`tell` hears what is tried next."""
    return _Search(question, runs, tell).run()


class _Search:
    def __init__(self, question: Question, runs: Runs, tell: Callable[[str], None]) -> None:
        self._question = question
        self._runs = runs
        self._tell = tell
        self._tried: list[Tried] = []

    def run(self) -> Plan:
        prefill = self._phase("prefill", self._runs.prefill_alone, self._runs.prefill_guess)
        decode = self._phase("decode", self._runs.decode_alone, self._runs.decode_guess)
        able = [tuple(one for one in found if one.goodput > 0) for found in (prefill, decode)]
        fewest = most = None
        if all(able):
            fewest, most = self._by_affinity(*able)
        return Plan(prefill, decode, fewest, most, tuple(self._tried))

    def _phase(
        self, name: str, alone: Callable[[WorkerKind, float], Verdict], guess: Callable[[WorkerKind], float]
    ) -> tuple[PhaseGoodput, ...]:
        found: list[PhaseGoodput] = []
        for size, kind in sorted(self._question.kinds.items()):
            self._tell(f"{name} alone, TP{size}")
            goodput = highest_rate(lambda rate, kind=kind: alone(kind, rate).serves, guess(kind))
            found.append(PhaseGoodput(size, goodput))
        return tuple(found)

    def _by_affinity(
        self, prefill: Sequence[PhaseGoodput], decode: Sequence[PhaseGoodput]
    ) -> tuple[Tried | None, Tried | None]:
        question = self._question
        if question.affinity is Affinity.LOW:
            return self._in_nodes(prefill, decode)
        possible = all_splits(question.num_gpus, prefill, decode)
        return self._fewest(possible), self._most(most_promising(possible))

    # --- Algorithm 1: workers anywhere ----------------------------------------------------------------------

    def _fewest(self, possible: Sequence[Split]) -> Tried | None:
        for split in fewest_gpus(possible, self._question.rate):
            if (tried := self._at(split, self._question.rate)).verdict.serves:
                return tried
        return None

    def _most(self, promising: Sequence[Split]) -> Tried | None:
        best: Tried | None = None
        for split in promising[:MAX_TRIED]:
            if best is not None and split.promise <= best.rate:
                break
            found = self._highest(split)
            if found is not None and (best is None or found.rate > best.rate):
                best = found
        return best

    # --- Algorithm 2: whole nodes ---------------------------------------------------------------------------

    def _in_nodes(
        self, prefill: Sequence[PhaseGoodput], decode: Sequence[PhaseGoodput]
    ) -> tuple[Tried | None, Tried | None]:
        """A part of one node where that is enough, else the best node as many times as the rate asks for; and the best
        node as often as it fits."""
        size = min(self._question.gpus_per_node, self._question.num_gpus)
        fewest = self._fewest(all_splits(size, prefill, decode))
        best = self._best_node(nodes(size, prefill, decode))
        if best is None:
            return fewest, None
        num_fitting = self._question.num_gpus // best.split.num_gpus
        most = Tried(best.split, best.rate * num_fitting, best.verdict, num_fitting)
        return fewest or self._fewest_nodes(best, num_fitting), most

    def _fewest_nodes(self, best: Tried, num_fitting: int) -> Tried | None:
        rate = self._question.rate
        for num_nodes in range(replicas(rate, best.rate), num_fitting + 1):
            if (part := self._at(best.split, rate / num_nodes)).verdict.serves:
                return Tried(best.split, rate, part.verdict, num_nodes)
        return None

    def _best_node(self, candidates: Sequence[Split]) -> Tried | None:
        best: Tried | None = None
        for split in candidates[:MAX_TRIED]:
            if best is not None and split.promise / split.num_gpus <= best.rate / best.num_gpus:
                break
            found = self._highest(split)
            if found is not None and (best is None or found.rate / found.num_gpus > best.rate / best.num_gpus):
                best = found
        return best

    # --- both -----------------------------------------------------------------------------------------------

    def _highest(self, split: Split) -> Tried | None:
        """None where no rate is kept."""
        tried: list[Tried] = []

        def keeps(rate: float) -> bool:
            tried.append(self._at(split, rate))
            return tried[-1].verdict.serves

        rate = highest_rate(keeps, split.promise)
        return next((one for one in tried if one.rate == rate and one.verdict.serves), None)

    def _at(self, split: Split, rate: float) -> Tried:
        self._tell(f"{split} at {rate:.3g} requests/s")
        kinds = self._question.kinds
        fleet = Fleet(
            split.num_prefill, split.num_decode,
            kinds[split.prefill.tensor_parallel], kinds[split.decode.tensor_parallel],
        )  # fmt: skip
        links = self._question.node_links if self._question.affinity is Affinity.LOW else None
        tried = Tried(split, rate, self._runs.together(fleet, rate, links))
        self._tried.append(tried)
        return tried
