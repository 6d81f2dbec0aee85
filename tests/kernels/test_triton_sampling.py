"""Sampling in Triton against the sampler on the processor, token for token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.batch_sampler import draws_of
from engine.sampler import sample
from engine.types import SamplingParams
from tests.kernels.interpreted import EACH_DEVICE, random

from kernels.triton.sampling import _TILE, choose  # isort: skip

GREEDY = SamplingParams(temperature=0.0)


def choose_all(logits: torch.Tensor, params: list[SamplingParams], positions: list[int], device: str) -> list[int]:
    return choose(logits.to(device), draws_of(params, positions)).tolist()


@EACH_DEVICE
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, _TILE + 1, 3 * _TILE])
def test_tokens_are_those_of_the_processor(vocab_size: int, device: str) -> None:
    logits = random(8, vocab_size) * 3
    params = [
        GREEDY, replace(GREEDY, temperature=0.7, seed=3), replace(GREEDY, temperature=1.0, seed=2**63 + 5),
        replace(GREEDY, temperature=4.0, seed=2**64 - 1, choice=2), replace(GREEDY, temperature=0.7, seed=3, choice=1),
        replace(GREEDY, temperature=1e-3, seed=0), replace(GREEDY, temperature=1.0, seed=4, top_k=3),
        replace(GREEDY, temperature=1.3, seed=5, top_p=0.7, min_p=0.01),
    ]  # fmt: skip
    positions = [0, 5, 2**20, 77, 5, 1, 8, 9]
    wanted = [
        sample(row.numpy(), one, position) for row, one, position in zip(logits, params, positions, strict=True)
    ]  # fmt: skip
    assert choose_all(logits, params, positions, device) == wanted


@EACH_DEVICE
def test_of_equal_logits_the_lowest_id_is_taken(device: str) -> None:
    logits = torch.zeros(2, 2 * _TILE + 9)
    logits[0, [_TILE - 1, _TILE, 2 * _TILE + 3]] = logits[1, [2 * _TILE + 3, 2 * _TILE + 5]] = 2.0
    assert choose_all(logits, [GREEDY] * 2, [0, 0], device) == [_TILE - 1, 2 * _TILE + 3]


@EACH_DEVICE
def test_what_is_banned_is_never_chosen(device: str) -> None:
    logits = torch.full((40, 50), -torch.inf)
    logits[:, 17:19] = torch.tensor([0.0, -3.0])
    params = [replace(GREEDY, temperature=2.0, seed=seed) for seed in range(40)]
    assert set(choose_all(logits, params, [4] * 40, device)) == {17, 18}
