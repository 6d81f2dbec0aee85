"""The history of steps: numbers, bounds, a reader that comes again; and its face at /debug/steps."""

from __future__ import annotations

import httpx
import pytest
from pydantic import TypeAdapter

from engine.step_shape import Chunk, StepRecord, StepShape, decode_shape
from engine.types import Role
from router.config import RouterConfig
from router.gateway import create_app
from router.step_history import MAX_TOLD, StepHistory, StepsView
from tests.router.fake_workers import member
from tests.router.fakes import FakeGenerator, text_model


def record(step_s: float) -> StepRecord:
    return StepRecord(decode_shape([10, 20]), step_s)


def durations(view: StepsView) -> list[float]:
    return [step.record.step_s for step in view.steps]


def test_a_reader_that_comes_again_gets_each_step_once_in_the_order_in_which_they_came() -> None:
    history = StepHistory()
    history.add(member("p0"), [record(1), record(2)])
    history.add(member("d0"), [record(3)])
    history.add(member("p0"), [record(4)])
    first = history.since(0)
    assert durations(first) == [1, 2, 3, 4]
    assert [(step.number, step.worker_id, step.role) for step in first.steps[1:3]] == [
        (2, "p0", Role.PREFILL),
        (3, "d0", Role.DECODE),
    ]
    assert history.since(first.last) == StepsView((), first.last)
    history.add(member("d0"), [record(5)])
    assert durations(history.since(first.last)) == [5]


def test_of_each_worker_the_last_steps_are_kept_and_a_gap_shows_in_the_numbers() -> None:
    history = StepHistory(max_steps=3)
    history.add(member("d0"), [record(1)])
    history.add(member("p0"), map(record, range(2, 8)))
    assert [step.number for step in history.since(0).steps] == [1, 5, 6, 7]


def test_an_answer_is_bounded_and_the_next_goes_on_from_it() -> None:
    history = StepHistory()
    history.add(member("p0"), map(record, range(5)))
    history.add(member("d0"), map(record, range(5, 9)))
    first = history.since(1, max_told=3)
    assert (durations(first), first.last) == ([1, 2, 3], 4)
    assert durations(history.since(first.last)) == [4, 5, 6, 7, 8]


def test_a_life_that_has_left_is_forgotten_and_numbers_go_on() -> None:
    history = StepHistory()
    history.add(member("p0", "i1"), [record(1)])
    history.add(member("p0", "i2"), [record(2)])
    history.forget("p0", "i1")
    assert durations(history.since(0)) == [2]
    history.forget("p0", "i2")
    history.forget("p0", "i2")
    assert history.since(0) == StepsView((), 2)


# --- over HTTP ------------------------------------------------------------------------------------------------


def face(history: StepHistory) -> httpx.AsyncClient:
    app = create_app(FakeGenerator(), text_model(), RouterConfig(), steps=history, wall_clock=lambda: 0.0)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


async def test_steps_are_read_over_http_as_they_were_measured() -> None:
    history = StepHistory()
    history.add(member("p0"), [StepRecord(StepShape((Chunk(256, 44), Chunk(0, 7)), 2, 99), 0.25)])
    history.add(member("d0"), [record(0.1)] * MAX_TOLD)
    async with face(history) as client:
        reply = await client.get("/debug/steps")
        view = TypeAdapter(StepsView).validate_json(reply.content)
        assert view == history.since(0)
        assert view.last == MAX_TOLD
        again = await client.get("/debug/steps", params={"after": view.last})
        assert [step["number"] for step in again.json()["steps"]] == [MAX_TOLD + 1]


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "9" * 30])
async def test_a_number_that_is_none_is_refused_by_its_name(after: str) -> None:
    async with face(StepHistory()) as client:
        reply = await client.get("/debug/steps", params={"after": after})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "after"
