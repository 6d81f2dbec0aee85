"""torchao's weight-only quantisers. Run by benchmarks/quantizers.py with the Python that has it.

python torchao_weights.py HOW FROM.safetensors TO.safetensors  # every matrix, in float32, as its linear layer has it

HOW is int8 (a scale for each row), or, in groups of 32, tinygemm or hqq (torchao's two ways of choosing 4 bits). Its
layers of 4 bits can only be multiplied by, so they are restored from the functions that those layers are made with, and
the first is checked to multiply by just that.
"""

import sys

import torch
from safetensors.torch import load_file, save_file

GROUP, MIDDLE = 32, 8


def main() -> None:
    how, source, target = sys.argv[1:]
    weights = load_file(source)
    check(next(iter(weights.values())), how)
    restored = {}
    for number, (name, weight) in enumerate(weights.items(), start=1):
        restored[name] = restore(weight, how)
        if number % 30 == 0:
            print(f"torchao's {how}: {number} of {len(weights)} matrices", flush=True)
    save_file(restored, target)


def restore(weight: torch.Tensor, how: str) -> torch.Tensor:
    """weight: [out, in] bfloat16 -> [out, in] float32."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        MappingType,
        quant_primitives,
    )

    if how == "int8":
        return layer_of(weight, how).weight.dequantize(torch.float32)  # pyright: ignore[reportCallIssue] - of a subclass
    if how == "hqq":
        numbers, scales, shifts, _ = quant_primitives._choose_qparams_and_quantize_affine_hqq(
            weight, nbits=4, group_size=GROUP, compute_dtype=weight.dtype, device=weight.device
        )
    else:
        block, numbers_type = (1, GROUP), torch.int32
        scales, shifts = quant_primitives._choose_qparams_affine_tinygemm(
            weight, MappingType.ASYMMETRIC, block, numbers_type, 0, 15, 1e-6, None, weight.dtype
        )
        numbers = quant_primitives._quantize_affine_tinygemm(weight, block, scales, shifts, numbers_type, 0, 15)
    grouped = numbers.view(len(weight), -1, GROUP).float() - MIDDLE
    scales, shifts = (each.float().reshape(len(weight), -1, 1) for each in (scales, shifts))
    return (grouped * scales + shifts).view(weight.shape)


def layer_of(weight: torch.Tensor, how: str) -> torch.nn.Linear:
    """Quantised through torchao's public functions."""
    from torchao.prototype.quantization.int4 import (  # pyright: ignore[reportMissingImports]
        PrototypeInt4WeightOnlyConfig,  # the one that packs for a CPU
    )
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if how == "int8":
        config = Int8WeightOnlyConfig()
    else:
        config = PrototypeInt4WeightOnlyConfig(GROUP, int4_choose_qparams_algorithm=how)
    quantize_(layer, config)
    return layer


def check(weight: torch.Tensor, how: str) -> None:
    """Does the layer multiply by what is restored? In the first group of each row, but for bfloat16's rounding."""
    ones = torch.eye(weight.shape[1], dtype=weight.dtype)[:GROUP]
    columns = layer_of(weight, how)(ones).T.float()
    torch.testing.assert_close(columns, restore(weight, how)[:, :GROUP], rtol=2**-8, atol=1e-6)


if __name__ == "__main__":
    main()
