"""The next token of each row: the greatest of logits, or of logits / temperature plus Gumbel noise.

The noise is engine/sampler.py's: Philox4x32-10 (Salmon et al., 2011) with the key from seed and choice, counters from
token and position; so a token depends on its request and its place alone, and is the same on a processor.
"""

# Triton's language is Python to its parser, not to its types.
# pyright: reportArgumentType=false

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from kernels.backend import Draws
from kernels.reference.truncation import keep_top
from kernels.triton import upload

_TILE = 4096  # tokens of a program: four share a counter
_CUT_AT_ONCE = 32  # rows that are sorted together: of 128,000 tokens each step of that is 33 MB


@triton.jit
def _best_of_tile(
    logits, temperatures, keys, positions, best, best_ids, vocab_size, num_tiles, GROUPS: tl.constexpr
):  # logits: [rows, vocab_size], float32 or float64; best, best_ids: [rows, num_tiles]
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * GROUPS * 4 + tl.arange(0, GROUPS * 4)
    inside = token < vocab_size
    value = tl.load(logits + row * vocab_size + token, mask=inside, other=float("-inf")).to(tl.float64)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        counter = (tile * GROUPS + tl.arange(0, GROUPS)).to(tl.uint32)
        zero = counter * 0
        position = zero + tl.load(positions + row).to(tl.uint32)
        key = tl.load(keys + row).to(tl.uint64)
        lane0, lane1, lane2, lane3 = tl.philox(key, counter, position, zero, zero)
        lanes = tl.join(tl.join(lane0, lane2), tl.join(lane1, lane3))  # lane after lane once it is flat
        uniform = (tl.reshape(lanes, (GROUPS * 4,)).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2 ** -32
        value = value / temperature - tl.log(-tl.log(uniform))
    value = tl.where(inside, value, float("-inf"))
    top, at = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * num_tiles + tile, top)
    tl.store(best_ids + row * num_tiles + tile, tile * GROUPS * 4 + at)


def choose(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Implements kernels.backend.Choose. logits: contiguous."""
    cut = np.flatnonzero(((draws.top_k > 0) | (draws.top_p < 1) | (draws.min_p > 0)) & (draws.temperatures > 0))
    bounds = [bound[cut] for bound in (draws.top_k, draws.top_p, draws.min_p)] if len(cut) else []
    temperatures, keys, positions, rows, *bounds = upload.place(
        [draws.temperatures, draws.keys, draws.positions, cut, *bounds], logits.device
    )
    tokens = _choose(logits, temperatures, keys, positions)
    for first in range(0, len(cut), _CUT_AT_ONCE):
        part = slice(first, first + _CUT_AT_ONCE)
        own = rows[part]
        kept = keep_top(logits[own].double() / temperatures[own, None], *(bound[part] for bound in bounds))
        tokens[own] = _choose(kept, torch.ones_like(temperatures[own]), keys[own], positions[own])
    return tokens


def _choose(
    logits: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, _TILE)
    best = torch.empty(rows, num_tiles, dtype=torch.float64, device=logits.device)
    best_ids = torch.empty(rows, num_tiles, dtype=torch.int64, device=logits.device)
    if rows:
        _best_of_tile[rows, num_tiles](
            logits, temperatures, keys, positions, best, best_ids, vocab_size, num_tiles, GROUPS=_TILE // 4
        )  # fmt: skip
    tile = best.argmax(dim=1, keepdim=True)  # torch does not promise the first of equal ones
    first = torch.where(best == best.gather(1, tile), best_ids, vocab_size).amin(dim=1)
    return first.clamp_(max=vocab_size - 1)  # where all is NaN
