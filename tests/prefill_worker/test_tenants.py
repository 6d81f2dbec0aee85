from __future__ import annotations

from prefill_worker import tenants
from prefill_worker.tenants import Tenants


def test_counters_are_lifted_to_the_least_of_those_that_wait() -> None:
    one = Tenants()
    one.arrive("a", ())
    one.charge("a", 100)
    one.arrive("b", ("a",))
    assert one.served("b") == 100
    one.charge("b", 50)
    one.leave("a")
    one.arrive("a", ("b",))
    assert one.served("a") == 150


def test_an_empty_queue_goes_on_where_the_last_one_left_it() -> None:
    one = Tenants()
    one.arrive("a", ())
    one.charge("a", 100)
    one.leave("a")
    one.arrive("b", ())
    assert one.served("b") == 100


def test_a_counter_never_falls() -> None:
    one = Tenants()
    one.arrive("a", ())
    one.arrive("b", ("a",))
    one.charge("a", 100)
    one.leave("a")
    one.arrive("a", ("b",))
    assert (one.served("a"), one.served("b")) == (100, 0)


def test_those_that_have_not_come_for_long_are_forgotten_and_those_that_wait_are_not() -> None:
    one = Tenants()
    one.arrive("waits", ())
    one.charge("waits", 7)
    for number in range(2 * tenants.MAX_IDLE):
        name = f"t{number}"
        one.arrive(name, ("waits",))
        one.charge(name, 1000)
    assert one.served("waits") == 7
    assert one.served("t0") == 0
    assert one.served(f"t{2 * tenants.MAX_IDLE - 1}") == 1007
