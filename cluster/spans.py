"""Where spans go: a collector, by OTLP over HTTP, from a thread of its own with a bounded queue."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from router.config import TracingConfig
from router.tracing import make_provider

MAX_QUEUED = 8192  # spans, about ten per request; more are dropped
MAX_BATCH = 512
EXPORT_EVERY_MS = 1000.0
EXPORT_TIMEOUT_S = 5
FLUSH_TIMEOUT_S = 1.0  # at the end


def open_provider(config: TracingConfig, environment: dict[str, str], version: str) -> TracerProvider | None:
    """None where neither the config nor OTEL_EXPORTER_OTLP_ENDPOINT names a collector."""
    base = config.endpoint or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if not base:
        return None
    exporter = OTLPSpanExporter(endpoint=f"{base.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
    processor = BatchSpanProcessor(exporter, MAX_QUEUED, EXPORT_EVERY_MS, MAX_BATCH)
    return make_provider(processor, config.sampling_ratio, version)
