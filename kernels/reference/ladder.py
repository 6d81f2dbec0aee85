"""Batch invariance of matrix products: a row's result must not depend on how many rows are computed with it.

BLAS libraries choose their code, and with it the order of additions, by the number of rows. On a given machine
most row counts agree bit for bit; small ones (matrix-vector code) often do not. A RowLadder lists the row counts
that agree, found by trying them on the model's own weight shapes at start-up; batches are padded up to a rung.
If a machine's library agrees nowhere, every product is cut into tiles of one fixed count. If not even the rows of
one tile are treated alike (seen with heads of 6 or 10 elements, never with real models), measuring fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

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


def measure_ladder(weights: list[torch.Tensor], head_dim: int, kv_tile: int) -> RowLadder:
    """Try row counts on products shaped like these weights ([out, in]; one of each shape) and like attention's two.

    Takes well under a second per shape. Deterministic inputs: two processes on one machine agree. Raises
    ArithmeticError if a row's result depends on its place even among REFERENCE_ROWS.
    """
    probes = [_LinearProbe(weight) for weight in weights]
    probes += [_BatchedProbe("qk", head_dim, kv_tile, weights[0]), _BatchedProbe("pv", kv_tile, head_dim, weights[0])]
    rungs = tuple(rows for rows in LOW_RUNGS if all(probe.agrees(rows) for probe in probes))
    if REFERENCE_ROWS not in rungs:
        raise ArithmeticError("matrix products of this machine depend on where in the batch a row is")
    # what is left of a high count when `linear` has cut tiles off it must be a rung, too
    high = set(range(HIGH_STEP, REFERENCE_ROWS, HIGH_STEP)) <= set(rungs)
    high = high and all(probe.agrees(rows) for probe in probes for rows in HIGH_SAMPLES)
    return RowLadder(rungs, high)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ladder: RowLadder) -> torch.Tensor:
    """x @ weight.T + bias. x: [rows, in] with rows on a rung; weight: [out, in] -> [rows, out]."""
    tile = REFERENCE_ROWS if weight.shape[0] > MAX_HIGH_COLUMNS else ladder.tile
    if tile is None or x.shape[0] <= tile:
        return F.linear(x, weight, bias)
    return torch.cat([F.linear(part, weight, bias) for part in x.split(tile)])


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
    def __init__(self, weight: torch.Tensor) -> None:
        x, w = _cancelling(*weight.shape, seed=1)
        self._x, self._weight = x.to(weight), w.to(weight)
        self._want = F.linear(self._x[_repeat(REFERENCE_ROWS)], self._weight)

    def agrees(self, rows: int) -> bool:
        if rows > REFERENCE_ROWS and self._weight.shape[0] > MAX_HIGH_COLUMNS:
            return True  # an output head: `linear` cuts its rows into tiles in any case
        places = _repeat(rows)
        return torch.equal(F.linear(self._x[places], self._weight), self._want[places])


class _BatchedProbe:
    """[batch, rows, inner] @ [batch, inner, outer], as attention multiplies."""

    def __init__(self, product: Literal["qk", "pv"], inner: int, outer: int, like: torch.Tensor) -> None:
        pairs = [_cancelling(outer, inner, seed) for seed in (2, 3)]
        self._a = torch.stack([x for x, _ in pairs]).to(like)
        b = torch.stack([w for _, w in pairs]).to(like).transpose(1, 2)
        self._b = b if product == "qk" else b.contiguous()  # keys are transposed, values are not
        self._want = torch.bmm(self._a[:, _repeat(REFERENCE_ROWS)], self._b)

    def agrees(self, rows: int) -> bool:
        a, want = self._a[:, _repeat(rows)], self._want[:, _repeat(rows)]
        return torch.equal(torch.bmm(a, self._b), want) and torch.equal(torch.bmm(a[:1], self._b[:1]), want[:1])
