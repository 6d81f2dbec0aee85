"""A gateway: the HTTP face and the dispatcher behind it, in one process. Knows no Ray.

1. `start` loads the tokenizer and listens (on a shared port once a worker can be reached);
2. `apply` gives it memberships; 3. `ready` returns when the first canary has come through prefill, wire and decode;
4. `failed` returns when it can no longer serve; 5. `stop` lets requests in progress end for `drain_s`, ends the others
with an error, and closes the connections (cluster/end_limits.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import uvicorn
from opentelemetry.sdk.trace import TracerProvider

from cluster.config import ClusterConfig
from cluster.connection import Connection
from cluster.end_limits import ANSWER_ENDS_S, SERVER_S
from cluster.face_tls import Certificates, check_tls
from cluster.grammar_check import GrammarProcess
from cluster.grammar_process import vocabulary_message
from cluster.keys import KeySource, key_of_environment
from cluster.line_file import LineFile
from cluster.listener import bind, listen
from cluster.rpc.auth import prefix_hash_key
from cluster.rpc.channels import Channels
from cluster.rpc.client import GrpcConnector
from cluster.rpc.tls import load_tls
from cluster.spans import FLUSH_TIMEOUT_S, open_provider
from cluster.turn_writer import Turn
from engine.config import EngineConfig, ModelSource
from engine.models.detokenizer import IncrementalDetokenizer, Pieces
from engine.models.loader import load_config
from engine.models.pooling import pooling_of
from engine.models.store import resolve
from engine.models.tokenizer import Tokenizer, load_tokenizer
from router.api import ControlView
from router.block_names import Naming
from router.chat_style import chat_style
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.door import Door
from router.gateway import create_app
from router.membership import Membership
from router.policies.snapshot import Name
from router.report import GatewayReport
from router.text import TextModel

log = logging.getLogger(__name__)


class SystemNames:
    """Ids and seeds that nobody can guess. Implements router.dispatch.Names."""

    def new_request_id(self) -> str:
        return secrets.token_hex(12)

    def new_seed(self) -> int:
        return secrets.randbits(63)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to whoever runs us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    def __init__(self, config: ClusterConfig, secret: bytes, gateway_id: str) -> None:
        self._config = config
        self._secret = secret
        self._gateway_id = gateway_id
        self._num_gateways = 1
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._ledger_file: LineFile | None = None
        self._tracing: TracerProvider | None = None

    async def start(self) -> str:
        """Begin to listen; returns the base URL. Raises ConfigError if the port is taken or TLS cannot
        be had, ModelError."""
        router = self._config.router
        self._channels = Channels(self._secret, await asyncio.to_thread(load_tls, self._config.rpc.tls))
        model, self._grammars = await asyncio.to_thread(load_text_model, self._config.model, router.grammar_compile_s)
        self._keys = KeySource(router.keys_file, key_of_environment(), router.keys_folder, router.classes)
        await self._keys.start()
        check_tls(router.tls)
        shares = router.gateways > 1
        listener = bind(router.host, router.port, is_shared=True) if shares else listen(router.host, router.port)
        connector, naming = GrpcConnector(self._channels), naming_of(self._config.engine, self._secret)
        limits = self._config.engine_limits
        self._dispatcher = Dispatcher(
            router, self._gateway_id, connector, SystemNames(), naming=naming, limits=limits
        )  # fmt: skip
        self._door = Door(self._dispatcher)
        self._tracing = open_provider(router.tracing, dict(os.environ), our_version())
        self._ledger_file = LineFile(Path(router.ledger_file), router.ledger_file_bytes) if router.ledger_file else None
        app = create_app(
            self._door, model, router, steps=self._dispatcher.step_history, wall_clock=time.time,
            version=our_version(), ledger_sink=self._ledger_file, tracing=self._tracing, keys=self._keys.ring,
            num_gateways=lambda: self._num_gateways,
        )  # fmt: skip
        serving = server_config(app, router)
        self._server = Server(serving)
        serving.load()
        self._certificates = Certificates(router.tls, serving.ssl) if serving.ssl is not None else None
        self._serving = asyncio.create_task(self._serve(self._server, listener))
        self._dispatcher.canary.start()
        self._dispatcher.rebalancer.start()
        host, port = listener.getsockname()[:2]
        scheme = "https" if router.tls.cert_file else "http"
        return f"{scheme}://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"

    def apply(self, membership: Membership) -> None:
        self._num_gateways = membership.num_gateways
        self._dispatcher.apply(membership)

    def report(self, control: ControlView) -> GatewayReport:
        """What has come since the last one, and how the workers stand."""
        return self._dispatcher.report(control)

    async def evacuate(self, worker: Name, limit_s: float) -> int:
        """See Dispatcher.evacuate."""
        return await self._dispatcher.evacuate(worker, limit_s)

    async def ready(self) -> None:
        """Returns when a request has gone through prefill, wire and decode. The caller bounds the wait."""
        await self._dispatcher.canary.first_proof()

    async def failed(self) -> str:
        assert self._serving is not None, "start comes first"
        await asyncio.wait([self._serving])
        return "the HTTP server ended"

    async def stop(self) -> None:
        """Refuse new requests, let those in progress end for `drain_s`, end the rest, close all; idempotent."""
        if self._server is None or self._serving is None:
            return
        server, self._server = self._server, None
        if num_left := await self._door.close(self._config.router.drain_s):
            log.warning("%d requests did not end within router.drain_s and are ended", num_left)
        await self._dispatcher.close()
        await self._keys.stop()
        if self._certificates is not None:
            await self._certificates.stop()
        await self._grammars.stop()
        server.should_exit = True
        await asyncio.wait([self._serving], timeout=ANSWER_ENDS_S + SERVER_S)
        self._serving.cancel()
        for connection in list(server.server_state.connections):
            connection.transport.abort()  # its client does not take the end of its answer
        await self._channels.close()
        if self._ledger_file is not None:
            await asyncio.to_thread(self._ledger_file.close)
        if self._tracing is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self._tracing.shutdown), FLUSH_TIMEOUT_S)

    async def _serve(self, server: uvicorn.Server, listener: socket.socket) -> None:
        """Who shares its port takes no connections before it can serve them: the others can."""
        with contextlib.closing(listener):
            if self._config.router.gateways > 1 and not await self._dispatcher.reachable():
                return
            await server.serve(sockets=[listener])


def server_config(app: Any, router: RouterConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], partial(Connection, router, Turn(asyncio.get_running_loop()))),
        ws="none",  # no route is a WebSocket, and its connections would have none of our bounds
        log_level="warning",
        access_log=False,
        lifespan="off",
        ssl_certfile=router.tls.cert_file,
        ssl_keyfile=router.tls.key_file,
        ssl_ca_certs=router.tls.client_ca_file,
        ssl_cert_reqs=ssl.CERT_REQUIRED if router.tls.client_ca_file else ssl.CERT_NONE,
        timeout_graceful_shutdown=int(ANSWER_ENDS_S),
    )


def naming_of(engine: EngineConfig, secret: bytes) -> Naming:
    """How the cluster's workers name their blocks."""
    return Naming(engine.block_size, prefix_hash_key(secret) if engine.prefix_cache else None)


