"""Batch invariance of matrix products: a row's result must not depend on how many rows are computed with it.

BLAS libraries choose their code, and with it the order of additions, by the number of rows. On a given machine
most row counts agree bit for bit; small ones (matrix-vector code) often do not. A RowLadder lists the row counts
that agree, found by trying them on the model's own weight shapes at start-up; batches are padded up to a rung.
If a machine's library agrees nowhere, every product is cut into tiles of one fixed count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

REFERENCE_ROWS = 64
LOW_RUNGS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64)
# Row counts above REFERENCE_ROWS are tried at these samples; all must agree, or tiles of REFERENCE_ROWS are used.
HIGH_SAMPLES = (80, 96, 112, 128, 176, 256, 384, 512)
HIGH_STEP = 16
MAX_HIGH_COLUMNS = 16384


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
    """Try row counts on these weights ([out, in]; one of each shape is enough) and on attention's two products.

    Takes well under a second per shape. Deterministic inputs: two processes on one machine agree.
    """
    probes = [_LinearProbe(weight) for weight in weights]
    probes += [_BatchedProbe(head_dim, kv_tile, weights[0].dtype), _BatchedProbe(kv_tile, head_dim, weights[0].dtype)]
    rungs = tuple(rows for rows in LOW_RUNGS if all(probe.agrees(rows) for probe in probes))
    high = all(probe.agrees(rows) for probe in probes for rows in HIGH_SAMPLES)
    return RowLadder(rungs or (REFERENCE_ROWS,), high)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ladder: RowLadder) -> torch.Tensor:
    """x @ weight.T + bias. x: [rows, in] with rows on a rung; weight: [out, in] -> [rows, out]."""
    tile = REFERENCE_ROWS if weight.shape[0] > MAX_HIGH_COLUMNS else ladder.tile
    if tile is None or x.shape[0] <= tile:
        return F.linear(x, weight, bias)
    return torch.cat([F.linear(part, weight, bias) for part in x.split(tile)])


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20251122)


class _LinearProbe:
    def __init__(self, weight: torch.Tensor) -> None:
        rows = torch.randn(HIGH_SAMPLES[-1], weight.shape[1], generator=_generator())
        self._x = rows.to(dtype=weight.dtype, device=weight.device)
        self._weight = weight
        self._want = F.linear(self._x[:REFERENCE_ROWS], weight)

    def agrees(self, rows: int) -> bool:
        if rows > REFERENCE_ROWS and self._weight.shape[0] > MAX_HIGH_COLUMNS:
            return True  # an output head: `linear` cuts its rows into tiles in any case
        got = F.linear(self._x[:rows], self._weight)
        return torch.equal(got[:REFERENCE_ROWS], self._want[:rows])


class _BatchedProbe:
    """[batch, rows, inner] @ [batch, inner, outer], as attention multiplies."""

    def __init__(self, inner: int, outer: int, dtype: torch.dtype) -> None:
        self._a = torch.randn(2, HIGH_SAMPLES[-1], inner, generator=_generator()).to(dtype)
        self._b = torch.randn(2, outer, inner, generator=_generator()).to(dtype).transpose(1, 2)
        self._want = torch.bmm(self._a[:, :REFERENCE_ROWS].contiguous(), self._b)

    def agrees(self, rows: int) -> bool:
        got = torch.bmm(self._a[:, :rows].contiguous(), self._b)
        alone = torch.bmm(self._a[:1, :rows].contiguous(), self._b[:1])
        return torch.equal(got[:, :REFERENCE_ROWS], self._want[:, :rows]) and torch.equal(got[:1], alone)
