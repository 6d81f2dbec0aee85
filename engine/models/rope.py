"""Rotary position embeddings: each position's cosines and sines, plain or stretched to longer contexts.

Plain frequencies are theta^(-2i / head_dim) (Su et al., 2021). Every kind of scaling here makes a position's rotation a
function of that position alone, so that keys in cached blocks stay exact however long their sequence grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.models.config import ModelConfig, RopeScaling


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos, sin: [max_context, head_dim / 2] float32."""

    cos: torch.Tensor
    sin: torch.Tensor


def rope_tables(config: ModelConfig, device: torch.device) -> tuple[RopeTable, RopeTable]:
    """The tables of layers without and with a window; the same one where the model makes no difference."""
    whole = _table(config.rope_theta, config.rope_scaling, config, device)
    local = whole if config.local_rope_theta is None else _table(config.local_rope_theta, None, config, device)
    return whole, local


def _table(theta: float, scaling: RopeScaling | None, config: ModelConfig, device: torch.device) -> RopeTable:
    positions = torch.arange(config.max_context).float()[:, None]
    angles = positions * frequencies(theta, scaling, config.head_dim, config.max_context)
    factor = 1.0 if scaling is None else scaling.attention_factor
    return RopeTable((angles.cos() * factor).to(device), (angles.sin() * factor).to(device))


def frequencies(theta: float, scaling: RopeScaling | None, head_dim: int, max_context: int) -> torch.Tensor:
    """Radians per token: [head_dim / 2] float32, or [max_context, head_dim / 2] where they differ by position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    if scaling is not None and scaling.kind == "dynamic":
        return 1.0 / dynamic_bases(theta, scaling, head_dim, max_context)[:, None] ** exponents
    plain = 1.0 / (theta**exponents)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, scaling, theta)


def dynamic_bases(theta: float, scaling: RopeScaling, head_dim: int, max_context: int) -> torch.Tensor:
    """Dynamic NTK's base for each position: [max_context] float32.

    The method stretches frequencies by the present length of the sequence, which would turn keys that are stored
    already. Position p here takes the frequencies of length max(original, p + 1) for good. That is what decoding token
    by token with a cache does, as in transformers; a prompt beyond the original length that is computed in one piece
    there takes its whole length for all its positions, and so differs."""
    lengths = torch.arange(1, max_context + 1, dtype=torch.float64).clamp(min=scaling.original_max_context)
    stretch = scaling.factor * lengths / scaling.original_max_context - (scaling.factor - 1)
    return (theta * stretch ** (head_dim / (head_dim - 2))).float()


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long waves by the factor, short ones not, a ramp between."""
    original = scaling.original_max_context
    wavelengths = 2 * math.pi / plain
    low_wave, high_wave = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    smooth = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = (1 - smooth) * plain / scaling.factor + smooth * plain
    scaled = torch.where(wavelengths > low_wave, plain / scaling.factor, plain)
    between = (wavelengths <= low_wave) & (wavelengths >= high_wave)
    return torch.where(between, ramp, scaled)


def _yarn(plain: torch.Tensor, scaling: RopeScaling, theta: float) -> torch.Tensor:
    """NTK by parts (Peng et al., 2023, section 3.2): a wave that turns more than beta_fast times within the original
    context stays, one that turns less than beta_slow times is stretched, with a ramp over the dimensions between."""
    half = len(plain)
    low, high = (_turning_dim(turns, scaling, 2 * half, theta) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = ((torch.arange(half).float() - low) / (high - low or 0.001)).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _turning_dim(turns: float, scaling: RopeScaling, head_dim: int, theta: float) -> float:
    """The (fractional) pair of dimensions that turns so many times within the original context."""
    return head_dim * math.log(scaling.original_max_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
