"""Batch invariance of matrix products: a row's result must not depend on how many rows are computed with it.

BLAS libraries choose their code, and with it the order of additions, by the number of rows. On a given machine
most row counts agree bit for bit; small ones (matrix-vector code) often do not. A RowLadder lists the row counts
that agree, found by trying them on the model's own weight shapes at start-up; batches are padded up to a rung.
If a machine's library agrees nowhere, every product is cut into tiles of one fixed count. If not even the rows of
one tile are treated alike (seen with heads of 6 or 10 elements, never with real models), measuring fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from kernels.reference.matrix import Matrix

# (scores [batch, rows, keys] float32, which may be overwritten; values [batch, keys, head_dim]; key tile; row tile)
# -> softmax(scores) @ values, [batch, rows, head_dim]
Weigh = Callable[[torch.Tensor, torch.Tensor, int, int | None], torch.Tensor]

REFERENCE_ROWS = 64
LOW_RUNGS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64)
# Row counts above REFERENCE_ROWS are tried at these samples; all must agree, or tiles of REFERENCE_ROWS are used.
HIGH_SAMPLES = (80, 96, 112, 128, 176, 256, 384, 512)
HIGH_STEP = 16
MAX_HIGH_COLUMNS = 16384
_PROBE_ROWS = 61  # different rows in a probe, repeated: odd, so that each comes to lie at many places


@dataclass(frozen=True, slots=True)
class RowLadder:
    """`rungs`: usable row counts up to REFERENCE_ROWS, rising. `high`: may multiples of HIGH_STEP above be used?"""

    rungs: tuple[int, ...]
    high: bool

    def pad(self, rows: int) -> int:
        """The smallest usable row count that holds `rows`."""
        for rung in self.rungs:
            if rows <= rung:
                return rung
        step = HIGH_STEP if self.high else REFERENCE_ROWS
        return -(-rows // step) * step

    @property
    def tile(self) -> int | None:
        """Rows per product where larger counts do not agree; None where they do."""
        return None if self.high else REFERENCE_ROWS


FREE = RowLadder(tuple(range(1, REFERENCE_ROWS + 1)), high=True)  # no invariance wanted: hardly any padding


@dataclass(frozen=True, slots=True)
class Ladders:
    """Linear layers and attention use different products, which need not agree at the same counts."""

    linear: RowLadder
    attention: RowLadder


FREE_LADDERS = Ladders(FREE, FREE)


def measure_linear(weights: list[Matrix]) -> RowLadder:
    """Try row counts on products shaped like these weights (one of each shape), in the form that they have.

    Takes well under a second per shape. Deterministic inputs: two processes on one machine agree. Raises
    ArithmeticError if a row's result depends on its place even among REFERENCE_ROWS.
    """
    return _measure([_LinearProbe(weight) for weight in weights])


def measure_attention(head_dim: int, kv_tile: int, like: torch.Tensor, weigh: Weigh) -> RowLadder:
    """The same for attention's two products, of this type and on this device. Raises ArithmeticError, too."""
    return _measure([_ScoreProbe(head_dim, kv_tile, like), _WeighProbe(head_dim, kv_tile, like, weigh)])


def _measure(probes: Sequence[_Probe]) -> RowLadder:
    rungs = tuple(rows for rows in LOW_RUNGS if all(probe.agrees(rows) for probe in probes))
    if REFERENCE_ROWS not in rungs:
        raise ArithmeticError("matrix products of this machine depend on where in the batch a row is")
    # what is left of a high count when `linear` has cut tiles off it must be a rung, too
    high = set(range(HIGH_STEP, REFERENCE_ROWS, HIGH_STEP)) <= set(rungs)
    high = high and all(probe.agrees(rows) for probe in probes for rows in HIGH_SAMPLES)
    return RowLadder(rungs, high)


def linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, ladder: RowLadder) -> torch.Tensor:
    """x @ weight.T + bias. x: [rows, in] with rows on a rung; weight: [out, in] -> [rows, out]."""
    tile = REFERENCE_ROWS if weight.shape[0] > MAX_HIGH_COLUMNS else ladder.tile
    if tile is None or x.shape[0] <= tile:
        return weight.multiply(x, bias)
    return torch.cat([weight.multiply(part, bias) for part in x.split(tile)])


