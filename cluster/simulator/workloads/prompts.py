"""Prompts for arrivals: token ids that are equal where the arrivals say so, and nowhere else."""

from __future__ import annotations

from cluster.simulator.workloads.workload import Arrival, Workload

NUM_DIGITS = 4  # tokens that tell one piece from another
ALONE = 2**40  # added to the number of an arrival without pieces; traces name fewer


def prompt_of(workload: Workload, number: int, vocab_size: int) -> tuple[int, ...]:
    """The prompt of the arrival of this number. Ids 0 to 15 are left to special tokens."""
    arrival = workload.arrivals[number]
    size = workload.piece_tokens
    names = arrival.pieces or range(ALONE + number, ALONE + number + 1 + arrival.num_prompt // size)
    tokens: list[int] = []
    for name in names:
        tokens += _piece(name, size, vocab_size)
    assert len(tokens) >= arrival.num_prompt, "pieces cover the prompt"
    return tuple(tokens[: arrival.num_prompt])


def num_pieces(arrival: Arrival, piece_tokens: int) -> int:
    return -(-arrival.num_prompt // piece_tokens)


def _piece(name: int, size: int, vocab_size: int) -> list[int]:
    base = vocab_size - 16
    digits = [16 + name // base**place % base for place in range(NUM_DIGITS)]
    return (digits + [16] * max(0, size - NUM_DIGITS))[:size]
