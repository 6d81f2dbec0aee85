"""Log probabilities of tokens under the model's own distribution, before bias, penalties and truncation."""

from __future__ import annotations

import numpy as np

from engine.types import TokenLogprob


def logprob_of(logits: np.ndarray, token_id: int, num_top: int) -> TokenLogprob:
    """One token's logprob and rank, and those of the `num_top` most likely ones. logits: [vocab] float32."""
    wide = logits.astype(np.float64)
    greatest = wide.max()
    total = greatest + np.log(np.exp(wide - greatest).sum())
    rank = 1 + int(np.count_nonzero(wide > wide[token_id]))
    top = tuple((int(one), float(wide[one] - total)) for one in _most_likely(wide, num_top))
    return TokenLogprob(float(wide[token_id] - total), rank, top)


def _most_likely(logits: np.ndarray, count: int) -> np.ndarray:
    """Ids of the greatest logits, greatest first; of equal ones the lower id."""
    count = min(count, len(logits))
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    candidates = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]
