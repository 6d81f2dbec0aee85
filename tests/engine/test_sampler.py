"""The sampler: Philox by its published vectors, the kept tokens by transformers, the draws by their frequencies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from engine.sampler import gumbel_noise, philox, sample
from engine.types import SamplingParams

VECTORS = {  # Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, result
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


# --- the generator --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS.values(), ids=VECTORS)
def test_philox_gives_the_published_words(counter: str, key: str, wanted: str) -> None:
    low, high = words(key)
    got = philox(np.array([words(counter)], dtype=np.uint32), seed=low | high << 32)
    assert got.dtype == np.uint32
    assert got.tolist() == [words(wanted)]


def test_the_choice_index_changes_the_high_word_of_the_key() -> None:
    counters = np.zeros((1, 4), dtype=np.uint32)
    assert (philox(counters, seed=7, choice=5) == philox(counters, seed=7 | 5 << 32)).all()
    assert (philox(counters, seed=7, choice=5) != philox(counters, seed=7)).any()


def test_counters_are_independent_of_those_beside_them() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (50, 4), dtype=np.uint32)
    together = philox(counters, seed=123456789)
    for index in range(50):
        assert (philox(counters[index : index + 1], seed=123456789) == together[index]).all()


def test_noise_of_a_token_does_not_depend_on_the_others() -> None:
    """So vocabulary shards, top-k and top-p change no noise."""
    whole = gumbel_noise(np.arange(1000), seed=42, position=17)
    numbers = np.random.default_rng(1)
    for size in (1, 2, 3, 10, 500):
        ids = numbers.choice(1000, size, replace=False)
        assert (gumbel_noise(ids, seed=42, position=17) == whole[ids]).all()


@pytest.mark.parametrize("change", [{"seed": 43}, {"seed": 42 + 2**32}, {"position": 18}, {"choice": 1}], ids=str)
def test_seed_position_and_choice_each_change_the_noise(change: dict[str, int]) -> None:
    ids = np.arange(64)
    base = gumbel_noise(ids, **{"seed": 42, "position": 17})
    other = gumbel_noise(ids, **({"seed": 42, "position": 17} | change))
    assert (base != other).all()


def test_noise_has_the_moments_of_a_gumbel_and_is_finite() -> None:
    noise = gumbel_noise(np.arange(200_000), seed=3, position=5)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02


# --- greedy ---------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_most_likely_whatever_the_seed() -> None:
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    wanted = int(logits.argmax())
    assert {
        sample(logits, SamplingParams(temperature=0, seed=seed, top_k=3, top_p=0.5), position=seed)
        for seed in range(20)
    } == {wanted}


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros(50, dtype=np.float32)
    logits[[33, 12, 40]] = 2.5
    assert sample(logits, SamplingParams(temperature=0), position=0) == 12


@pytest.mark.parametrize(
    "params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(temperature=1e-6)]
)
def test_narrow_sampling_is_greedy(params: SamplingParams) -> None:
    logits = np.random.default_rng(2).normal(size=300).astype(np.float32)
    assert all(sample(logits, params, position) == logits.argmax() for position in range(50))


# --- which tokens are kept ------------------------------------------------------------------------------------


def kept(logits: np.ndarray, params: SamplingParams, draws: int = 1000) -> set[int]:
    """The tokens that can come, seen by drawing at many positions from logits so flat that each kept one comes."""
    return {sample(logits, params, position) for position in range(draws)}


def kept_by_transformers(logits: np.ndarray, params: SamplingParams) -> set[int]:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.LongTensor([[0]])
    scores: torch.Tensor = torch.from_numpy(logits.astype(np.float64))[None]
    scores = torch.as_tensor(TemperatureLogitsWarper(params.temperature)(ids, scores))
    if params.top_k:
        scores = torch.as_tensor(TopKLogitsWarper(params.top_k)(ids, scores))
    if params.top_p < 1:
        scores = torch.as_tensor(TopPLogitsWarper(params.top_p)(ids, scores))
    return set(scores[0].isfinite().nonzero().flatten().tolist())


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=5), SamplingParams(top_k=23), SamplingParams(top_k=24), SamplingParams(top_k=500),
        SamplingParams(top_p=0.3), SamplingParams(top_p=0.9), SamplingParams(top_p=0.999),
        SamplingParams(top_k=12, top_p=0.6), SamplingParams(temperature=1.7, top_p=0.5),
        SamplingParams(temperature=2.0, top_k=20, top_p=0.95),
    ],
    ids=lambda params: f"T{params.temperature}-k{params.top_k}-p{params.top_p}",
)  # fmt: skip
def test_the_kept_tokens_are_those_of_transformers(params: SamplingParams, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(scale=0.3, size=24).astype(np.float32)
    assert kept(logits, params) == kept_by_transformers(logits, params)


@pytest.mark.parametrize("top_k", [1, 4, 7, 12])
def test_top_k_keeps_all_ties_of_its_last_as_transformers_do(top_k: int) -> None:
    logits = np.random.default_rng(top_k).integers(0, 4, size=20).astype(np.float32) / 2
    params = SamplingParams(top_k=top_k)
    found = kept(logits, params)
    assert found == kept_by_transformers(logits, params)
    assert len(found) > top_k


# --- how often each comes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(), SamplingParams(temperature=0.6), SamplingParams(temperature=1.8), SamplingParams(top_k=6),
        SamplingParams(top_p=0.7), SamplingParams(temperature=1.3, top_k=9, top_p=0.8),
    ],
    ids=lambda params: f"T{params.temperature}-k{params.top_k}-p{params.top_p}",
)  # fmt: skip
@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_tokens_come_as_often_as_softmax_says(params: SamplingParams, over: str) -> None:
    """Pearson's chi-square at one in ten thousand; the draws are the same in every run."""
    draws = 2500
    logits = np.random.default_rng(8).normal(size=14).astype(np.float32)
    ids = sorted(kept_by_transformers(logits, params))
    weights = np.exp(logits[ids].astype(np.float64) / params.temperature)
    expected = draws * weights / weights.sum()
    counts = np.zeros(len(logits))
    for index in range(draws):
        seed, position = (1234, index) if over == "positions" else (index * 7919, 55)
        counts[sample(logits, with_seed(params, seed), position)] += 1
    assert counts.sum() == counts[ids].sum(), "only kept tokens come"
    statistic = float(((counts[ids] - expected) ** 2 / expected).sum())
    assert statistic < chi_square_bound(len(ids) - 1), (counts[ids], expected)


def test_neighbouring_positions_are_independent() -> None:
    """Pairs of successive draws from a uniform vocabulary of four fill their sixteen cells evenly."""
    logits, draws = np.zeros(4, dtype=np.float32), 4000
    tokens = [sample(logits, SamplingParams(seed=9), position) for position in range(draws + 1)]
    counts = np.bincount([4 * a + b for a, b in itertools.pairwise(tokens)], minlength=16)
    statistic = float(((counts - draws / 16) ** 2 / (draws / 16)).sum())
    assert statistic < chi_square_bound(15)


def with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, seed=seed)


def chi_square_bound(degrees: int) -> float:
    """The 0.9999 quantile, by Wilson and Hilferty's approximation (1931)."""
    normal_quantile = 3.719
    return degrees * (1 - 2 / (9 * degrees) + normal_quantile * math.sqrt(2 / (9 * degrees))) ** 3
