"""The outermost ring of the HTTP face: nothing gets past it but an answer.

1. Each HTTP request gets its id and its time of arrival, in the scope's state.
2. Whatever is raised before an answer began becomes an error answer; a client that has gone gets none.
3. Every answer carries `x-request-id`. An error is one line in the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import SteelyardError
from router.errors import as_steelyard_error, error_response

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is known of an HTTP request before it is read. `time_s` is the loop's clock."""

    request_id: str
    time_s: float


def arrival_of(request: HttpRequest) -> Arrival:
    return request.state.arrival


def log_failure(request_id: str, error: Exception) -> None:
    """One line; an unexpected error tells its type and place, its traceback comes at level DEBUG."""
    if isinstance(error, SteelyardError):
        level = logging.ERROR if error.status >= 500 else logging.INFO
        logger.log(level, "request %s: %s %s %r", request_id, error.status, error.code, error.message)
        return
    logger.error("request %s: unexpected %s at %s: %r", request_id, type(error).__name__, _place(error), str(error))
    logger.debug("request %s", request_id, exc_info=error)


def _place(error: Exception) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f"{frame.tb_frame.f_code.co_qualname}:{frame.tb_lineno}" if frame is not None else "?"


class Boundary:
    """ASGI middleware. `on_refused` hears the code of every error that became an answer."""

    def __init__(self, app: ASGIApp, new_request_id: Callable[[], str], on_refused: Callable[[str], None]) -> None:
        self._app = app
        self._new_request_id = new_request_id
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrival = Arrival(self._new_request_id(), asyncio.get_running_loop().time())
        scope.setdefault("state", {})["arrival"] = arrival
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = arrival.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            logger.info("request %s: the client went away while sending", arrival.request_id)
        except Exception as error:  # it becomes the answer of the request it belongs to
            log_failure(arrival.request_id, error)
            if started:
                return
            known = as_steelyard_error(error)
            self._on_refused(known.code)
            await error_response(known)(scope, receive, send_named)
