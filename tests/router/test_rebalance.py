"""Which request goes where when a decode worker runs out of blocks."""

from __future__ import annotations

from engine.types import EngineStats, Role
from router.membership import Member
from router.policies.snapshot import WorkerLoad
from router.rebalance import Proposal, Running, choose_move


def member(name: str, role: Role = Role.DECODE, cohort: str = "c") -> Member:
    return Member(name, "1", role, 0, f"{name}:1", cohort, 256)


def load(one: Member, num_free: int, connected: bool = True) -> WorkerLoad:
    return WorkerLoad(one, connected, 0, 0, EngineStats(num_blocks=100, num_free_blocks=num_free))


FULL, EMPTY, HALF = member("full"), member("empty"), member("half")
RUNNING = [Running("short", FULL, 100), Running("long", FULL, 300), Running("elsewhere", HALF, 900)]


def test_the_longest_of_the_fullest_goes_to_the_emptiest() -> None:
    loads = [load(HALF, 50), load(FULL, 4), load(EMPTY, 100)]
    assert choose_move(loads, RUNNING, 0.05) == Proposal("long", EMPTY)


def test_what_the_target_has_no_room_for_stays_and_a_shorter_one_goes() -> None:
    assert choose_move([load(FULL, 4), load(HALF, 50)], RUNNING, 0.05) == Proposal("short", HALF)
    assert choose_move([load(FULL, 4), load(HALF, 30)], RUNNING, 0.05) is None


def test_nobody_moves_where_there_is_room_or_to_whom_it_cannot_be_given() -> None:
    assert choose_move([load(FULL, 5), load(EMPTY, 100)], RUNNING, 0.05) is None
    assert choose_move([load(FULL, 4), load(EMPTY, 100, connected=False)], RUNNING, 0.05) is None
    assert choose_move([load(FULL, 4), load(member("other", cohort="d"), 100)], RUNNING, 0.05) is None
    assert choose_move([load(FULL, 4), load(member("prefill", Role.PREFILL), 100)], RUNNING, 0.05) is None
    assert choose_move([load(FULL, 4), load(EMPTY, 100)], [], 0.05) is None
    assert choose_move([load(FULL, 0), load(EMPTY, 100)], RUNNING, 0.0) is None, "it is off"
