"""What the oracle tests share: near ties are listed at the end of a run in one process, and the prompts' source is
named."""

from __future__ import annotations

import pytest

from tests.oracle.combinations import Tally
from tests.oracle.prompts import source

_TOTAL = pytest.StashKey[Tally]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TOTAL] = Tally()


@pytest.fixture(scope="session")
def total(pytestconfig: pytest.Config) -> Tally:
    """Add every comparison with the oracle to this."""
    return pytestconfig.stash.setdefault(_TOTAL, Tally())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    total = config.stash.get(_TOTAL, Tally())
    if total.num_compared:
        terminalreporter.section("oracle")
        terminalreporter.write_line(f"prompts: {source()}")
        terminalreporter.write_line(str(total))
