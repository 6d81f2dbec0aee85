"""Scenarios: small clusters with few blocks, and a handful of requests. Data, drawn from a seed.

Pools are so tight that sequences are preempted and hand-offs refused; prompts share beginnings; some have several
answers; some clients leave, and some have little time. All of it that can be served is, where nothing goes wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from cluster.config import ClusterConfig
from cluster.simulator.chance import Chance
from cluster.simulator.network import LinkTimes
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.spec import WorldSpec
from engine.types import Key, Request, SamplingParams

AMPLE_S = 60.0  # far more than any of these requests takes
VOCABULARY = 1000
ORPHAN_S = 4.0  # short, so that a run is soon over
MAX_LIVE = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """One client. The prompt is `num_shared` tokens that all of its `family` begin with, then `num_own`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    at_s: float
    family: int
    num_shared: int
    num_own: int
    max_tokens: int
    num_answers: int = 1
    timeout_s: float = AMPLE_S
    leaves_after: int | None = None  # tokens, of all answers together
    moves_after: int | None = None  # tokens of the first answer: then it goes to another decode worker, if there is one

    @property
    def num_prompt(self) -> int:
        return self.num_shared + self.num_own

    @property
    def is_patient(self) -> bool:
        """Does it want all of its answer, and has time enough?"""
        return self.leaves_after is None and self.timeout_s >= AMPLE_S

    @property
    def answer_names(self) -> tuple[str, ...]:
        return (self.name, *(f"{self.name}.{choice}" for choice in range(1, self.num_answers)))


@dataclass(frozen=True, slots=True)
class Scenario:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    seed: int
    num_prefill: int
    num_decode: int
    block_size: int
    num_blocks: int
    max_batch_tokens: int
    prefill_chunk: int
    max_batch_seqs: int
    max_pulls: int
    prefix_cache: bool
    eos_every: int
    lease_ttl_s: float
    step_s: float
    bytes_per_s: float
    requests: tuple[Asked, ...]

    @property
    def heartbeat_s(self) -> float:
        return self.lease_ttl_s / 5

    @property
    def worker_ids(self) -> tuple[str, ...]:
        prefill = [f"prefill-{index}" for index in range(self.num_prefill)]
        return (*prefill, *(f"decode-{index}" for index in range(self.num_decode)))

    def world_spec(self) -> WorldSpec:
        config = ClusterConfig.model_validate(
            {
                "pools": {"prefill": {"workers": self.num_prefill}, "decode": {"workers": self.num_decode}},
                "engine": {
                    "block_size": self.block_size, "num_blocks": self.num_blocks, "max_batch_seqs": self.max_batch_seqs,
                    "max_batch_tokens": self.max_batch_tokens, "prefill_chunk": self.prefill_chunk,
                    "prefix_cache": self.prefix_cache,
                },
                "kv_transfer": {
                    "lease_ttl_s": self.lease_ttl_s, "heartbeat_s": self.heartbeat_s, "frame_bytes": 2**18,
                    "pull_timeout_s": 3.0,
                },
                "decode": {"max_pulls": self.max_pulls, "orphan_s": ORPHAN_S},
                "router": {"max_live_requests": MAX_LIVE},
            }
        )  # fmt: skip
        steps = Roofline(weights_s=self.step_s, prefill_token_s=self.step_s / 50, decode_sequence_s=self.step_s / 50)
        links = LinkTimes(bytes_per_s=self.bytes_per_s)
        return WorldSpec(self.seed, config, steps, links, VOCABULARY, eos_every=self.eos_every, max_context=512)

    def requests_of(self, asked: Asked) -> tuple[Request, ...]:
        """The first answer's, then those of the others."""
        tokens = self._tokens(f"family {asked.family}", asked.num_shared) + self._tokens(asked.name, asked.num_own)
        sampling = SamplingParams(asked.max_tokens, seed=Chance(self.seed, asked.name).bits(63))
        first = Request(asked.name, tokens, sampling, timeout_s=asked.timeout_s)
        others = enumerate(asked.answer_names[1:], start=1)
        return (first, *(first.sibling(Key(name, 0), choice) for choice, name in others))

    def _tokens(self, name: str, count: int) -> tuple[int, ...]:
        chance = Chance(self.seed, name)
        return tuple(chance.between(3, VOCABULARY - 1) for _ in range(count))


def draw_scenario(seed: int) -> Scenario:
    chance = Chance(seed, "scenario")
    block_size = (2, 4, 8)[chance.below(3)]
    num_blocks = chance.between(80, 160) // block_size
    prefill_chunk = chance.between(8, 32)
    capacity = block_size * num_blocks
    return Scenario(
        seed=seed,
        num_prefill=chance.between(1, 2),
        num_decode=chance.between(1, 2),
        block_size=block_size,
        num_blocks=num_blocks,
        max_batch_tokens=prefill_chunk + chance.between(0, 16),
        prefill_chunk=prefill_chunk,
        max_batch_seqs=chance.between(2, 6),
        max_pulls=chance.between(1, 4),
        prefix_cache=chance.below(4) > 0,
        eos_every=(0, 30)[chance.below(2)],
        lease_ttl_s=(3.0, 10.0)[chance.below(2)],
        step_s=(0.005, 0.02)[chance.below(2)],
        bytes_per_s=(3e9, 5e7)[chance.below(2)],
        requests=_draw_requests(chance.fork("requests"), capacity),
    )


def _draw_requests(chance: Chance, capacity: int) -> tuple[Asked, ...]:
    at_s, asked = 0.0, []
    mean_s = (0.01, 0.1)[chance.below(2)]
    for index in range(chance.between(3, 12)):
        at_s += chance.exponential(mean_s)
        asked.append(_draw_request(chance, f"r{index}", round(at_s, 4), capacity))
    return tuple(asked)


def _draw_request(chance: Chance, name: str, at_s: float, capacity: int) -> Asked:
    num_shared, num_own = chance.below(2) * chance.between(1, 24), chance.between(1, 30)
    most = capacity - num_shared - num_own
    max_tokens = chance.between(40, 80) if chance.below(8) == 0 else chance.between(1, 20)
    return Asked(
        name=name,
        at_s=at_s,
        family=chance.below(2),
        num_shared=num_shared,
        num_own=num_own,
        max_tokens=max(1, min(max_tokens, most)),
        num_answers=1 if chance.below(4) else chance.between(2, 4),
        timeout_s=AMPLE_S if chance.below(6) else round(chance.exponential(0.3), 3),
        leaves_after=None if chance.below(5) else chance.below(20),
        moves_after=chance.fork(f"move {name}").below(20) if chance.fork(f"moves {name}").below(3) == 0 else None,
    )
