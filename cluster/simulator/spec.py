"""The spec of a world: what is simulated, and how closely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.config import ClusterConfig
from cluster.simulator.host import Slowdown
from cluster.simulator.network import LinkTimes
from cluster.simulator.plain import plain_layout
from cluster.simulator.pool import state_layout
from cluster.simulator.service_times.model import ServiceTimes
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.steps import ModelledWeights
from engine.engine import EngineSpec
from engine.layer_groups import LayerGroups
from engine.planes import CacheLayout
from engine.scheduler import SchedulerLimits
from engine.types import Role
from router.block_names import Naming

HASH_KEY = b"simulated"  # of prefix hashes


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """What is modelled of the workers of one role, where the roles differ."""

    steps: ServiceTimes
    num_blocks: int


@dataclass(frozen=True, slots=True)
class WorldSpec:
    """What is simulated. Pools, engine, transfer and router are as `config` says; of its model only `max_context`
    counts. `kv_token_bytes`: KV of one token of the modelled model, which sets how long a transfer takes (the default
    is Llama 3.1 8B in bfloat16: 32 layers x 2 planes x 8 heads x 128 x 2 bytes). `roles`: for those that are not there,
    `steps` and the config's blocks hold.

    `plain`: tokens come from nowhere and KV has no bytes, which is faster and checks less. `bursts`: steps that can
    only go one way are advanced together, if the tokens are plain. `frame_bytes`: of modelled KV in a frame, if not as
    the config says; larger ones are fewer, and several pulls share a link less evenly. `tells_layers`: in states, each
    of their layers leaves when its part of the step has passed; else, and in plain tokens, all do at its end.
    `slowdown`: all workers share one host, and this is what they do to each other's steps; None: each has its own.
    `is_controlled`: the configured controller runs, flips workers, and has some come and leave, if it may; `start_s`:
    what one that comes takes to be there. `believed`: by which service times gateways
    predict, if not by the true ones. `gateway_s`, `token_s`: what a client waits for outside of all this, before its
    first token and for each one after."""

    seed: int
    config: ClusterConfig = field(default_factory=ClusterConfig)
    steps: ServiceTimes = field(default_factory=Roofline)
    links: LinkTimes = field(default_factory=LinkTimes)
    vocab_size: int = 32000
    eos_token_ids: frozenset[int] = frozenset((2,))
    eos_every: int = 0
    max_context: int = 8192
    kv_token_bytes: int = 2**17
    plain: bool = False
    bursts: bool = True
    frame_bytes: int | None = None
    tells_layers: bool = False
    roles: Mapping[Role, RoleSpec] = field(default_factory=dict)
    slowdown: Slowdown | None = None
    is_controlled: bool = False
    start_s: float = 30.0
    believed: ServiceTimes | None = None
    gateway_s: float = 0.0
    token_s: float = 0.0

    @property
    def weights(self) -> ModelledWeights:
        return ModelledWeights(self.seed, self.vocab_size, self.eos_token_ids, self.eos_every)

    @property
    def layout(self) -> CacheLayout:
        block_size = self.config.engine.block_size
        return plain_layout(block_size) if self.plain else state_layout(block_size)

    @property
    def naming(self) -> Naming:
        """Of the workers' blocks."""
        config = self.config.engine
        return Naming(config.block_size, HASH_KEY if config.prefix_cache else None)

    def role(self, role: Role) -> RoleSpec:
        return self.roles.get(role) or RoleSpec(self.steps, self.config.engine.num_blocks)

    def engine_spec(self, num_blocks: int | None = None) -> EngineSpec:
        config = self.config.engine
        limits = SchedulerLimits(
            config.block_size, config.max_batch_tokens, config.max_batch_seqs, config.prefill_chunk,
            config.prefix_cache, max_overtaken=config.max_overtaken,
        )  # fmt: skip
        max_context = self.config.model.max_context or self.max_context
        return EngineSpec(
            limits, num_blocks or config.num_blocks, max_context, self.vocab_size, self.eos_token_ids,
            hash_key=HASH_KEY, layer_groups=LayerGroups.of(self.layout, int(self.tells_layers)),
        )  # fmt: skip
