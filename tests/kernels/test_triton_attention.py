"""Paged attention in Triton against an explicit softmax in float64, over a cache whose unused slots are NaN."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kernels.backend import Call, GroupCalls, GroupPlace, Heads, Norms
from kernels.reference.attention import first_key, tile_tokens
from tests.kernels.interpreted import EACH_DEVICE, TYPES
from tests.kernels.test_attention import CASES, NAN, Case, make_case

from kernels.triton.backend import TritonBackend  # isort: skip

CLOSE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}
EACH_MODE = pytest.mark.parametrize("invariant", [False, True], ids=["free", "invariant"])


@dataclass(frozen=True)
class Part:
    """New tokens of one sequence of a case: `num_new` from position `start`."""

    seq: int
    start: int
    num_new: int


def last_tokens(case: Case) -> list[Part]:
    num_new = len(case.queries[0])
    return [Part(seq, length - num_new, num_new) for seq, length in enumerate(case.lengths)]


def attend(
    case: Case, parts: list[Part], invariant: bool, device: str, window: int | None = None, num_programs: int = 4
) -> list[torch.Tensor]:  # fmt: skip
    """One step: of each part [num_new, num_heads, head_dim]. Queries are those of the case's last tokens."""
    num_heads, head_dim = case.queries[0].shape[1:]
    num_kv_heads, block_size = case.k_cache.shape[1:3]
    backend = TritonBackend(case.k_cache.new_empty(0).to(device), invariant)
    backend.num_programs = num_programs
    attention = backend.attention(Heads(num_heads, num_kv_heads, head_dim, head_dim**-0.5), Norms(1e-5, wide=False))
    rows, calls, row = [], [], 0
    for part in parts:
        own = slice(part.start, part.start + part.num_new)
        first = case.lengths[part.seq] - len(case.queries[part.seq])
        queries = case.queries[part.seq][part.start - first : part.start - first + part.num_new]
        rows.append(torch.cat((queries, case.keys[part.seq][own], case.values[part.seq][own]), dim=1).flatten(1))
        begin, tile = first_key(part.start, window, block_size), tile_tokens(block_size)
        width = -(-(part.start + part.num_new - begin) // tile) * tile // block_size
        blocks = torch.nn.functional.pad(case.blocks[part.seq], (0, width))[begin // block_size :][:width]
        rows_of_part = slice(row, row + part.num_new)
        calls.append(Call(rows_of_part, (part.start,), part.num_new, blocks.numpy()[None].astype(np.int64)))
        row += part.num_new
    (plan,) = attention.plan([GroupCalls(tuple(calls), window)], block_size)
    positions = torch.cat([torch.arange(part.start, part.start + part.num_new) for part in parts])
    seqs = torch.cat([torch.full((part.num_new,), part.seq) for part in parts])
    still = torch.ones(4096, head_dim // 2, device=device), torch.zeros(4096, head_dim // 2, device=device)
    place = GroupPlace(
        case.blocks[seqs, positions // block_size].to(device), (positions % block_size).to(device),
        attention.turns(*still, positions.to(device)), plan,
    )  # fmt: skip
    caches = case.k_cache.to(device), case.v_cache.to(device)
    out = attention.attend(torch.cat(rows).to(device), None, None, *caches, place).cpu()
    return list(out.view(row, num_heads, head_dim).split([part.num_new for part in parts]))


def explicit(case: Case, part: Part, window: int | None = None) -> torch.Tensor:
    """The definition, one query at a time, in float64."""
    keys, values = case.keys[part.seq].double(), case.values[part.seq].double()
    num_heads, head_dim = case.queries[0].shape[1:]
    keys, values = (x.repeat_interleave(num_heads // keys.shape[1], dim=1) for x in (keys, values))
    first = case.lengths[part.seq] - len(case.queries[part.seq])
    rows = []
    for position in range(part.start, part.start + part.num_new):
        seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
        query = case.queries[part.seq][position - first].double()
        scores = torch.einsum("hd,thd->ht", query, keys[seen]) / head_dim**0.5
        rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values[seen]))
    return torch.stack(rows)


def check(case: Case, parts: list[Part], got: list[torch.Tensor], tolerance: float, window: int | None = None) -> None:
    for part, own in zip(parts, got, strict=True):
        torch.testing.assert_close(own.double(), explicit(case, part, window), rtol=tolerance, atol=tolerance)


@EACH_DEVICE
@EACH_MODE
@TYPES
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize(("lengths", "num_new"), CASES.values(), ids=CASES)
def test_it_equals_an_explicit_softmax(
    lengths: list[int], num_new: int, block_size: int, dtype: torch.dtype, invariant: bool, device: str
) -> None:
    case = make_case(lengths, num_new, block_size=block_size, dtype=dtype, seed=block_size)
    parts = last_tokens(case)
    check(case, parts, attend(case, parts, invariant, device), CLOSE[dtype])


@EACH_DEVICE
@EACH_MODE
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 2), (6, 2, 8), (9, 3, 64), (20, 1, 16), (5, 1, 36), (2, 2, 128)]
)
def test_heads_share_keys_in_groups(
    num_heads: int, num_kv_heads: int, head_dim: int, invariant: bool, device: str
) -> None:  # fmt: skip
    case = make_case([60, 131], 7, num_heads, num_kv_heads, head_dim)
    parts = last_tokens(case)
    check(case, parts, attend(case, parts, invariant, device), CLOSE[torch.float32])


@EACH_DEVICE
@EACH_MODE
def test_prompts_and_single_tokens_share_a_step(invariant: bool, device: str) -> None:
    case = make_case([40, 200, 70, 5], 5)
    parts = [Part(0, 39, 1), Part(1, 195, 5), Part(2, 66, 3), Part(3, 4, 1)]
    check(case, parts, attend(case, parts, invariant, device), CLOSE[torch.float32])


@EACH_DEVICE
@EACH_MODE
@pytest.mark.parametrize("num_programs", [2, 16, 64])
def test_keys_of_one_sequence_are_shared_out_among_programs(num_programs: int, invariant: bool, device: str) -> None:
    """Free, in as many parts as there are programs; invariant, at multiples of a fixed length, which this exceeds."""
    case = make_case([1100, 30], 3, num_heads=2, num_kv_heads=1)
    parts = [Part(0, 1098, 2), Part(1, 29, 1)]
    check(case, parts, attend(case, parts, invariant, device, num_programs=num_programs), CLOSE[torch.float32])


@EACH_DEVICE
@EACH_MODE
@pytest.mark.parametrize("window", [1, 5, 16, 70, 1000])
def test_a_query_sees_its_window_and_nothing_that_lies_outside(window: int, invariant: bool, device: str) -> None:
    case = make_case([160, 41, 700], 9)
    parts = [Part(0, 151, 9), Part(1, 40, 1), Part(2, 699, 1)]
    for part in parts:  # what has left the window may be anything
        for position in range(max(0, part.start - window + 1)):
            block = case.blocks[part.seq, position // 16]
            case.k_cache[block, :, position % 16] = case.v_cache[block, :, position % 16] = NAN
    got = attend(case, parts, invariant, device, window, num_programs=16)
    check(case, parts, got, CLOSE[torch.float32], window)


@EACH_DEVICE
@TYPES
@pytest.mark.parametrize("window", [None, 70])
def test_a_query_has_the_same_bits_in_any_batch_and_chunk(
    window: int | None, dtype: torch.dtype, device: str
) -> None:  # fmt: skip
    """Alone, whose keys are then cut and merged; in chunks; beside others; under any number of programs."""
    case = make_case([620, 40], 40, dtype=dtype)
    (whole,) = attend(case, [Part(0, 580, 40)], True, device, window)
    for part in (Part(0, 619, 1), Part(0, 580, 7), Part(0, 601, 19)):
        wanted = whole[part.start - 580 : part.start - 580 + part.num_new]
        for others in ([], [Part(1, 30, 1), Part(1, 8, 20)]):
            for num_programs in (2, 40):
                got, *_ = attend(case, [part, *others], True, device, window, num_programs)
                assert torch.equal(got, wanted)


@EACH_DEVICE
@EACH_MODE
def test_large_logits_stay_finite_and_right(invariant: bool, device: str) -> None:
    case = make_case([140, 9], 4, scale=60.0)
    parts = last_tokens(case)
    got = attend(case, parts, invariant, device)
    assert all(part.isfinite().all() for part in got)
    check(case, parts, got, 2e-3)  # a score of 1e4 has an error of 1e-3 in float32
