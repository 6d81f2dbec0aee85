"""Prometheus metrics of one gateway, in a registry of its own.

vLLM's names where the meaning is the same, so that existing dashboards work; `steelyard_*` for what is ours.
Requests are counted as they end. What workers report is read from the generator's health at each scrape, so
a worker that has gone leaves no stale gauge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from engine.types import CarrierTotals, FinishReason, KvTransfer
from router.api import ControlView, HealthView, WorkerView
from router.ledger import Ledger
from router.replies import Usage
from router.tally import Tally, TallyCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# fmt: off
TTFT_BUCKETS_S = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)
TOKEN_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
)
REQUEST_BUCKETS_S = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
)
# fmt: on
SHARE_BUCKETS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class Metrics:
    """Counts what leaves one gateway. Durations are the ledger's."""

    def __init__(self, model_name: str, health: Callable[[], HealthView], step_tokens: Tally | None = None) -> None:
        """`step_tokens`: of the workers' steps, by their tokens."""
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token sent", TTFT_BUCKETS_S)
        self._itl = self._histogram("vllm:inter_token_latency_seconds", "Time between outputs sent", TOKEN_BUCKETS_S)
        if step_tokens is not None:
            self._tally("vllm:iteration_tokens_total", "Tokens of a worker's step", step_tokens)
        self._queue_time = self._histogram(
            "vllm:request_queue_time_seconds", "Waiting for its prefill", REQUEST_BUCKETS_S
        )
        self._prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "First chunk to first token", REQUEST_BUCKETS_S
        )
        self._decode_time = self._histogram(
            "vllm:request_decode_time_seconds", "First to last token", REQUEST_BUCKETS_S
        )
        self._inference_time = self._histogram(
            "vllm:request_inference_time_seconds", "Prefill and decode together", REQUEST_BUCKETS_S
        )
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first", TOKEN_BUCKETS_S
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to end", REQUEST_BUCKETS_S)
        self._prompt_length = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request", LENGTH_BUCKETS
        )
        self._output_length = self._histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request", LENGTH_BUCKETS
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of all requests")
        self._output_tokens = self._counter("vllm:generation_tokens", "Generated tokens of all requests")
        self._cache_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in prefix caches")
        self._cache_hits = self._counter("vllm:prefix_cache_hits", "Of these, found")
        self._ends = Counter(
            "vllm:request_success", "Requests that ended", ["model_name", "finished_reason"], registry=self.registry
        )
        self._handoff_gap = self._histogram("steelyard_handoff_gap_seconds", "First to second token", TOKEN_BUCKETS_S)
        self._transfer = self._by_carrier("steelyard_kv_transfer_request_seconds", "First KV frame to COMMIT")
        self._exposed = self._by_carrier(
            "steelyard_kv_transfer_exposed_seconds", "Of these, after the first token was sampled"
        )
        self._hidden = self._by_carrier(
            "steelyard_kv_transfer_hidden_ratio", "Share of the KV bytes that had arrived by then", SHARE_BUCKETS
        )
        self._stages = Histogram(
            "steelyard_stage_seconds",
            "Time of a request in a stage",
            ["stage"],
            buckets=TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._refused = Counter(
            "steelyard_requests_rejected", "Requests answered with an error", ["code"], registry=self.registry
        )
        self._let_go = self._counter(
            "steelyard_clients_let_go", "Clients that took nothing of their answer for too long"
        )
        self.registry.register(_HealthCollector(model_name, health))

    def count_sent(self, since_s: float, *, is_first: bool) -> None:
        """Tokens left, `since_s` after those before or after the arrival."""
        (self._ttft if is_first else self._itl).observe(since_s)

    @property
    def count_next(self) -> Callable[[float], None]:
        """The same of tokens that are not the first."""
        return self._itl.observe

    def count_end(self, ledger: Ledger, usage: Usage, end: FinishReason) -> None:
        """A request is over. One that never gave a token and failed was refused, and is counted as such only."""
        if end is FinishReason.ERROR and ledger.num_tokens == 0:
            return
        self._ends.labels(self._model_name, end.value).inc()
        self._e2e.observe(ledger.e2e_s)
        self._prompt_length.observe(usage.prompt_tokens)
        self._output_length.observe(usage.completion_tokens)
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._output_tokens.inc(usage.completion_tokens)
        self._cache_queries.inc(usage.prompt_tokens)
        self._cache_hits.inc(usage.prompt_tokens_details.cached_tokens)
        for stage, duration_s in ledger.stages:
            self._stages.labels(stage).observe(duration_s)
        self._count_phases(ledger)
        if ledger.tpot_s is not None:
            self._tpot.observe(ledger.tpot_s)
        if ledger.handoff_gap_s is not None:
            self._handoff_gap.observe(ledger.handoff_gap_s)
        if ledger.transfer is not None:
            self._count_transfer(ledger.transfer)

    def count_refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def count_let_go(self) -> None:
        """A client took nothing for `write_timeout_s`, and its connection was dropped."""
        self._let_go.inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def _count_phases(self, ledger: Ledger) -> None:
        if ledger.decode_s is None:
            return
        prefill_s = ledger.stage_s("prefill")
        self._queue_time.observe(ledger.stage_s("prefill_queue"))
        self._prefill_time.observe(prefill_s)
        self._decode_time.observe(ledger.decode_s)
        self._inference_time.observe(prefill_s + ledger.decode_s)

    def _count_transfer(self, transfer: KvTransfer) -> None:
        labels = (self._model_name, transfer.carrier)
        self._transfer.labels(*labels).observe(transfer.transfer_s)
        self._exposed.labels(*labels).observe(transfer.exposed_s)
        if transfer.size_bytes:
            self._hidden.labels(*labels).observe(transfer.hidden_share)

    def _by_carrier(self, name: str, words: str, buckets: tuple[float, ...] = TOKEN_BUCKETS_S) -> Histogram:
        return Histogram(name, words, ["model_name", "carrier"], buckets=buckets, registry=self.registry)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Tally:
        tally = Tally(buckets)
        self._tally(name, words, tally)
        return tally

    def _tally(self, name: str, words: str, tally: Tally) -> None:
        self.registry.register(TallyCollector(name, words, self._model_name, tally))

    def _counter(self, name: str, words: str) -> Counter:
        return Counter(name, words, ["model_name"], registry=self.registry).labels(self._model_name)


# Totals of a worker's present life; a hit rate is hits / queries.
_CACHES: tuple[tuple[str, str, Callable[[WorkerView], float]], ...] = (
    ("steelyard_prefix_queries", "Prompt tokens looked up in the prefix cache", lambda one: one.prefix_queries),
    ("steelyard_prefix_hits", "Prompt tokens found in the prefix cache or the host tier", lambda one: one.prefix_hits),
    ("steelyard_host_tier_blocks", "KV blocks in the host tier", lambda one: one.host_blocks),
    ("steelyard_host_tier_queries", "KV blocks looked up in the host tier", lambda one: one.host_queries),
    ("steelyard_host_tier_hits", "KV blocks found there and loaded", lambda one: one.host_hits),
)


_TRANSFERS: tuple[tuple[str, str, Callable[[CarrierTotals], float]], ...] = (
    ("steelyard_kv_transfers", "Transfers of KV that a carrier has completed", lambda one: one.num_pulls),
    ("steelyard_kv_transfer_bytes", "KV bytes that it has brought", lambda one: one.size_bytes),
    ("steelyard_kv_transfer_bytes_saved", "KV bytes that were there already, in these", lambda one: one.saved_bytes),
    (
        "steelyard_kv_transfer_bytes_hidden",
        "Of these, came while prompts were computed",
        lambda one: one.hidden_bytes,
    ),
    ("steelyard_kv_transfer_seconds", "From reservation to the last byte, summed", lambda one: one.duration_s),
    ("steelyard_kv_carrier_fallbacks", "How often another one had to go on for it", lambda one: one.num_fallbacks),
)


class _HealthCollector(Collector):
    """The workers' gauges, from one health view per scrape."""

    def __init__(self, model_name: str, health: Callable[[], HealthView]) -> None:
        self._model_name = model_name
        self._health = health

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # the registry need not collect to know the names

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        view = self._health()
        yield self._per_worker("vllm:num_requests_running", "Requests in the batch", view, lambda one: one.num_running)
        yield self._per_worker("vllm:num_requests_waiting", "Requests that wait", view, lambda one: one.num_waiting)
        yield self._per_worker("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 1 is all", view, _kv_usage)
        yield self._per_worker(
            "steelyard_kv_leaked_blocks",
            "KV blocks that nobody holds; must be 0",
            view,
            lambda one: one.num_leaked_blocks,
        )
        yield self._per_worker(
            "steelyard_worker_connected", "1 if the gateway reaches the worker", view, lambda one: one.connected
        )
        for name, words, value in _CACHES:
            yield self._per_worker(name, words, view, value)
        yield from _transfers(self._model_name, view)
        yield _workers_per_role(view)
        yield GaugeMetricFamily("steelyard_healthy", "1 if a canary went through in time", view.healthy)
        yield GaugeMetricFamily(
            "steelyard_membership_version", "Version of the list of workers", view.membership_version
        )
        yield GaugeMetricFamily("steelyard_live_requests", "Requests that this gateway owns", view.num_live_requests)
        yield _gateway_info(view)
        words = "Placements that were given up for another one, by the error that ended them"
        yield _counts("steelyard_request_retries", words, "reason", view.retries)
        words = "Running requests that were to move to another worker, by what came of it"
        yield _counts("steelyard_migrations", words, "outcome", view.migrations)
        yield from _prediction_errors(view)
        yield _admissions(view)
        yield GaugeMetricFamily("steelyard_waiting_requests", "Requests that wait here for room", view.num_waiting)
        if view.control is not None:
            yield from _control(view.control)
        if view.canary_age_s is not None:
            yield GaugeMetricFamily(
                "steelyard_canary_age_seconds", "Since a canary last went through", view.canary_age_s
            )

    def _per_worker(
        self, name: str, words: str, view: HealthView, value: Callable[[WorkerView], float]
    ) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, words, labels=["model_name", "engine", "role"])
        for worker in view.workers:
            gauge.add_metric([self._model_name, worker.worker_id, worker.role], value(worker))
        return gauge


