"""Sampling in C++ against the sampler that goes row by row, token for token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch_sampler import draws_of
from engine.sampler import sample
from engine.types import SamplingParams
from tests.kernels.native import native

pytestmark = pytest.mark.usefixtures("each_vectors")

ROW = st.tuples(
    st.integers(0, 2**32),  # of the logits
    st.sampled_from([0.0, 0.3, 3.0, 40.0]),  # their spread
    st.sampled_from([0.0, 1e-3, 0.7, 1.0, 5.0]),  # temperature
    st.sampled_from([0, 1, 2, 40, 10_000]),  # top_k
    st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),  # top_p
    st.sampled_from([0.0, 1e-3, 0.1, 1.0]),  # min_p
    st.integers(0, 2**64 - 1),  # seed
    st.integers(0, 3),  # choice
    st.integers(0, 2**20),  # position
    st.floats(0, 0.9),  # share that is banned
)


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(ROW, min_size=1, max_size=4), vocab_size=st.sampled_from([1, 3, 64, 1001, 5000]))
def test_tokens_are_those_of_the_sampler(rows: list, vocab_size: int) -> None:
    logits, params, positions = [], [], []
    for drawn, spread, temperature, top_k, top_p, min_p, seed, choice, position, banned in rows:
        numbers = np.random.default_rng(drawn)
        row = (numbers.normal(size=vocab_size) * spread).astype(np.float32)
        row = np.round(row, 1) if drawn % 2 else row  # many equal ones
        row[1:][numbers.random(vocab_size - 1) < banned] = -np.inf
        logits.append(row)
        params.append(
            SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, choice=choice)
        )
        positions.append(position)
    choose = native(torch.float32, num_threads=2).choose
    got = choose(torch.from_numpy(np.stack(logits)), draws_of(params, positions)).tolist()
    assert got == [sample(*one) for one in zip(logits, params, positions, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_draws_from_a_real_vocabulary_are_those_of_the_sampler(seed: int) -> None:
    rows = np.random.default_rng(seed).gumbel(size=(40, 49_152)).astype(np.float32) * 2
    params = [SamplingParams(temperature=0.5 + 0.05 * row, seed=seed * 40 + row) for row in range(40)]
    got = native(torch.float32).choose(torch.from_numpy(rows), draws_of(params, range(40))).tolist()
    assert got == [sample(row, one, position) for position, (row, one) in enumerate(zip(rows, params, strict=True))]


def test_a_nan_shows() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 33] = float("nan")
    assert native(torch.float32).choose(logits, draws_of([SamplingParams(temperature=0.0)], [0])).tolist() == [33]


@pytest.mark.parametrize("size", [3, 9, 50])
def test_a_row_without_any_number_gives_a_token_of_the_vocabulary(size: int) -> None:
    """What lies behind the row is that of a longer one before."""
    choose = native(torch.float32).choose
    drawn = draws_of([SamplingParams(temperature=1.0, seed=1)], [0])
    choose(torch.zeros(1, 64), drawn)
    assert choose(torch.full((1, size), -math.inf), drawn).item() < size
