"""What a model's layers are computed with: the seam between a decoder and the kernels of one device.

1. A decoder asks its Backend for a Linear of each weight and for one Attention, when it is built.
2. `settle` comes once, when all weights are there.
3. In each step, Attention turns the step's calls into whatever it reads (`plan`), once for all layers of a group.
4. Every layer: `add_norm`, a Linear, `attend`, a Linear, `add_norm`, two Linears, or a Linear and a Mixture; or all
   layers at once, as a Stack.
Which backend there is for a device and a type is decided in kernels/dispatch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Groups
from collections.abc import Sequence as Layers
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from kernels.reference.ladder import Ladders
from kernels.reference.quantized import Bits

Gate = Literal["silu", "gelu_tanh"]
Agree = Callable[[Ladders], Ladders]  # of all ranks


@dataclass(frozen=True, slots=True)
class Draws:
    """How each of some rows is sampled; arrays are [rows].

    temperatures: float64, 0: the greatest; top_k: int64, 0: off; top_p: float64, 1: off; min_p: float64, 0: off
    keys: int64, whose bits are the noise's; positions: int64, of the new tokens
    """

    temperatures: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    keys: np.ndarray
    positions: np.ndarray


# logits [rows, vocab] float32, -inf where a token is banned -> tokens [rows] int64, as engine/sampler.py chooses them
Choose = Callable[[torch.Tensor, Draws], torch.Tensor]


class Linear(Protocol):
    """A linear layer: x @ weight.T + bias, and what its gate makes of that."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out]; gated: half as many, act(first half) * second half. x is contiguous, with as many
        rows as `Backend.pad` says."""
        ...


@dataclass(frozen=True, slots=True)
class Routing:
    """How many experts a layer has, and to how many of them a row goes. normalize: a row's weights add up to one."""

    num_experts: int
    per_row: int
    normalize: bool


class Mixture(Protocol):
    """Experts of a layer: gated feed-forward parts, of which a router picks a few for each row."""

    def __call__(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """x: [rows, hidden]; logits: [rows, num_experts], the router's -> [rows, hidden].

        Softmax over all experts, then the greatest ones; of equal ones the lower id. What a row's experts give is
        weighted and added up in float32, in rising order of expert id."""
        ...


@dataclass(frozen=True, slots=True)
class Heads:
    """An attention layer's shape."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of scores

    @property
    def width(self) -> int:
        """Of q, k and v side by side."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class Call:
    """Sequences with equally many new tokens, side by side in a step's rows.

    rows: of the step's tokens, [num_seqs * num_new], sequence by sequence
    starts: position of each sequence's first new token
    blocks: [num_seqs, num_blocks] int64, whole tiles from `first_key` of that position on; what is beyond a sequence's
        last block may be any valid id
    """

    rows: slice
    starts: tuple[int, ...]
    num_new: int
    blocks: np.ndarray


@dataclass(frozen=True, slots=True)
class GroupCalls:
    """A step's calls in the layers of one group, which see `window` positions, a token's own included (None: all)."""

    calls: tuple[Call, ...]
    window: int | None


@dataclass(frozen=True, slots=True)
class Norms:
    """Root-mean-square norms of a model. wide: the product with the weight is made in float32, too."""

    eps: float
    wide: bool


@dataclass(frozen=True, slots=True)
class Turns:
    """What `Attention.turns` may make of its arguments, for kernels that look tables up: [max_context, head_dim / 2],
    and the position [rows] of each row."""

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """Where the layers of one group store and read in a step.

    block_ids, offsets: [num_tokens], of each new token
    turns, plan: what Attention made of the step's positions and of its calls
    """

    block_ids: torch.Tensor
    offsets: torch.Tensor
    turns: object
    plan: object


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A decoder layer with one gated feed-forward part. Norms that a family has not are None."""

    attention_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    out: Linear
    attention_out_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    mlp_out_norm: torch.Tensor | None


class Stack(Protocol):
    """All layers of a model at once."""

    def takes(self, num_rows: int) -> bool:
        """Is that the faster way for so many?"""
        ...

    def __call__(
        self, hidden: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: Groups[tuple[int, int]],
        groups: Groups[GroupPlace], stored: Callable[[int], None] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """hidden: [rows, width], overwritten; k, v: [slots, num_blocks, num_kv_heads, block_size, head_dim]; places:
        each layer's group and slot. Returns hidden, and what is yet to be added to it."""
        ...


class Attention(Protocol):
    """From q, k and v to what the heads read. One for all layers of a model."""

    def plan(self, groups: Groups[GroupCalls], block_size: int) -> list[object]:
        """What `attend` reads of a step, for the layers of each group."""
        ...

    def turns(self, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> object:
        """cos, sin: [max_context, head_dim / 2] float32; positions: [rows]."""
        ...

    def attend(
        self, qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, k_cache: torch.Tensor,
        v_cache: torch.Tensor, place: GroupPlace,
    ) -> torch.Tensor:  # fmt: skip
        """Norm and turn q and k, store k and v, attend. qkv: [rows, Heads.width], overwritten; rows beyond the step's
        tokens are padding; caches: [num_blocks, num_kv_heads, block_size, head_dim]
        -> [rows, num_heads * head_dim]."""
        ...


class Backend(Protocol):
    """Computes layers on one device for one type."""

    @property
    def choose(self) -> Choose | None:
        """Chooses next tokens where the logits are; None where that is left to engine/sampler.py."""
        ...

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, gate: Gate | None = None, bits: Bits = 16
    ) -> Linear:  # fmt: skip
        """weight: [out, in], kept with so many bits (kernels/reference/quantized.py); bias: [out]. May copy them: drop
        the originals."""
        ...

    def mixture(
        self, gate_ups: Iterable[torch.Tensor], downs: Iterable[torch.Tensor], gate: Gate, routing: Routing, bits: Bits
    ) -> Mixture | None:
        """Of weights expert by expert, [2 * inner, hidden] and [hidden, inner], which are copied as they come, so that
        they may be made then. None, and none was asked for: experts are computed one by one, as Linears."""
        ...

    def norm_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """A norm's weight, as this backend reads it: everything that is asked for a norm's weight wants it so. It may
        come in another type than the rest (engine/models/weights.py)."""
        ...

    def attention(self, heads: Heads, norms: Norms) -> Attention: ...

    def stack(self, layers: Layers[DenseLayer], heads: Heads, norms: Norms) -> Stack | None:
        """None: layers are computed part by part. Linears and attention are of this backend."""
        ...

    def settle(self, heads: Heads, block_size: int, agree: Agree) -> None:
        """From here on a row's bits depend on nothing but itself. Raises ArithmeticError where that cannot be had."""
        ...

    def pad(self, rows: int) -> int:
        """How many rows a Linear wants for so many."""
        ...

    def place(self, arrays: Groups[np.ndarray]) -> list[torch.Tensor]:
        """Copies of a step's numbers on this backend's device. May be under way when it returns."""
        ...

    def norm(self, x: torch.Tensor, weight: torch.Tensor, norms: Norms) -> torch.Tensor: ...

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, norms: Norms
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden + added, and its norm. May overwrite `hidden`."""
        ...