class _Probe(Protocol):
    def agrees(self, rows: int) -> bool:
        """Do so many rows give the bits that each has among REFERENCE_ROWS?"""
        ...


def _repeat(rows: int) -> torch.Tensor:
    """Which of a probe's _PROBE_ROWS rows lies at each of `rows` places."""
    return torch.arange(rows) % _PROBE_ROWS


def _cancelling(outer: int, inner: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [_PROBE_ROWS, inner] and w [outer, inner] with x @ w.T = 0 but for rounding.

    So a change in the order of additions shows even in bfloat16, whose own rounding hides it from ordinary numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(_PROBE_ROWS, inner // 2, generator=generator) for _ in range(2))
    order = torch.randperm(inner // 2, generator=generator)
    x, w = torch.cat((x, -x[:, order]), dim=1), torch.cat((w, w[:, order]), dim=1)
    odd = (0, inner % 2)
    return F.pad(x, odd), F.pad(w, odd)[_repeat(outer)]


class _LinearProbe:
    def __init__(self, weight: Matrix) -> None:
        x, w = _cancelling(*weight.shape, seed=1)
        self._x, self._weight = x.to(weight.like), weight.filled_with(w)
        self._want = self._weight.multiply(self._x[_repeat(REFERENCE_ROWS)], None)

    def agrees(self, rows: int) -> bool:
        if rows > REFERENCE_ROWS and self._weight.shape[0] > MAX_HIGH_COLUMNS:
            return True  # an output head: `linear` cuts its rows into tiles in any case
        places = _repeat(rows)
        return torch.equal(self._weight.multiply(self._x[places], None), self._want[places])


class _ScoreProbe:
    """Queries times keys, [batch, rows, head_dim] @ [batch, head_dim, keys]: one head or two, in one tile or more."""

    def __init__(self, head_dim: int, kv_tile: int, like: torch.Tensor) -> None:
        pairs = [_cancelling(3 * kv_tile, head_dim, seed) for seed in (2, 3)]
        self._queries = torch.stack([x for x, _ in pairs]).to(like)
        self._keys = torch.stack([w for _, w in pairs]).to(like).transpose(1, 2)
        self._tile = kv_tile
        self._want = torch.bmm(self._queries[:, _repeat(REFERENCE_ROWS)], self._keys)

    def agrees(self, rows: int) -> bool:
        queries, want = self._queries[:, _repeat(rows)], self._want[:, _repeat(rows)]
        return all(
            torch.equal(torch.bmm(queries[:batch], self._keys[:batch, :, :keys]), want[:batch, :, :keys])
            for batch in (1, 2)
            for keys in (self._tile, 3 * self._tile)
        )


class _WeighProbe:
    """Softmax and the weighing of values, over two tiles of keys and others that are masked, before and after."""

    def __init__(self, head_dim: int, kv_tile: int, like: torch.Tensor, weigh: Weigh) -> None:
        generator, half, odd = torch.Generator().manual_seed(4), kv_tile // 2, kv_tile % 2
        scores = torch.randn(2, _PROBE_ROWS, half, generator=generator).repeat(1, 1, 2)
        values = torch.randn(2, half, head_dim, generator=generator)
        values = torch.cat((values, -values), dim=1)  # they cancel within a tile, as in _cancelling: weights are equal
        self._scores = F.pad(scores, (0, odd)).repeat(1, 1, 2).to(like.device)
        self._values = F.pad(values, (0, 0, 0, odd)).repeat(1, 2, 1).to(like)
        self._tile, self._weigh = kv_tile, weigh
        self._want = self._compute(_repeat(REFERENCE_ROWS), 2, 0, 0)

    def agrees(self, rows: int) -> bool:
        want = self._want[:, _repeat(rows)]
        return all(
            torch.equal(self._compute(_repeat(rows), batch, before, after), want[:batch])
            for batch, before, after in ((1, 0, 0), (2, 0, 1), (2, 1, 2))
        )

    def _compute(self, places: torch.Tensor, batch: int, before: int, after: int) -> torch.Tensor:
        """With so many masked tiles around."""
        masked = (before * self._tile, after * self._tile)
        scores = F.pad(self._scores[:batch, places], masked, value=float("-inf"))
        return self._weigh(scores, F.pad(self._values[:batch], (0, 0, *masked)), self._tile, None)