def load_text_model(source: ModelSource, grammar_compile_s: float) -> tuple[TextModel, GrammarProcess]:
    """The model as text sees it: its name, tokenizer and context; and what tries its grammars."""
    files = resolve(source.name, Path(source.cache_dir).expanduser() if source.cache_dir else None)
    config = load_config(files)
    max_context = min(source.max_context or config.max_context, config.max_context)
    tokenizer = load_tokenizer(files, config)
    name = source.served_name or files.name
    style = chat_style(tokenizer.template_source, tokenizer.knows_tools, source.tool_format, source.reasoning)

    pooling = pooling_of(files, config, source.pooling)
    vocab_size = max(config.vocab_size, tokenizer.vocab_size)  # columns of the logits
    vocabulary = vocabulary_message(tokenizer.to_json(), vocab_size, config.eos_token_ids)
    grammars = GrammarProcess(vocabulary, grammar_compile_s)
    return TextModel(name, max_context, tokenizer, Detokenizers(tokenizer).new, style, pooling, grammars), grammars


class Detokenizers:
    """Makes those of one model's streams, which share the texts of tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[frozenset[int], Pieces] = {}  # by the special tokens shown: the model's marks, or none

    def new(self, marks: Sequence[str]) -> IncrementalDetokenizer:
        ids = [self._tokenizer.special_id(mark) for mark in marks]
        shown = frozenset(one for one in ids if one is not None)
        return IncrementalDetokenizer(self._tokenizer, shown=shown, pieces=self._shared(shown))

    def _shared(self, shown: frozenset[int]) -> Pieces | None:
        if not self._tokenizer.is_bytewise:
            return None
        if shown not in self._pieces:
            self._pieces[shown] = Pieces(self._tokenizer, shown=shown)
        return self._pieces[shown]


def our_version() -> str:
    try:
        return version("steelyard")
    except PackageNotFoundError:
        return "dev"  # a working directory that was never installed
