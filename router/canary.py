"""The canary: proof that prefill, wire and decode work together, at least every `canary_s`.

Any request whose tokens came from a decode worker after a hand-off is proof; where the controller has every worker
serve both phases, any that came from one. When there has been none for half the time, a request of our own is sent.
`/health` tells the truth: healthy means that a proof is younger than `canary_s`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

from engine.errors import SteelyardError
from engine.types import Request, SamplingParams
from router.api import Generator

CANARY = "canary"  # the namespace of its requests, which go by least load whatever the policy (router/placer.py)
CANARY_PROMPT = tuple(range(1, 9))  # any ids do
CANARY_PARAMS = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
RETRY_S = 0.5

log = logging.getLogger(__name__)


class Canary:
    def __init__(self, generator: Generator, canary_s: float) -> None:
        self._generator = generator
        self._canary_s = canary_s
        self._proved_at: float | None = None
        self._problem = "no canary has come through yet"
        self._task: asyncio.Task[None] | None = None
        self._first_proof = asyncio.Event()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def first_proof(self) -> None:
        """Returns when a request has come through for the first time. The caller bounds the wait."""
        await self._first_proof.wait()

    def prove(self) -> None:
        """Tokens have just come from a decode worker, after a hand-off if there are any."""
        self._proved_at = asyncio.get_running_loop().time()
        self._first_proof.set()

    def verdict(self) -> tuple[bool, str, float | None]:
        """(healthy, reason, age of the last proof in seconds)."""
        if self._proved_at is None:
            return False, self._problem, None
        age_s = asyncio.get_running_loop().time() - self._proved_at
        if age_s <= self._canary_s:
            return True, "ok", age_s
        return False, self._problem, age_s

    async def _run(self) -> None:
        while True:
            healthy, _, age_s = self.verdict()
            if not healthy or age_s is None or age_s >= self._canary_s / 2:
                await self._send()
                await asyncio.sleep(RETRY_S)
            else:
                await asyncio.sleep(self._canary_s / 2 - age_s)

    async def _send(self) -> None:
        request = Request(
            self._generator.new_request_id(), CANARY_PROMPT, CANARY_PARAMS, namespace=CANARY, timeout_s=self._canary_s
        )
        before = self._proved_at
        try:
            async with aclosing(self._generator.generate(request)) as outputs:
                async for _ in outputs:
                    pass
            if self._proved_at == before:
                self._note("the canary was served without a hand-off: a pool is empty")
        except SteelyardError as error:
            self._note(f"the canary failed: {error.message}")

    def _note(self, problem: str) -> None:
        """Remember what is wrong; log it when it is news and something has worked before."""
        if problem != self._problem and self._proved_at is not None:
            log.warning("%s", problem)
        self._problem = problem
