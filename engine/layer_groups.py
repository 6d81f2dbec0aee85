"""Layer groups: after which layers of a step it is told that they are stored, so that blocks which others pull leave
while later layers are computed.

1. a step that fills blocks of hand-offs has LayerNews, made before it is computed;
2. the model runner counts the layers whose KV is in the pool, on every rank, for good: nothing of a step is computed
   twice, and a hand-off is never preempted;
3. at its marks the news goes out. The last mark comes before the head and sampling; then the step's own outputs follow.
Pure: bytes and layers in, marks out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.planes import CacheLayout
from engine.types import EngineStats, Progress, StepOutputs

LayersStored = Callable[[int], None]  # told with each layer of a step how many are stored by now


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """How finely a step tells of its layers. `layer_bytes`: of one block in one layer; `group_bytes`: told whenever
    about so many more are stored. 0: only whole steps are told."""

    num_layers: int = 0
    layer_bytes: int = 0
    group_bytes: int = 0

    @classmethod
    def of(cls, layout: CacheLayout, group_bytes: int) -> LayerGroups:
        """Where layers have block tables of their own by their window, neighbouring layers fill different blocks, which
        would make very small frames: whole steps are told there."""
        if len(layout.groups) > 1:
            return WHOLE_STEPS
        return cls(layout.num_slots, layout.bytes_per_block // layout.num_slots, group_bytes)

    def marks(self, num_blocks: int) -> range:
        """Of a step that fills so many blocks: how many layers are stored each time that it is told, all at last."""
        if not self.group_bytes or not num_blocks:
            return range(0)
        size = min(self.num_layers, -(-self.group_bytes // (num_blocks * self.layer_bytes)))
        return range(self.num_layers - (self.num_layers - 1) // size * size, self.num_layers + 1, size)


WHOLE_STEPS = LayerGroups()


@dataclass(frozen=True, slots=True)
class LayerNews:
    """What is told while a step is computed: of each hand-off the blocks that will be complete, and at which numbers of
    layers. `stats` are as they were before the step."""

    progress: tuple[Progress, ...]
    stats: EngineStats
    marks: range

    def at(self, num_layers: int) -> StepOutputs:
        progress = tuple([replace(one, num_layers=num_layers) for one in self.progress])
        return StepOutputs(progress=progress, stats=self.stats)
