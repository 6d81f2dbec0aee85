"""The sampler: argmax of (processed logits / T + Gumbel noise), the noise from a counter-based generator.

Philox4x32-10 (Salmon et al., 2011) keyed by (seed, choice) at counter (position, token id): the noise of a token
at a position depends on nothing else, so a stream can be resumed anywhere and is the same in any batch.
temperature 0 takes the argmax (ties: the lowest id). top-k keeps ties of the k-th logit; top-p keeps the smallest
set of most likely tokens whose probability reaches p, after top-k; then come min-p and typical-p, all as transformers'
warpers do. What changes logits before that is in engine/logits.py.
"""

from __future__ import annotations

import numpy as np

from engine.types import SamplingParams

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counters: np.ndarray, seed: int, choice: int = 0) -> np.ndarray:
    """Philox4x32-10. counters: [n, 4] uint32 values -> [n, 4] uint32. The key is the seed's low word and the
    seed's high word xor the choice index."""
    words = [counters[:, lane].astype(np.uint64) for lane in range(4)]
    key = [seed & 0xFFFFFFFF, ((seed >> 32) ^ choice) & 0xFFFFFFFF]
    for _ in range(_ROUNDS):
        product0, product1 = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            (product1 >> _SHIFT) ^ words[1] ^ np.uint64(key[0]),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ words[3] ^ np.uint64(key[1]),
            product0 & _LOW,
        ]
        key = [(key[0] + _WEYL[0]) & 0xFFFFFFFF, (key[1] + _WEYL[1]) & 0xFFFFFFFF]
    return np.stack(words, axis=1).astype(np.uint32)


def gumbel_noise(token_ids: np.ndarray, seed: int, position: int, choice: int = 0) -> np.ndarray:
    """Gumbel(0, 1) noise of these tokens at a position: [n] int -> [n] float64.

    Four neighbouring token ids share one counter (token id // 4, position); a token's lane is its id modulo 4."""
    groups = token_ids >> 2
    is_wanted = np.zeros(int(groups.max(initial=-1)) + 1, dtype=bool)
    is_wanted[groups] = True
    wanted = np.flatnonzero(is_wanted)
    counters = np.zeros((len(wanted), 4), dtype=np.uint32)
    counters[:, 0] = wanted
    counters[:, 1] = position
    first_lanes = (np.cumsum(is_wanted) - 1) << 2
    noise = philox(counters, seed, choice).ravel()[first_lanes[groups] + (token_ids & 3)].astype(np.float64)
    noise += 0.5
    noise *= 2.0**-32
    for _ in range(2):
        np.negative(np.log(noise, out=noise), out=noise)
    return noise


def sample(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    """The token that follows position - 1. logits: [vocab] float32; `position` is the new token's own position."""
    if params.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / params.temperature
    candidates = _keep_top(scaled, params)
    noise = gumbel_noise(candidates, params.seed, position, params.choice)
    return int(candidates[(scaled[candidates] + noise).argmax()])


def _keep_top(scaled: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Ids, rising, of the tokens that are not banned and that top-k, top-p, min-p and typical-p leave."""
    candidates = np.arange(len(scaled)) if np.isfinite(scaled).all() else np.flatnonzero(scaled > -np.inf)
    if 0 < params.top_k < len(scaled):
        threshold = np.partition(scaled, -params.top_k)[-params.top_k]
        candidates = candidates[scaled[candidates] >= threshold]
    if params.top_p < 1:
        candidates = _keep_nucleus(scaled, candidates, params.top_p)
    if params.min_p > 0:
        kept = scaled[candidates]
        candidates = candidates[kept >= kept.max() + np.log(params.min_p)]
    if params.typical_p < 1:
        candidates = _keep_typical(scaled, candidates, params.typical_p)
    return candidates


def _keep_nucleus(scaled: np.ndarray, candidates: np.ndarray, top_p: float) -> np.ndarray:
    order = candidates[np.argsort(-scaled[candidates], kind="stable")]
    weights = np.exp(scaled[order] - scaled[order[0]])
    before = np.concatenate(([0.0], np.cumsum(weights)[:-1])) / weights.sum()
    return np.sort(order[before < top_p])


def _keep_typical(scaled: np.ndarray, candidates: np.ndarray, mass: float) -> np.ndarray:
    """Tokens whose surprise is nearest to the expected one, up to `mass` (Meister et al., 2022); ties are kept."""
    kept = scaled[candidates]
    logprobs = kept - kept.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    probabilities = np.exp(logprobs)
    distance = np.abs(-logprobs + (probabilities * logprobs).sum())
    order = np.argsort(distance, kind="stable")
    last = min(int(np.count_nonzero(np.cumsum(probabilities[order]) < mass)), len(order) - 1)
    return candidates[distance <= distance[order[last]]]
