"""Our typed errors across gRPC: the code travels as trailing metadata beside a standard status."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from engine.errors import ERRORS, DeadlineExceeded, SteelyardError, Unavailable, WorkerLost, error_from_code

CODE_METADATA = "x-steelyard-code"
INCARNATION_METADATA = "x-steelyard-incarnation"  # of the worker that a call is meant for
SECRET_METADATA = "x-steelyard-secret"

_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


async def abort_with(context: grpc.aio.ServicerContext, error: SteelyardError) -> None:
    """End a call with this error; never returns."""
    status = _STATUS.get(error.status, grpc.StatusCode.INTERNAL)
    await context.abort(status, error.message, ((CODE_METADATA, error.code),))


def error_from_rpc(error: grpc.aio.AioRpcError) -> SteelyardError:
    """The peer's typed error, or what the broken call means."""
    trailing = dict(error.trailing_metadata() or ())
    code = trailing.get(CODE_METADATA)
    message = error.details() or str(error.code())
    if isinstance(code, str) and code in ERRORS:
        return error_from_code(code, message)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"a peer did not answer in time: {message}")
    return Unavailable(f"a peer could not be reached: {message}")


@contextmanager
def typed_errors() -> Iterator[None]:
    """What a call in here raises is a SteelyardError.

    A channel that is closed ends its calls with CancelledError, although nobody has cancelled the task that waits; and
    a call on it later is refused with UsageError."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from None
    except grpc.aio.UsageError as error:
        raise WorkerLost(f"the channel to a peer was closed: {error}") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise WorkerLost("the channel to a peer was closed") from None