def _transfers(model_name: str, view: HealthView) -> Iterator[GaugeMetricFamily]:
    """Of each worker to which KV comes, by what carries it."""
    for name, words, value in _TRANSFERS:
        gauge = GaugeMetricFamily(name, words, labels=["model_name", "engine", "carrier"])
        for worker in view.workers:
            for totals in worker.transfers.totals:
                gauge.add_metric([model_name, worker.worker_id, totals.carrier], value(totals))
        yield gauge
    words = "Speed of a carrier from a worker to this one, measured at first contact"
    speed = GaugeMetricFamily(
        "steelyard_kv_path_gb_per_second", words, labels=["model_name", "engine", "peer", "carrier"]
    )
    for worker in view.workers:
        for path in worker.transfers.paths:
            speed.add_metric([model_name, worker.worker_id, path.peer, path.carrier], path.bytes_per_s / 1e9)
    yield speed


def _counts(name: str, words: str, label: str, counts: tuple[tuple[str, int], ...]) -> CounterMetricFamily:
    counter = CounterMetricFamily(name, words, labels=[label])
    for value, count in counts:
        counter.add_metric([value], count)
    return counter


def _prediction_errors(view: HealthView) -> Iterator[GaugeMetricFamily]:
    """Quantiles of a few hundred predictions, by what they were of."""
    words = "Predicted times: |predicted - measured| / measured of the last ones"
    error = GaugeMetricFamily("steelyard_prediction_error_ratio", words, labels=["of", "quantile"])
    words = "How many predictions these are"
    judged = GaugeMetricFamily("steelyard_predictions_judged", words, labels=["of"])
    for one in view.prediction:
        error.add_metric([one.kind, "0.5"], one.median)
        error.add_metric([one.kind, "0.9"], one.p90)
        judged.add_metric([one.kind], one.num_judged)
    yield error
    yield judged


