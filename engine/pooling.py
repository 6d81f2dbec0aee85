"""Pooling: a prompt's hidden states, after the final norm, as one embedding of length 1.

"last" is the last token's state, "mean" that of all tokens on average. A chunk's rows come as they are computed: for
"last" only the last one, for "mean" all of them, whose sum is kept with the sequence. A sequence that is preempted
begins anew.
"""

from __future__ import annotations

import numpy as np

from engine.scheduler import Scheduled


def pool(item: Scheduled, states: np.ndarray) -> bytes:
    """states: [num_states_of(item), hidden]. The embedding as float32, little-endian, once the prompt is computed;
    empty before. In float64 meanwhile, so that chunks hardly show in the sum."""
    sequence = item.sequence
    total = states.sum(axis=0, dtype=np.float64)
    if sequence.pooled is not None and item.start > 0:
        total += sequence.pooled
    sequence.pooled = total
    return _normalised(total).astype("<f4").tobytes() if item.samples else b""


def _normalised(vector: np.ndarray) -> np.ndarray:
    """Divided by its length: so it makes no difference whether it is a sum or a mean."""
    return vector / max(float(np.linalg.norm(vector)), np.finfo(np.float32).tiny)
