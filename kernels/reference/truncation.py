"""Which tokens may be sampled: top-k, top-p and min-p for all rows at once, as engine/sampler.py does for one."""

from __future__ import annotations

import torch


def keep_top(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """scaled: [rows, vocab] float64, logits / temperature; top_k: [rows] int64 (0: off); top_p (1: off), min_p (0:
    off): [rows] float64 -> scaled, -inf where a token is left out.

    Ties of the k-th stay; of equal tokens at the edge of top-p those with the lower ids."""
    vocab_size = scaled.shape[1]
    ordered, order = scaled.sort(dim=1, descending=True, stable=True)
    last = torch.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)[:, None] - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last), -torch.inf)
    weights = (ordered - ordered[:, :1]).exp()
    sums = weights.cumsum(1)
    before = torch.nn.functional.pad(sums[:, :-1], (1, 0)) / sums[:, -1:]
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (top_p < 1)[:, None], -torch.inf)
    ordered = ordered.masked_fill(ordered < ordered[:, :1] + min_p.log()[:, None], -torch.inf)
    return torch.empty_like(scaled).scatter_(1, order, ordered)
