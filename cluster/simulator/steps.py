"""The model of modelled steps: which tokens a step gives.

The tokens come out of KV, as a real model's do: the state of a position is a digest of its token, of the state before
and of one earlier state that the one before chooses, all read from the pool's blocks. By induction it is a pure
function of the tokens so far; but a block that was lost, mixed up or never moved gives other tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass, replace

from cluster.simulator.pool import NUM_LAYERS, STATE_BYTES, StatePool
from engine.layer_groups import LayersStored
from engine.scheduler import Batch, Scheduled
from engine.types import Request, Sampled, SamplingParams


@dataclass(frozen=True, slots=True)
class ModelledWeights:
    """The model that all workers serve, as pure functions. `eos_every`: about one token in so many ends the sequence
    (0: none does)."""

    seed: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    eos_every: int = 0

    def next_state(self, position: int, token_id: int, state_of: Callable[[int], bytes]) -> bytes:
        """The state of a position, from those before it."""
        before = state_of(position - 1) if position else bytes(STATE_BYTES)
        earlier = state_of(int.from_bytes(before[:8], "little") % position) if position else b""
        data = before + earlier + token_id.to_bytes(4, "little")
        return hashlib.blake2b(data, digest_size=STATE_BYTES, salt=(self.seed % 2**64).to_bytes(8, "little")).digest()

    def next_token(self, state: bytes, sampling: SamplingParams) -> int:
        """The token after the position of this state."""
        salt = sampling.seed.to_bytes(8, "little") + sampling.choice.to_bytes(8, "little")
        drawn = hashlib.blake2b(state, digest_size=16, salt=salt).digest()
        token_id = int.from_bytes(drawn[:8], "little") % self.vocab_size
        if self.eos_every and int.from_bytes(drawn[8:], "little") % self.eos_every == 0:
            return min(self.eos_token_ids)
        while token_id in self.eos_token_ids:
            token_id = (token_id + 1) % self.vocab_size
        return token_id

    def continuation(self, request: Request) -> tuple[int, ...]:
        """The tokens of a request that nothing but its length or an end-of-sequence token ends, without any engine."""
        tokens, states = list(request.prompt_ids), list[bytes]()
        num_prompt, sampling = len(tokens), request.sampling
        while len(tokens) - num_prompt < sampling.max_tokens:
            for position in range(len(states), len(tokens)):
                states.append(self.next_state(position, tokens[position], states.__getitem__))
            tokens.append(self.next_token(states[-1], sampling))
            if tokens[-1] in self.eos_token_ids and not sampling.ignore_eos:
                break
        return tuple(tokens[num_prompt:])


class ModelledRunner:
    """Implements engine.engine.ModelRunner over a pool of states."""

    def __init__(self, weights: ModelledWeights, pool: StatePool) -> None:
        self._weights = weights
        self._pool = pool

    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
        """A state is stored in all layers at once."""
        for source, target in batch.copies:
            self._pool.copy(source, target)
        sampled = [self._compute(item) for item in batch.scheduled]
        if stored is not None:
            for num_layers in range(1, NUM_LAYERS + 1):
                stored(num_layers)
        return sampled

    def _compute(self, item: Scheduled) -> Sampled:
        tokens: TokenIds[int] = item.sequence.tokens
        blocks = item.sequence.tables[0]
        state = b""
        for position in range(item.start, item.start + item.num_new):
            state = self._weights.next_state(position, tokens[position], lambda at: self._pool.state(blocks, at))
            self._pool.store(blocks, position, state)
        if not item.samples:
            return Sampled()
        first, *siblings = (Sampled((self._weights.next_token(state, one.sampling),)) for one in item.sequence.answers)
        return replace(first, siblings=tuple(siblings))
