"""A live cluster as a profile sees it: token-id prompts in, times of the answers and records of steps out.

Every fault is an ApiError whose message can be shown as it is.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType

import httpx
from pydantic import TypeAdapter

from cluster.client import ANSWER_S, CONNECT_S, ApiError, message_of, told_faults
from router.api import HealthView
from router.step_history import MAX_TOLD, HeardStep, StepsView

HEALTH = TypeAdapter(HealthView)
STEPS = TypeAdapter(StepsView)


@dataclass(frozen=True, slots=True)
class Served:
    """What is served, by one prefill and one decode worker."""

    model: str
    max_context: int
    kv_token_bytes: int


@dataclass(frozen=True, slots=True)
class AnswerTimes:
    """As the client saw them, in seconds since it asked. The answer's head leaves with its first token."""

    first_s: float
    end_s: float


class LiveCluster:
    """Connections to one gateway; `transport` replaces the network in tests."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._transport = transport
        self._last_step = 0

    async def __aenter__(self) -> LiveCluster:
        with told_faults(self._url):
            timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            self._http = httpx.AsyncClient(
                base_url=self._url, timeout=timeout, limits=limits, transport=self._transport, trust_env=False
            )
            return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def served(self) -> Served:
        """Raises ApiError unless it is one prefill and one decode worker, and both can be reached."""
        with told_faults(self._url):
            model = (await self._get("/v1/models")).json()["data"][0]
            workers = (await self.health()).workers
            roles = sorted(worker.role for worker in workers)
            if roles != ["decode", "prefill"] or not all(worker.connected for worker in workers):
                found = ", ".join(f"{one.worker_id}{'' if one.connected else ' (down)'}" for one in workers) or "none"
                raise ApiError(f"a profile is of one prefill and one decode worker; {self._url} has: {found}")
            return Served(str(model["id"]), int(model["max_model_len"]), workers[0].kv_token_bytes)

    async def health(self) -> HealthView:
        with told_faults(self._url):
            return HEALTH.validate_json((await self._http.get("/health", timeout=CONNECT_S)).content)

    async def new_steps(self) -> list[HeardStep]:
        """The steps that the gateway has heard of since the last call, in order."""
        steps: list[HeardStep] = []
        with told_faults(self._url):
            while True:
                view = STEPS.validate_json((await self._get(f"/debug/steps?after={self._last_step}")).content)
                steps += view.steps
                self._last_step = view.last
                if len(view.steps) < MAX_TOLD:
                    return steps

    async def answer(self, model: str, prompt: Sequence[int], num_tokens: int) -> AnswerTimes:
        """One greedy answer, to its end. Cancelled, it makes the cluster abort the request."""
        begun = time.perf_counter()
        async with self._stream(model, prompt, num_tokens) as response:
            first_s = time.perf_counter() - begun
            text = "".join([part async for part in response.aiter_text()])
        end_s = time.perf_counter() - begun
        if not text.rstrip().endswith("data: [DONE]"):
            raise ApiError(message_of(text.rstrip().rpartition("data: ")[2]) or f"{self._url} broke an answer off")
        return AnswerTimes(first_s, end_s)

    @asynccontextmanager
    async def _stream(self, model: str, prompt: Sequence[int], num_tokens: int) -> AsyncIterator[httpx.Response]:
        body = {
            "model": model, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        with told_faults(self._url):
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    text = (await response.aread()).decode(errors="replace")
                    raise ApiError(message_of(text) or f"HTTP {response.status_code}")
                yield response

    async def _get(self, path: str) -> httpx.Response:
        response = await self._http.get(path, timeout=CONNECT_S)
        if response.status_code == httpx.codes.NOT_FOUND:
            raise ApiError(f"{self._url} does not tell its steps ({path.partition('?')[0]}): another version serves it")
        response.raise_for_status()
        return response
