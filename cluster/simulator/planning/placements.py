"""Placements: which tensor-parallel size for each phase, how many workers of each. Pure choices from goodputs.

Goodput is the highest rate of requests that keeps the targets. After DistServe (Zhong et al., OSDI 2024, section 4):
- Algorithm 1, for clusters with fast links between nodes: each phase is measured by itself at each size, and gets the
  size with the most goodput per GPU and as many workers as the rate asks for. A given number of GPUs may not be
  divisible that way, so all pairs of sizes take part here: with many GPUs the best of each win by themselves;
- Algorithm 2, where only GPUs of one node are linked fast: prefill and decode workers share a node, and the node with
  the most goodput per GPU is repeated.
Pipeline parallelism, which both of them search too, is not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SLACK = 0.1  # phases alone may promise so much too little for a split to be tried


@dataclass(frozen=True, slots=True)
class PhaseGoodput:
    """Of one worker that has its phase to itself, in requests per second."""

    tensor_parallel: int
    goodput: float

    @property
    def per_gpu(self) -> float:
        return self.goodput / self.tensor_parallel


@dataclass(frozen=True, slots=True)
class Split:
    """Workers of each phase, with their sizes and with what they can do alone. As text, prefill comes first."""

    num_prefill: int
    num_decode: int
    prefill: PhaseGoodput
    decode: PhaseGoodput

    @property
    def num_gpus(self) -> int:
        return self.num_prefill * self.prefill.tensor_parallel + self.num_decode * self.decode.tensor_parallel

    @property
    def promise(self) -> float:
        """What the phases alone could do: the cluster does no better."""
        return min(self.num_prefill * self.prefill.goodput, self.num_decode * self.decode.goodput)

    def __str__(self) -> str:
        prefill, decode = self.prefill.tensor_parallel, self.decode.tensor_parallel
        return f"{self.num_prefill} x TP{prefill} + {self.num_decode} x TP{decode}"


def best_phase(found: Sequence[PhaseGoodput]) -> PhaseGoodput:
    """The most goodput per GPU; of equal ones the smallest."""
    return min(found, key=lambda one: (-one.per_gpu, one.tensor_parallel))


def replicas(rate: float, goodput: float) -> int:
    return max(1, math.ceil(rate / goodput))


def splits(num_gpus: int, prefill: PhaseGoodput, decode: PhaseGoodput) -> Iterator[Split]:
    """All that fit, at least one worker of each phase."""
    for num_prefill in range(1, num_gpus // prefill.tensor_parallel + 1):
        left = num_gpus - num_prefill * prefill.tensor_parallel
        for num_decode in range(1, left // decode.tensor_parallel + 1):
            yield Split(num_prefill, num_decode, prefill, decode)


def most_promising(found: Sequence[Split]) -> list[Split]:
    """Those that promise most first; of equal ones those with the fewest GPUs."""
    return sorted(found, key=lambda split: (-split.promise, split.num_gpus, split.num_prefill))


def fewest_gpus(found: Sequence[Split], rate: float) -> list[Split]:
    """Those that might serve the rate, the fewest GPUs first; of each number of GPUs the one that promises most."""
    best: dict[int, Split] = {}
    for split in most_promising([split for split in found if split.promise >= rate * (1 - SLACK)]):
        best.setdefault(split.num_gpus, split)
    return [best[num_gpus] for num_gpus in sorted(best)]


def all_splits(num_gpus: int, prefill: Sequence[PhaseGoodput], decode: Sequence[PhaseGoodput]) -> list[Split]:
    """Of every pair of sizes."""
    return [split for one in prefill for other in decode for split in splits(num_gpus, one, other)]


def nodes(gpus_per_node: int, prefill: Sequence[PhaseGoodput], decode: Sequence[PhaseGoodput]) -> list[Split]:
    """For each pair of sizes that fits into a node the split with the most promise per GPU; the best pairs first."""
    best: dict[tuple[int, int], Split] = {}
    fitting = all_splits(gpus_per_node, prefill, decode)
    for split in sorted(fitting, key=lambda split: (-split.promise / split.num_gpus, split.num_gpus)):
        best.setdefault((split.prefill.tensor_parallel, split.decode.tensor_parallel), split)
    return list(best.values())
