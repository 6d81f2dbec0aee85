"""Memory: how many KV tokens a worker has room for beside the weights, by its tensor-parallel size."""

from __future__ import annotations

from dataclasses import dataclass

USABLE = 0.9  # of a GPU's memory; the rest is for activations and what the runtime takes


@dataclass(frozen=True, slots=True)
class Memory:
    """`kv_token_bytes`: KV of one token, over all layers and ranks."""

    gpu_bytes: float
    weights_bytes: float
    kv_token_bytes: int

    def kv_tokens(self, tensor_parallel: int) -> int:
        """0 where not even the weights fit."""
        left = USABLE * self.gpu_bytes * tensor_parallel - self.weights_bytes
        return max(0, int(left / self.kv_token_bytes))
