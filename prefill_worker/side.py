"""The prefill side: takes submissions, runs them to their first token, and hands them to decode.

A submission's way:
1. `submit` queues it, or refuses what the queue would make late;
2. the queue gives it to the engine when its turn has come, while decode keeps up with the outbox;
3. at its first chunk a lease is granted and offered to the decode worker, which reserves and starts to pull;
4. each chunk's blocks become readable, group of layers by group; the first token goes to the gateway at once;
5. with the first token the outbox gets the HandOff; the owner's release frees the blocks.
Without a decode worker to hand to, the request runs here to its end. Several answers to one prompt are one submission,
named by its first; it ends when the last of them has.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from engine.errors import DeadlineExceeded, LeaseLost, Overloaded, SteelyardError, TransferFailed
from engine.streams import TokenStreams
from engine.types import (
    Abort,
    Add,
    Command,
    Endpoint,
    EngineStats,
    ErrorInfo,
    Key,
    Progress,
    Release,
    StepOutputs,
    Submission,
    TokenOutput,
)
from kv_transfer.handoff import HandOff
from kv_transfer.lease import Offer
from prefill_worker.fetching import Fetches, Prefixes
from prefill_worker.forecast import Forecast
from prefill_worker.live import Live
from prefill_worker.outbox import Outbox
from prefill_worker.queue import Given, PrefillQueue, Waiting

OFFER_TIMEOUT_S = 5.0


class DecodePeers(Protocol):
    """Reaches decode workers."""

    async def offer(self, target: Endpoint, offer: Offer, timeout_s: float) -> None:
        """Returns when `target` has reserved; raises Overloaded or another SteelyardError when it refuses."""
        ...


class PrefillSide:
    def __init__(
        self, me: Endpoint, queue: PrefillQueue, outbox: Outbox, streams: TokenStreams, peers: DecodePeers,
        send: Callable[[Command], None], prefixes: Prefixes | None, token_bytes: float, forecast: Forecast,
    ) -> None:  # fmt: skip
        self._me = me
        self._forecast = forecast
        self._fetches = Fetches(prefixes, token_bytes, forecast.pace)
        self._queue = queue
        self._outbox = outbox
        self._streams = streams
        self._peers = peers
        self._send = send
        self._live: dict[Key, Live] = {}
        self._stats = EngineStats()
        self._busy_since = 0.0  # when the prompt that is computed now began, about

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def num_queued_tokens(self) -> int:
        return self._queue.totals.num_tokens

    @property
    def queued_s(self) -> float:
        """Until the prompts that are here are computed, as predicted."""
        return self._given_s() + self._queue.totals.compute_s

    def submit(self, submission: Submission) -> None:
        """Raises Overloaded when too many wait, or those before it would make its first token late. One that is here
        already has only come twice."""
        now, request = self._now(), submission.request
        if any(self._streams.owner(one.key) is not None for one in submission.requests):
            return
        waiting = self._queue.waiting(submission, now, self._forecast.compute_s(request.num_tokens, self._stats))
        if not request.generated_ids:
            before_s = self._given_s() + self._queue.before_s(waiting, now)
            self._forecast.check(request.service.ttft_s, before_s, waiting.compute_s)
        self._queue.push(waiting)
        for request in submission.requests:
            self._streams.register(request.key, submission.gateway_id, request.service.tenant)
        self._fetches.start(submission)
        self._feed()

    def abort(self, key: Key) -> bool:
        """End an answer wherever it is on this side. Was it here? Else it is the decode side's, or the engine's alone.
        Aborting twice is no error."""
        self._streams.forget(key)
        if self._queue.remove(key):
            self._fetches.stop(key)
            return True
        live = self._find(key)
        if live is None:
            return key in self._live  # ended before; the blocks of the others are held under its name
        live.wanted.remove(key)
        if not live.wanted:
            self._end(live)
        elif key != live.submission.request.key or not live.hands_off:  # else the blocks are held under its name
            self._send(Abort(key))
        return True

    def on_outputs(self, outputs: StepOutputs) -> tuple[TokenOutput, ...]:
        """Take a turn's news of our submissions; returns the token outputs, with our stages on the first ones."""
        self._stats = outputs.stats
        self._forecast.learn((*outputs.calibration, *outputs.steps))
        for output in outputs.tokens:
            tenant = self._streams.tenant(output.key)
            if tenant is not None:
                self._queue.charge_output(tenant, len(output.token_ids))
        tokens = tuple(self._on_token(output) for output in outputs.tokens)
        for progress in outputs.progress:
            self._on_progress(progress)
        self._feed()
        return tokens

    def on_lease_end(self, key: Key) -> None:
        """The outbox let a lease go: its blocks are free to leave, whether computed or still being computed."""
        live = self._live.get(key)
        if live is not None and not live.committed:
            self._fail(live, ErrorInfo(LeaseLost.code, "the decode worker let the lease go before all was computed"))
            return
        for gone in self._live.pop(key).wanted if live is not None else [key]:
            self._streams.forget(gone)
        self._send(Release(key))

    # --- parts, in order of a request's way ----------------------------------------------------------------

    def _feed(self) -> None:
        step_tokens = self._forecast.step_tokens(self._stats)
        while waiting := self._queue.pop_ready(self._stats, self._given(), self._now(), step_tokens):
            if waiting.deadline <= self._now():
                self._drop(waiting)
            else:
                self._give(waiting)

    def _given(self) -> Given:
        """Of those without a first token. What waits for a prefix takes no turn from others."""
        before = [live for live in self._live.values() if not live.firsts]
        sizes = [live.submission.request.num_tokens for live in before if live.fetch is None or live.fetch.done()]
        chunk, now, left_s = self._queue.rules.prefill_chunk, self._now(), self._given_s()
        dues = [live.arrived + live.submission.request.service.ttft_s for live in before]
        slack_s = min((due - now - left_s for due in dues if due > now), default=math.inf)
        num_short = sum(size for size in sizes if size <= chunk)
        return Given(len(before), num_short, any(size > chunk for size in sizes), left_s, slack_s)

    def _given_s(self) -> float:
        """Until what the engine has of prompts is computed."""
        compute_s = sum(live.compute_s for live in self._live.values() if not live.firsts)
        return max(0.0, compute_s - (self._now() - self._busy_since)) if compute_s else 0.0

    def _drop(self, waiting: Waiting) -> None:
        """Nobody waits for it any more."""
        self._fetches.stop(waiting.submission.request.key)
        error = ErrorInfo(DeadlineExceeded.code, "the deadline passed in the prefill queue")
        self._streams.fail([request.key for request in waiting.submission.requests], error)

    def _give(self, waiting: Waiting) -> None:
        submission = waiting.submission
        request = submission.request
        wanted = [one.key for one in submission.requests]
        hands_off = submission.decode is not None and request.sampling.max_tokens > len(request.generated_ids) + 1
        if all(live.firsts for live in self._live.values()):
            self._busy_since = self._now()
        live = Live(submission, waiting.arrived, self._now(), wanted, hands_off, waiting.compute_s)
        self._live[request.key] = live
        live.fetch = self._fetches.take(request.key)
        if live.fetch is None:
            self._send(Add(request, hands_off, submission.siblings))
        else:
            live.fetch.add_done_callback(lambda _: self._add_after_fetch(live))

    def _add_after_fetch(self, live: Live) -> None:
        """Unless it has ended meanwhile."""
        first = live.submission.request
        if self._live.get(first.key) is live:
            named = first.key if live.hands_off else None  # its blocks are held under this name in any case
            going = [one for one in live.submission.requests if one.key in live.wanted or one.key == named]
            self._send(Add(going[0], live.hands_off, tuple(going[1:])))

    def _on_progress(self, progress: Progress) -> None:
        live = self._live.get(progress.key)
        if live is None:
            return
        if live.offer is None:
            live.started = self._now()
            self._start_offer(live, progress.names)
        if progress.done:
            self._commit(live, progress)
        else:
            self._outbox.progress(progress.key, progress.block_ids, progress.num_layers)

    def _start_offer(self, live: Live, names: tuple[bytes, ...]) -> None:
        request, target = live.submission.request, live.submission.decode
        assert target is not None
        lease = self._outbox.grant(request.key, self._me)
        growth = request.sampling.max_tokens - len(request.generated_ids)
        timeout_s = request.timeout_s - (self._now() - live.arrived)
        siblings = tuple(key for key in live.wanted if key != request.key)
        offer = Offer(
            lease, request.num_tokens, growth, live.submission.gateway_id, timeout_s, siblings, names,
            service=request.service,
        )  # fmt: skip
        live.offer = asyncio.get_running_loop().create_task(self._offer(target, offer))

    async def _offer(self, target: Endpoint, offer: Offer) -> None:
        """Refused for lack of room, or not to be had from here: the gateway is told which, and decides what then."""
        key = offer.lease.key
        try:
            # The lease outlives the offer, so that a refusal never finds it ended in silence.
            await self._peers.offer(target, offer, min(OFFER_TIMEOUT_S, self._outbox.ttl_s / 2))
        except SteelyardError as error:
            code = error.code if isinstance(error, Overloaded) else TransferFailed.code
            live = self._live.get(key)
            if live is not None:
                self._fail(live, ErrorInfo(code, f"decode worker {target.worker_id}: {error.message}"))

    def _fail(self, live: Live, error: ErrorInfo) -> None:
        self._streams.fail(live.wanted, error)
        self._end(live)

    def _end(self, live: Live) -> None:
        """Forget a submission; what the engine still has of it goes."""
        self._forget(live)
        if live.offer is not None:
            live.offer.cancel()
        if live.fetch is not None:
            live.fetch.cancel()
        if live.committed:
            self._send(Release(live.submission.request.key))
            return
        for request in live.submission.requests:
            self._send(Abort(request.key))

    def _on_token(self, output: TokenOutput) -> TokenOutput:
        live = self._find(output.key)
        if live is None or output.key in live.firsts:
            return output
        live.firsts[output.key] = output
        now = self._busy_since = self._now()
        started = live.started if live.started is not None else live.given
        output = replace(output, stages=(("prefill_queue", started - live.arrived), ("prefill", now - started)))
        if output.finish:
            live.wanted.remove(output.key)
        if not live.wanted or (live.offer is None and all(key in live.firsts for key in live.wanted)):
            self._forget(live)
        return output

    def _forget(self, live: Live) -> None:
        key = live.submission.request.key
        self._outbox.close(key)
        self._live.pop(key, None)

    def _commit(self, live: Live, progress: Progress) -> None:
        """The last chunk is stored and the first token known: complete the outbox's entry."""
        elapsed, submission = self._now() - live.arrived, live.submission
        first, *siblings = (
            replace(
                request,
                generated_ids=request.generated_ids + live.firsts[request.key].token_ids,
                timeout_s=request.timeout_s - elapsed,
            )
            for request in submission.requests
            if request.key in live.wanted
        )
        cached_tokens = live.firsts[first.key].cached_tokens
        handoff = HandOff(
            first, progress.computed, cached_tokens, submission.gateway_id, siblings=tuple(siblings),
            overlap_s=self._outbox.overlap_s(progress.key),
        )  # fmt: skip
        live.committed = True
        self._outbox.commit(progress.key, progress.block_ids, handoff.encode())

    def _find(self, key: Key) -> Live | None:
        """The submission of which this is an answer that is still wanted."""
        named = self._live.get(key)
        if named is not None and key in named.wanted:
            return named
        return next((live for live in self._live.values() if key in live.wanted), None)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
