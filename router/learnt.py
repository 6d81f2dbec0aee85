"""What a gateway has learnt of its workers: how long things take there, and which prefixes they have cached.

1. `hear` takes each batch of a worker's stream, and `hear_transfer` what it says of a request's KV;
2. `lost` forgets the caches of a worker that cannot be heard, `left` all of a life that is over;
3. `num_cached` and `source` say where the beginning of a request is. Its blocks are named once.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.streams import StreamBatch
from engine.types import MEAN, TokenOutput
from router.block_names import BlockNames, Naming
from router.live import LiveRequest
from router.membership import Member
from router.policies.snapshot import Name
from router.predict import Predictor
from router.prefix_index import PrefixIndex


class Learnt:
    def __init__(self, naming: Naming) -> None:
        self.predictor = Predictor()
        self.prefixes = PrefixIndex()
        self._naming = naming
        self._found: tuple[object, ...] = ()  # last: of which names, how many, and in which version of the index
        self._counts: Mapping[Name, int] = {}

    def hear(self, member: Member, batch: StreamBatch) -> None:
        self.predictor.calibrate(member.pool, batch.calibration)
        self.predictor.learn(member, batch.steps)
        self.predictor.hear_paths(member.worker_id, batch.transfers)
        self.prefixes.apply((member.worker_id, member.incarnation), batch.cache)

    def hear_transfer(self, live: LiveRequest, output: TokenOutput) -> None:
        """With the first output after a hand-off. One that moved later came from elsewhere."""
        placement, has_moved = live.placement, output.key.epoch != live.first_epoch
        if output.transfer is None or has_moved:
            return
        if placement is not None and placement.decode is not None:
            source, target = placement.first.worker_id, placement.decode.worker_id
            self.predictor.learn_transfer(source, target, output.transfer)

    def lost(self, member: Member) -> None:
        self.prefixes.forget((member.worker_id, member.incarnation))

    def left(self, member: Member) -> None:
        self.lost(member)
        self.predictor.forget(member.worker_id, member.incarnation)

    def num_cached(self, live: LiveRequest) -> Mapping[Name, int]:
        """Tokens of its beginning that workers have cached; those that have none are not there."""
        if live.names is None:
            live.names = BlockNames(self._naming, live.request.namespace)
        token_ids = (*live.request.prompt_ids, *live.tokens) if live.tokens else live.request.prompt_ids
        names, size = live.names.of(token_ids), self._naming.block_size
        found = live.names, len(names), self.prefixes.version
        if found != self._found:  # asked several times in one decision
            self._counts = self.prefixes.num_cached(names, size)
            self._found = found
        return self._counts

    def source(self, live: LiveRequest, first: Name) -> Name | None:
        """Who has most of its beginning, if it is more than the worker has that is to compute it."""
        counts = self.num_cached(live) if live.request.sampling.embed != MEAN else {}
        most = max(counts.values(), default=0)
        if most <= counts.get(first, 0):
            return None
        return max(worker for worker, count in counts.items() if count == most)
