"""A linear layer's weight, in whatever form its product is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F


class Matrix(Protocol):
    """A weight [out, in]."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def like(self) -> torch.Tensor:
        """Of the weight's type, on its device."""
        ...

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x @ weight.T + bias. x: [rows, in] -> [rows, out]."""
        ...

    def filled_with(self, weight: torch.Tensor) -> Matrix:
        """Another weight of this shape in the same form, of the same type and on the same device."""
        ...


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """As it is: any type, any device."""

    weight: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def like(self) -> torch.Tensor:
        return self.weight

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.weight, bias)

    def filled_with(self, weight: torch.Tensor) -> PlainMatrix:
        return PlainMatrix(weight.to(self.weight))
