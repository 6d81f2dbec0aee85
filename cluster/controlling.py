"""The controller's life in the supervisor: one that fails is made anew, and finds all that it needs again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.control.controller import Controller
from cluster.control.journal import Journal
from cluster.control.rules import ControllerConfig
from cluster.line_file import LineFile
from cluster.supervised_fleet import SupervisedFleet

log = logging.getLogger(__name__)


async def control(fleet: SupervisedFleet, rules: ControllerConfig, began: Callable[[Controller], None]) -> None:
    """Until it is cancelled. `began` gets each new one."""
    with _opened(rules) as write:
        while True:
            controller = Controller(fleet, rules, Journal(rules, write) if write is not None else None)
            began(controller)
            try:
                await controller.run()
            except Exception:
                log.exception("the controller failed, and begins anew")
            fleet.list_leaving()
            await asyncio.sleep(rules.tick_s)


@contextmanager
def _opened(rules: ControllerConfig) -> Iterator[Callable[[str], None] | None]:
    """What writes the controller's journal, if there is to be one."""
    if not rules.journal_file:
        yield None
        return
    file = LineFile(Path(rules.journal_file), rules.journal_file_bytes)
    try:
        yield file.put
    finally:
        file.close()
