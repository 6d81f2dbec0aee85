"""Both phases on every worker: when the gateways are told that it is meant so."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cluster.control.controller import Controller
from cluster.control.rules import ControllerConfig
from engine.types import Role
from router.api import ControlView
from router.membership import Member
from router.report import GatewayReport


class FakeFleet:
    """Implements cluster.control.controller.Fleet as far as nobody is flipped."""

    def __init__(self, *roles: Role) -> None:
        self.roles = roles
        self.whole = True

    async def reports(self, view: ControlView) -> Sequence[GatewayReport]:
        return ()

    def members(self) -> Sequence[Member]:
        return [Member(f"w{index}", "1", role, 0, "127.0.0.1:1", "c") for index, role in enumerate(self.roles)]

    def is_whole(self) -> bool:
        return self.whole

    def coming(self) -> Sequence[str]:
        return ()

    def new(self) -> Sequence[str]:
        return ()

    @property
    def num_leaving(self) -> int:
        return 0


async def told(controller: Controller) -> bool:
    await controller.tick()
    return controller.view.is_together


@pytest.mark.parametrize(("allowed", "wanted"), [(True, True), (False, False)])
async def test_all_are_there_and_none_prefills_alone(allowed: bool, wanted: bool) -> None:
    fleet = FakeFleet(Role.DECODE, Role.DECODE)
    controller = Controller(fleet, ControllerConfig(together=allowed))  # type: ignore[arg-type]
    assert await told(controller) is wanted


async def test_a_pool_whose_workers_have_died_is_not_meant_so() -> None:
    fleet = FakeFleet(Role.DECODE)
    fleet.whole = False
    controller = Controller(fleet, ControllerConfig())  # type: ignore[arg-type]
    assert not await told(controller)


async def test_while_one_of_them_is_being_replaced_the_others_go_on_as_before() -> None:
    fleet = FakeFleet(Role.DECODE, Role.DECODE)
    controller = Controller(fleet, ControllerConfig())  # type: ignore[arg-type]
    assert await told(controller)
    fleet.roles, fleet.whole = (Role.DECODE,), False
    assert await told(controller)
    fleet.roles, fleet.whole = (Role.PREFILL, Role.DECODE), True
    assert not await told(controller)
