"""Draws: samples of the usual distributions from a stream of chance. Pure Python, so that a seed gives the same numbers
whatever is installed."""

from __future__ import annotations

import math

from cluster.simulator.chance import Chance


def normal(chance: Chance) -> float:
    """Mean 0, deviation 1 (Box and Muller 1958)."""
    radius = math.sqrt(chance.exponential(2.0))
    return radius * math.cos(2 * math.pi * chance.unit())


def lognormal(chance: Chance, mean: float, sigma: float) -> float:
    """`mean` of the values themselves, `sigma` of their logarithm."""
    return mean * math.exp(sigma * normal(chance) - sigma * sigma / 2)


def gamma(chance: Chance, shape: float) -> float:
    """Mean 1, coefficient of variation 1 / sqrt(shape) (Marsaglia and Tsang 2000)."""
    if shape < 1:
        boost = (1.0 - chance.unit()) ** (1 / shape)
        return _gamma(chance, shape + 1) * boost / shape
    return _gamma(chance, shape) / shape


def _gamma(chance: Chance, shape: float) -> float:
    """Mean `shape`, which is at least 1."""
    d = shape - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        x = normal(chance)
        v = (1 + c * x) ** 3
        if v > 0 and math.log(1.0 - chance.unit()) < x * x / 2 + d - d * v + d * math.log(v):
            return d * v


def weibull(chance: Chance, shape: float) -> float:
    """Mean 1; a shape below 1 comes in bursts, 1 is exponential, above is more regular."""
    return chance.exponential(1.0) ** (1 / shape) / math.gamma(1 + 1 / shape)
