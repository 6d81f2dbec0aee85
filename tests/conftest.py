"""Before anything is imported: how Triton's kernels run. Then the order of a run: files with slow tests first, so that
none of them is what one process still does when all others have ended. Within both kinds, and within a file, the order
stays. tests/scheduling.py hands them out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer

    from tests.scheduling import FileScheduling

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, by whomever


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FileScheduling | None:
    from tests.scheduling import FileScheduling  # xdist is not there on every machine

    return FileScheduling(config, log) if config.getoption("dist") == "loadfile" else None
