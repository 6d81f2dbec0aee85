"""Shapes: workloads made of others: faster, cut, later, with other lengths, mixed. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.simulator.workloads.prompts import ALONE, NUM_DIGITS, num_pieces
from cluster.simulator.workloads.workload import Arrival, Workload


def speed_up(workload: Workload, factor: float) -> Workload:
    """`factor` times as many requests per second; lengths stay."""
    return _each(workload, lambda arrival: replace(arrival, at_s=arrival.at_s / factor))


def shift(workload: Workload, by_s: float) -> Workload:
    return _each(workload, lambda arrival: replace(arrival, at_s=arrival.at_s + by_s))


def cut(workload: Workload, max_s: float | None = None, max_requests: int | None = None) -> Workload:
    """What comes before `max_s`, and of that the first `max_requests`."""
    end_s = math.inf if max_s is None else max_s
    kept = [arrival for arrival in workload.arrivals if arrival.at_s < end_s]
    return replace(workload, arrivals=tuple(kept[:max_requests]))


def cap_lengths(workload: Workload, max_prompt: int, max_output: int) -> Workload:
    """Longer prompts lose their end."""

    def capped(arrival: Arrival) -> Arrival:
        num_prompt, num_output = min(arrival.num_prompt, max_prompt), min(arrival.num_output, max_output)
        return _with_lengths(arrival, num_prompt, num_output, workload.piece_tokens)

    return _each(workload, capped)


def scale_lengths(workload: Workload, prompt: float = 1.0, output: float = 1.0) -> Workload:
    """Pieces shrink and grow with their prompts, so that the same part of each is shared as before."""
    piece_tokens = NUM_DIGITS * math.ceil(workload.piece_tokens * prompt / NUM_DIGITS)

    def scaled(arrival: Arrival) -> Arrival:
        num_prompt, num_output = round(arrival.num_prompt * prompt), round(arrival.num_output * output)
        return _with_lengths(arrival, max(1, num_prompt), max(1, num_output), piece_tokens)

    return replace(_each(workload, scaled), piece_tokens=piece_tokens)


def mix(name: str, workloads: Sequence[Workload]) -> Workload:
    """All of their requests, by time; what two of them call alike stays different."""
    piece_tokens = math.gcd(*(workload.piece_tokens for workload in workloads))
    assert piece_tokens >= NUM_DIGITS, "pieces are told apart by their first tokens"
    arrivals: list[Arrival] = []
    first_free = 0
    for workload in workloads:
        num_parts = workload.piece_tokens // piece_tokens
        renamed = [_renamed(arrival, first_free, num_parts, piece_tokens) for arrival in workload.arrivals]
        first_free = 1 + max((piece for arrival in renamed for piece in arrival.pieces), default=first_free - 1)
        arrivals += renamed
    assert first_free <= ALONE, "names of pieces and numbers of prompts without any are apart"
    return Workload(name, tuple(sorted(arrivals, key=lambda arrival: arrival.at_s)), piece_tokens)


def _renamed(arrival: Arrival, first: int, num_parts: int, piece_tokens: int) -> Arrival:
    """Each piece as `num_parts` smaller ones, with names from `first` on."""
    parts = tuple(first + piece * num_parts + part for piece in arrival.pieces for part in range(num_parts))
    return _with_lengths(replace(arrival, pieces=parts), arrival.num_prompt, arrival.num_output, piece_tokens)


def _with_lengths(arrival: Arrival, num_prompt: int, num_output: int, piece_tokens: int) -> Arrival:
    resized = replace(arrival, num_prompt=num_prompt, num_output=num_output)
    return replace(resized, pieces=arrival.pieces[: num_pieces(resized, piece_tokens)])


def _each(workload: Workload, change: Callable[[Arrival], Arrival]) -> Workload:
    return replace(workload, arrivals=tuple(map(change, workload.arrivals)))
