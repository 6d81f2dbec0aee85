"""The reference kernels on a CUDA device: the specification that faster kernels there are tested against.

Needs torch and pytest only. On a machine without a device these tests are not selected (`make test-gpu` selects them).
"""

from __future__ import annotations

import pytest
import torch

from kernels.reference.attention import make_segment, paged_attention, tile_tokens, weigh_by_tiles
from kernels.reference.ladder import FREE, linear, measure_linear
from kernels.reference.layers import rms_norm, silu_and_mul
from kernels.reference.matrix import PlainMatrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
BLOCK_SIZE, NUM_BLOCKS, KV_HEADS, GROUPS, HEAD_DIM = 16, 24, 2, 3, 64


def attend(device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    k_cache, v_cache = (randn(NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in range(2))
    width = tile_tokens(BLOCK_SIZE) // BLOCK_SIZE
    blocks = torch.randperm(NUM_BLOCKS, generator=generator)[: 2 * width].view(2, width).to(device)
    segment = make_segment(slice(0, 2), [40, 99], 1, blocks, GROUPS, BLOCK_SIZE, FREE)
    q = randn(2, KV_HEADS * GROUPS, HEAD_DIM)
    return paged_attention(q, k_cache, v_cache, segment, HEAD_DIM**-0.5, weigh_by_tiles)


def test_paged_attention_on_the_device_equals_that_on_the_processor():
    torch.testing.assert_close(attend("cuda").cpu(), attend("cpu"), rtol=1e-3, atol=1e-3)


def test_layers_on_the_device_equal_those_on_the_processor():
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(7, 128, generator=generator), torch.randn(128, generator=generator)
    torch.testing.assert_close(rms_norm(x.cuda(), weight.cuda(), 1e-5).cpu(), rms_norm(x, weight, 1e-5))
    torch.testing.assert_close(silu_and_mul(x.cuda()).cpu(), silu_and_mul(x))


def test_rows_on_the_ladder_do_not_depend_on_their_number_on_the_device():
    weight = PlainMatrix(torch.randn(256, 128, generator=torch.Generator().manual_seed(3)).cuda())
    ladder = measure_linear([weight])
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(4)).cuda()
    whole = linear(x, weight, None, ladder)
    for rows in ladder.rungs:
        assert torch.equal(linear(x[:rows], weight, None, ladder), whole[:rows])
