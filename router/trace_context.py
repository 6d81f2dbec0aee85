"""The trace context of the request that is being served: W3C `traceparent` and `tracestate`, for calls made for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_present: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("trace_headers", default=())


def trace_headers() -> tuple[tuple[str, str], ...]:
    """Empty if it is not traced."""
    return _present.get()


@contextmanager
def tracing(headers: dict[str, str]) -> Iterator[None]:
    """In here, and in tasks that begin in here."""
    token = _present.set(tuple(headers.items()))
    try:
        yield
    finally:
        _present.reset(token)
