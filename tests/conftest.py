"""Before anything is imported: how Triton's kernels run. And the order of a run: files with slow tests first, so that
none of them is what one process still does when all others have ended. Within both kinds, and within a file, the order
stays.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, by whomever


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
