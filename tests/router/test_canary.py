from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import contextmanager
from typing import cast

from engine.errors import SteelyardError, Unavailable
from engine.types import FinishReason, Request, TokenOutput
from router.api import Generator
from router.canary import Canary
from tests.virtual import in_virtual_time, settle

CANARY_S = 10.0


class Served:
    """A Generator whose requests prove the way while `works`; else they fail with `error`, or finish without proof."""

    def __init__(self) -> None:
        self.works = True
        self.error: SteelyardError | None = None
        self.sent: list[tuple[float, Request]] = []
        self.num_open = 0
        self.canary = Canary(cast(Generator, self), CANARY_S)

    def new_request_id(self) -> str:
        return f"canary{len(self.sent)}"

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput]:
        self.sent.append((asyncio.get_running_loop().time(), request))
        self.num_open += 1
        try:
            await asyncio.sleep(0.1)
            if self.error is not None:
                raise self.error
            if self.works:
                self.canary.prove()
            yield TokenOutput(request.key, 0, (1, 2), FinishReason.LENGTH)
        finally:
            self.num_open -= 1

    def unhealthy_reason(self) -> str:
        healthy, reason, _ = self.canary.verdict()
        assert not healthy
        return reason


@contextmanager
def running():
    served = Served()
    served.canary.start()
    yield served


@in_virtual_time
async def test_nothing_is_healthy_before_the_first_proof() -> None:
    served = Served()
    assert served.unhealthy_reason() == "no canary has come through yet"


@in_virtual_time
async def test_a_canary_of_two_tokens_is_sent_at_once_and_proves_the_way() -> None:
    with running() as served:
        await served.canary.first_proof()
        assert served.canary.verdict() == (True, "ok", 0.0)
        ((_, request),) = served.sent
        assert (request.sampling.max_tokens, request.sampling.ignore_eos, request.namespace) == (2, True, "canary")
        await served.canary.stop()


@in_virtual_time
async def test_the_proof_never_gets_older_than_allowed_while_all_is_well() -> None:
    with running() as served:
        await served.canary.first_proof()
        for _ in range(200):
            await asyncio.sleep(0.73)
            assert served.canary.verdict()[0]
        await served.canary.stop()


@in_virtual_time
async def test_requests_of_users_are_proof_enough() -> None:
    with running() as served:
        await served.canary.first_proof()
        for _ in range(100):
            await asyncio.sleep(CANARY_S / 4)
            served.canary.prove()
        assert len(served.sent) == 1
        await served.canary.stop()


@in_virtual_time
async def test_a_way_that_breaks_is_told_with_its_reason_within_the_time() -> None:
    with running() as served:
        await served.canary.first_proof()
        served.error = Unavailable("no worker can be reached")
        await asyncio.sleep(CANARY_S + 0.1)
        assert "no worker can be reached" in served.unhealthy_reason()
        served.error = None
        await asyncio.sleep(1.0)
        assert served.canary.verdict()[0]
        await served.canary.stop()


@in_virtual_time
async def test_a_request_that_needed_no_hand_off_is_no_proof() -> None:
    with running() as served:
        served.works = False
        await asyncio.sleep(5)
        assert "without a hand-off" in served.unhealthy_reason()
        await served.canary.stop()


@in_virtual_time
async def test_stopping_ends_a_canary_under_way() -> None:
    with running() as served:
        await settle()
        assert served.num_open == 1
        await served.canary.stop()
        assert served.num_open == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}


@in_virtual_time
async def test_one_that_never_started_can_be_stopped() -> None:
    await Served().canary.stop()
