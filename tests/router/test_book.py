"""The book keeps loads from one decision to the next: they are what they would be if all were made anew."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.types import EngineStats, FinishReason, Request, Role, SamplingParams, TokenOutput
from router.book import Book
from router.live import LiveRequest
from router.membership import Member
from router.policies.fleet import Fleet
from router.policies.snapshot import EngineLimits, Placement, WorkerLoad
from router.predict import Predictor
from tests.router.fake_workers import member

LIMITS = EngineLimits(prefill_chunk=64, max_batch_tokens=100)
NAMES = ("p0", "p1", "d0", "d1", "d2")


@dataclass(eq=False)
class Link:
    """Implements router.book.Link."""

    member: Member
    connected: bool = True
    stats: EngineStats = field(default_factory=EngineStats)
    stats_stand: bool = True

    @property
    def takes_requests(self) -> bool:
        return self.connected and not self.member.is_leaving


class Twins:
    """Two books that hear the same: `kept` is asked for all loads, `anew` for one after the other."""

    def __init__(self) -> None:
        self.kept, self.anew = Book(Predictor(), LIMITS), Book(Predictor(), LIMITS)
        self.links = {name: Link(member(name), stats_stand=name != "d1") for name in NAMES}
        self.lives: list[LiveRequest] = []
        self.now = 0.0
        self.num_placed = 0

    # --- what happens; `number` chooses of whatever there is ------------------------------------------------

    def place(self, number: int) -> None:
        self.num_placed += 1
        sampling = SamplingParams(max_tokens=1 + number % 20)
        request = Request(f"r{self.num_placed}", tuple(range(1 + 7 * number)), sampling)
        self.lives.append(LiveRequest(request, 1e9, self.now + number, self.note))
        self._place(self.lives[-1], number)

    def place_again(self, number: int) -> None:
        if self.lives:
            live = self.lives[number % len(self.lives)]
            live.void()
            self._place(live, number)

    def _place(self, live: LiveRequest, number: int) -> None:
        first, decode = member(NAMES[number % 2]), member(NAMES[2 + number % 3])
        placement = Placement(first, decode) if number % 5 else Placement(decode, None, 0.1)
        for book in (self.kept, self.anew):
            book.placed(live, placement, number, self.now)
        live.place(placement)

    def note(self, live: LiveRequest) -> None:
        for book in (self.kept, self.anew):
            book.note(live, self.now)

    def token(self, number: int) -> None:
        live = self._one(number)
        if live is not None:
            assert live.placement is not None
            worker = live.placement.first if live.is_prefilling else live.placement.decode or live.placement.first
            index = len(live.tokens)
            live.tokens.append(1)
            finish = FinishReason.LENGTH if len(live.tokens) == live.request.sampling.max_tokens else None
            live.take(TokenOutput(live.key, index, (1,), finish), worker.worker_id)

    def move(self, number: int) -> None:
        live = self._one(number)
        if live is not None and live.decoder is not None and live.migration is None:
            moved = live.begin_migration(member(NAMES[2 + number % 3]))
            live.end_migration(moved, (True, False, None)[number % 3])

    def end(self, number: int) -> None:
        if self.lives:
            live = self.lives.pop(number % len(self.lives))
            for book in (self.kept, self.anew):
                book.ended(live, self.now)

    def report(self, number: int) -> None:
        link = self._link(number)
        link.stats = replace(link.stats, num_running=number)
        if link.stats_stand:
            self.kept.heard(link.member.name)

    def break_stream(self, number: int) -> None:
        link = self._link(number)
        link.connected = not link.connected
        self.kept.heard(link.member.name)

    def flip(self, number: int) -> None:
        link = self._link(number)
        link.member = replace(link.member, role_epoch=link.member.role_epoch + 1)
        self.kept.members_changed()

    def leave_or_join(self, number: int) -> None:
        name = NAMES[number % len(NAMES)]
        if self.links.pop(name, None) is None:
            self.links[name] = Link(member(name), stats_stand=name != "d1")
        self.kept.members_changed()

    def wait(self, number: int) -> None:
        self.now += number / 20

    def _one(self, number: int) -> LiveRequest | None:
        running = [live for live in self.lives if live.placement is not None and not live.is_finished]
        return running[number % len(running)] if running else None

    def _link(self, number: int) -> Link:
        names = list(self.links)
        return self.links[names[number % len(names)]] if names else Link(member("p9"))

    # --- what is known --------------------------------------------------------------------------------------

    def check(self) -> None:
        loads = self.kept.loads(self.links.values(), self.now)
        assert list(loads) == [self.anew.load(link, self.now) for link in self.links.values()]
        assert _arrays(loads) == _arrays(Fleet(loads))
        for load, link in zip(loads, self.links.values(), strict=True):
            assert (load.member, load.connected, load.stats) == (link.member, link.connected, link.stats)
            self._check_by_the_table(load)

    def _check_by_the_table(self, load: WorkerLoad) -> None:
        here = [live for live in self.lives if load.name in live.workers]
        prompts = [live for live in here if live.is_prefilling and live.first_worker == load.name]
        assert load.num_sequences == len(here)
        assert load.num_prompt_tokens == sum(live.request.num_tokens for live in prompts)
        assert sorted(load.prompts.dues) == sorted(live.first_due for live in prompts)
        assert len(load.decodes.ends) == sum(live.decodes_on == load.name for live in here)


def _arrays(fleet: Fleet) -> list[list[float] | list[int]]:
    columns = (
        fleet.last_due, fleet.done_at, fleet.first_end, fleet.tokens, fleet.tpot_s, fleet.num_decodes,
        fleet.num_running, fleet.num_blocks, fleet.places(Role.PREFILL), fleet.places(Role.DECODE),
    )  # fmt: skip
    return list(columns)


STEPS = (
    Twins.place, Twins.place, Twins.token, Twins.token, Twins.wait, Twins.report, Twins.end, Twins.place_again,
    Twins.move, Twins.break_stream, Twins.flip, Twins.leave_or_join,
)  # fmt: skip


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 60)), max_size=60))
def test_kept_loads_are_those_that_are_made_anew(steps: list) -> None:
    twins = Twins()
    for step, number in steps:
        step(twins, number)
        twins.check()


def test_a_load_is_the_same_record_until_something_of_its_worker_changes() -> None:
    twins = Twins()
    twins.place(1)
    before = twins.kept.loads(twins.links.values(), 0.0)
    assert all(one is two for one, two in zip(before, twins.kept.loads(twins.links.values(), 0.0), strict=True))
    twins.report(3)
    after = twins.kept.loads(twins.links.values(), 0.0)
    assert [name for name, one, two in zip(NAMES, before, after, strict=True) if one is not two] == ["d1"]


def test_a_prompt_takes_as_long_as_its_policy_predicted_and_ends_with_the_first_token() -> None:
    """Beside others that decode, which the book knows nothing of."""
    book, link = Book(Predictor(), LIMITS), Link(member("d0"))
    live = LiveRequest(Request("r", tuple(range(50)), SamplingParams(max_tokens=4)), 1e9, 9.0, lambda _live: None)
    placement = Placement(link.member, None, 0.5, 0.4)
    book.placed(live, placement, 0, 1.0)
    live.place(placement)
    book.note(live, 1.0)
    assert book.load(link, 1.0).prompts.ends == (1.4,)
    live.take(TokenOutput(live.key, 0, (1,)), "d0")
    book.note(live, 1.3)
    assert book.load(link, 1.3).prompts.all == ()


def test_what_of_a_step_was_not_its_own_prompts_was_the_next_ones() -> None:
    """Two prompts of 0.4 s; the first is done after 0.7 s, so the other has 0.1 s left."""
    book, link, lives = Book(Predictor(), LIMITS), Link(member("p0")), []
    for name in ("a", "b"):
        live = LiveRequest(Request(name, tuple(range(50)), SamplingParams(max_tokens=4)), 1e9, 9.0, lambda _live: None)
        placement = Placement(link.member, member("d0"), 0.5, 0.4)
        book.placed(live, placement, 0, 1.0)
        live.place(placement)
        book.note(live, 1.0)
        lives.append(live)
    lives[0].take(TokenOutput(lives[0].key, 0, (1,)), "p0")
    book.note(lives[0], 1.7)
    (left,) = book.load(link, 1.7).prompts.all
    assert left.left_s == pytest.approx(0.1, abs=0.4 / 50)
