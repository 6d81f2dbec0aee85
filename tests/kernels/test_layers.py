"""The pointwise layers against transformers' modules, and the two writers of the cache."""

from __future__ import annotations

import pytest
import torch

from kernels.reference.layers import apply_rope, copy_blocks, rms_norm, silu_and_mul, store_kv

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As an engine by default; more only wait for each other on products this small."""
    torch.set_num_threads(1)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_rms_norm_equals_that_of_transformers(dtype: torch.dtype, scale: float) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = random(7, 5, 48, dtype=dtype) * scale
    norm = LlamaRMSNorm(48, eps=1e-5)
    norm.weight.data = (1 + 0.15 * random(48, seed=1)).to(dtype)
    assert torch.equal(rms_norm(x, norm.weight.data, 1e-5), norm(x))


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_rope_equals_that_of_transformers(dtype: torch.dtype, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=head_dim * 3, num_attention_heads=3, head_dim=head_dim)
    positions = torch.tensor([0, 1, 2, 77, 1000, 2047])
    x = random(len(positions), 3, head_dim, dtype=dtype)
    cos, sin = LlamaRotaryEmbedding(config)(x.float(), positions[None])  # [1, tokens, head_dim], both halves alike
    wanted, _ = apply_rotary_pos_emb(x.float().transpose(0, 1)[None], x.float().transpose(0, 1)[None], cos, sin)
    half = head_dim // 2
    got = apply_rope(x, cos[0, :, None, :half], sin[0, :, None, :half])
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted[0].transpose(0, 1).to(dtype), rtol=0, atol=1e-6)


def test_rope_turns_a_pair_by_its_angle() -> None:
    x = torch.tensor([[[3.0, 4.0]]])
    quarter = apply_rope(x, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    assert quarter.tolist() == [[[-4.0, 3.0]]]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_mul_equals_the_gated_part_of_transformers_mlp(dtype: torch.dtype) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=40, hidden_act="silu")).to(dtype)
    x = random(11, 32, dtype=dtype)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    got = mlp.down_proj(silu_and_mul(torch.cat([gate, up], dim=-1)))
    torch.testing.assert_close(got, mlp(x))


def test_silu_and_mul_of_far_values_is_their_limit() -> None:
    gate = torch.tensor([[-1e4, -200.0, -0.0, 0.0, 200.0, 1e4]])
    wanted = [[0.0, 0.0, 0.0, 0.0, 200.0, 1e4]]
    assert silu_and_mul(torch.cat([gate, torch.ones_like(gate)], dim=-1)).abs().tolist() == wanted


@pytest.mark.parametrize(("num_threads", "width"), [(1, 1500), (2, 1500), (3, 11008)])
def test_a_row_has_the_same_bits_beside_any_number_of_others(num_threads: int, width: int) -> None:
    """However the rows are cut among threads."""
    torch.set_num_threads(num_threads)
    x = random(40, 2 * width)
    heads, cos, sin = x.view(40, 4, -1), random(40, 1, width // 4, seed=1), random(40, 1, width // 4, seed=2)
    for compute in (
        lambda rows: silu_and_mul(x[rows].clone()),
        lambda rows: rms_norm(x[rows].clone(), x[0], 1e-5),
        lambda rows: apply_rope(heads[rows].clone(), cos[rows], sin[rows]),
    ):
        alone = torch.cat([compute(slice(row, row + 1)) for row in range(40)])
        for count in (3, 8, 23, 29, 36):
            assert torch.equal(compute(slice(0, count)), alone[:count])


# --- writing the cache ----------------------------------------------------------------------------------------


def test_store_kv_writes_each_token_to_its_slot_and_nothing_else() -> None:
    cache = torch.full((6, 2, 4, 8), float("nan"))
    new = random(5, 2, 8)
    block_ids, offsets = torch.tensor([3, 3, 0, 5, 5]), torch.tensor([2, 3, 0, 3, 1])
    store_kv(cache, new, block_ids, offsets)
    for token, (block, offset) in enumerate(zip(block_ids.tolist(), offsets.tolist(), strict=True)):
        assert torch.equal(cache[block, :, offset], new[token])
    assert int(cache.isnan().sum()) == (6 * 4 - 5) * 2 * 8


def test_copy_blocks_copies_whole_blocks_in_every_layer() -> None:
    plane = random(3, 6, 2, 4, 8)
    before = plane.clone()
    copy_blocks(plane, torch.tensor([1, 4]), torch.tensor([0, 5]))
    assert torch.equal(plane[:, [0, 5]], before[:, [1, 4]])
    assert torch.equal(plane[:, 1:5], before[:, 1:5])


def test_copy_blocks_reads_before_it_writes() -> None:
    """A block may be the source of one copy and the target of another."""
    plane = random(2, 4, 3)
    before = plane.clone()
    copy_blocks(plane, torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]))
    assert torch.equal(plane[:, :3], before[:, [2, 0, 1]])
