"""Linear layers over packed panels (linear.h).

On a processor with AMX, oneDNN multiplies many rows of bfloat16 several times as fast as AVX-512 can. There a second
copy of the weight is kept for that, unless a row's bits must not depend on how many there are.
"""

from __future__ import annotations

import ctypes

import torch

from kernels.backend import Gate
from kernels.cpu.native.library import WeightStruct
from kernels.cpu.native.space import Space
from kernels.cpu.packed import PackedMatrix
from kernels.reference.layers import GATES
from kernels.reference.quantized import GROUP, Bits, Quantized, quantize

_PLAIN_FORMS = {torch.float32: 0, torch.bfloat16: 1}  # linear.h, Form
_BYTES, _NIBBLES = 2, 3
_FINISHES: dict[Gate | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}
_PANEL = 32  # columns, products.h

TILED_ROWS = 32  # so many rows and more go to oneDNN, where it has AMX


class NativeLinear:
    """Holds no plain copy of its weight."""

    def __init__(
        self, library: ctypes.CDLL, space: Space, weight: torch.Tensor, bias: torch.Tensor | None, gate: Gate | None,
        bits: Bits, is_tiled: bool,
    ) -> None:  # fmt: skip
        """weight: [out, in], `in` even. Whole numbers are for bfloat16. is_tiled: many rows go to oneDNN."""
        rows, num_k = weight.shape
        assert num_k % 2 == 0, "rows of weights are read two elements at a time"
        quantized = quantize(weight, bits)
        self._multiply = library.multiply
        self._is_float = weight.dtype is torch.float32
        self._gate = gate
        self._num_columns = rows // 2 if gate else rows
        self.struct = WeightStruct(
            form=_form(weight, quantized), num_k=num_k, num_columns=self._num_columns, group=GROUP,
            finish=_FINISHES[gate],
        )  # fmt: skip
        self._reference = ctypes.byref(self.struct)
        self._bias = _panelled(bias.float()[:, None], gate).contiguous() if bias is not None else None
        self._scales = None if quantized is None else _scales(quantized, gate)
        self.struct.bias = self._bias.data_ptr() if self._bias is not None else None
        self.struct.scales = self._scales.data_ptr() if self._scales is not None else None
        self._panels = space.take(library.panel_bytes_of(self._reference))
        self.struct.panels = self._panels.data_ptr()
        source = weight.contiguous() if quantized is None else quantized.numbers
        library.pack_panels(self._reference, source.data_ptr(), self.struct.panels)
        self.tiled = PackedMatrix.of(weight) if is_tiled and quantized is None else None
        self._plain_bias = bias if self.tiled is not None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        if self.tiled is not None and num_rows >= TILED_ROWS:
            out = self.tiled.multiply(x, self._plain_bias)
            return out if self._gate is None else GATES[self._gate](out)
        out = x.new_empty(num_rows, self._num_columns)
        self._multiply(self._reference, x.data_ptr(), num_rows, out.data_ptr(), self._is_float)
        return out


def _form(weight: torch.Tensor, quantized: Quantized | None) -> int:
    if quantized is None:
        return _PLAIN_FORMS[weight.dtype]
    assert weight.dtype == torch.bfloat16, "whole numbers are multiplied by bfloat16"
    return _BYTES if quantized.shifts is None else _NIBBLES


def _scales(quantized: Quantized, gate: Gate | None) -> torch.Tensor:
    """As linear.h, Weight has them."""
    scales = _panelled(quantized.scales, gate)  # [panels, columns, groups]
    if quantized.shifts is None:
        return scales.contiguous()
    both = torch.stack((scales, _panelled(quantized.shifts, gate)), dim=1)  # [panels, 2, columns, groups]
    return both.permute(0, 3, 1, 2).contiguous().half()


def _panelled(values: torch.Tensor, gate: Gate | None) -> torch.Tensor:
    """[out, n] -> [panels, columns, n] in the order of panels' columns: gated, 16 of the gate and the 16 that it
    gates."""
    halves = values.chunk(2) if gate else (values,)
    width = _PANEL // len(halves)
    whole = -(-len(halves[0]) // width) * width
    padded = [torch.nn.functional.pad(half, (0, 0, 0, whole - len(half))) for half in halves]
    return torch.cat([half.view(-1, width, half.shape[1]) for half in padded], dim=1)