def _admissions(view: HealthView) -> CounterMetricFamily:
    words = "Decisions on where requests go: admitted, waited or refused, and why"
    counter = CounterMetricFamily("steelyard_admissions", words, labels=["outcome", "reason"])
    for outcome, reason, count in view.admissions:
        counter.add_metric([outcome, reason], count)
    return counter


def _control(view: ControlView) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    """Every gateway tells the same."""
    words = "Workers that changed their pool, and flips that were undone"
    yield _counts("steelyard_flips", words, "outcome", (("done", view.num_flips), ("undone", view.num_undone)))
    words = "Workers that the controller had come and leave"
    changes = ("added", view.num_added), ("removed", view.num_removed)
    yield _counts("steelyard_workers_changed", words, "change", changes)
    gauges = (
        ("steelyard_workers_coming", "Workers that are not there yet, or not there again", view.num_coming),
        ("steelyard_flip_seconds", "Of the last flip, from its decision until it was listed", view.last_flip_s),
        ("steelyard_predicted_attainment", "Share that keeps its targets as pools are now", view.attained),
        ("steelyard_best_predicted_attainment", "The same with the best split", view.best_attained),
        ("steelyard_wanted_prefill_workers", "Of the best split", view.best_prefill),
        ("steelyard_forecast_error_ratio", "Of the forecast of the rate of requests", view.forecast_error),
    )
    for name, text, value in gauges:
        if value is not None:
            yield GaugeMetricFamily(name, text, value)


def _kv_usage(worker: WorkerView) -> float:
    return 1 - worker.num_free_blocks / worker.num_blocks if worker.num_blocks else 0.0


def _gateway_info(view: HealthView) -> GaugeMetricFamily:
    """A scrape reaches one of the gateways that share a port: its series are told apart by this label."""
    gauge = GaugeMetricFamily("steelyard_gateway_info", "Always 1; which gateway this is", labels=["gateway"])
    gauge.add_metric([view.gateway_id], 1)
    return gauge


def _workers_per_role(view: HealthView) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily("steelyard_workers", "Workers that can be reached", labels=["role"])
    roles = [worker.role for worker in view.workers if worker.connected]
    for role in sorted({worker.role for worker in view.workers}):
        gauge.add_metric([role], roles.count(role))
    return gauge
