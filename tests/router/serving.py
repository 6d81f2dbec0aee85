"""A real HTTP server around the app, on a loopback port that the system chooses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import uvicorn

from tests.router.fakes import PLAIN_STYLE, FakeGenerator, make_app


@asynccontextmanager
async def serve(
    generator: FakeGenerator, http: Literal["h11", "httptools"] = "httptools", **settings: int
) -> AsyncIterator[str]:
    """The server's address; it is stopped at the end."""
    app = make_app(generator, PLAIN_STYLE, **settings)
    config = uvicorn.Config(app, http=http, ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
