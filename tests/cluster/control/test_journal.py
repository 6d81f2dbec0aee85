"""The journal: decisions are made again from it, and come out the same."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.control.flip import Flipped
from cluster.control.journal import CHECKPOINT_EVERY, Journal, decode, encode, replay
from cluster.control.planner import Memory, plan
from cluster.control.rules import ControllerConfig
from cluster.control.window import Kept, Look, Window
from cluster.explain import run_explain
from engine.errors import ConfigError
from engine.types import Role
from router.arrivals import Fared
from router.membership import Member
from router.report import GatewayReport
from tests.cluster.control.cases import COHORT, arrived, pools, table

RULES = ControllerConfig(fewest=5)


def report(now: float, count: int) -> GatewayReport:
    came = tuple(arrived(now - 0.5, 8000, 10.0, ttft_s=3.0, tpot_s=math.inf) for _ in range(count))
    fared = (Fared(now - 0.2, "", True, True),)
    return GatewayReport("g", now, came, fared, tuple(pools(2, 2)), ((COHORT, table()),), 1e-6, 16, 128)


def members() -> tuple[Member, ...]:
    return tuple(Member(one.worker_id, one.incarnation, one.role, 0, "a:1", COHORT) for one in pools(2, 2))


def written(ticks: int) -> list[str]:
    lines: list[str] = []
    journal, memory = Journal(RULES, lines.append), Memory()
    window = Window(RULES.window_s + RULES.bucket_s, RULES.stale_s)
    for tick in range(ticks):
        kept = window.kept
        look = Look(1000.0 + tick, (report(50.0 + tick, 4),), members(), tick % 20 == 7, True)
        decided, after = plan(window.after(look), memory, RULES)
        done = [Flipped("w2", Role.PREFILL, 0.2, 1)] if tick == 8 else []
        journal.note(look, decided, done, memory, kept)
        memory = after
    return lines


def test_a_line_says_what_it_said() -> None:
    for text in written(10):
        assert encode(decode(text)) == text


def test_every_decision_comes_out_the_same() -> None:
    again = list(replay(map(decode, written(80))))
    assert len(again) == 80
    assert all(one.is_same for one in again)
    assert any(one.line.plan.flip is not None for one in again)


def test_of_a_journal_without_its_beginning_the_rest_can_be_read() -> None:
    """As after it was renamed for its size."""
    again = list(replay(map(decode, written(2 * CHECKPOINT_EVERY)[30:])))
    assert len(again) == CHECKPOINT_EVERY
    assert all(one.is_same for one in again)


def test_a_decision_that_was_another_is_seen() -> None:
    lines = [decode(text) for text in written(40)]
    place = next(index for index, line in enumerate(lines) if line.plan.flip is not None)
    lines[place] = replace(lines[place], plan=replace(lines[place].plan, flip=None))
    assert [one.is_same for one in replay(lines)].count(False) == 1


def test_explain_tells_decisions_and_what_came_of_them(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(f"{line}\n" for line in written(60)))
    console = Console(width=200, file=io.StringIO())
    assert run_explain(path, console, flips_only=False)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "flip towards" in told
    assert "listed as prefill after 0.20 s" in told
    assert "60 decisions, made again: none came out otherwise" in told


@pytest.mark.parametrize(
    ("text", "words"),
    [("{}\n", "line 1: is no line of a journal: look"), ("what\n", "line 1"), ("", "the beginning of the journal")],
)
def test_what_is_no_journal_is_said_to_be_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        run_explain(path, Console(quiet=True), flips_only=False)


def test_a_gateway_of_another_clock_is_understood() -> None:
    window = Window(60.0, 5.0)
    seen = window.after(Look(1000.0, (report(50.0, 3),), members(), False, True))
    assert [one.at for one in seen.arrived] == [999.5] * 3
    assert seen.reported_at == 1000.0


def test_what_two_gateways_have_on_a_worker_adds_up() -> None:
    one = report(50.0, 1)
    busy = replace(one, workers=tuple(replace(each, num_tokens=100.0) for each in one.workers))
    window = Window(60.0, 5.0, Kept())
    seen = window.after(Look(10.0, (busy, replace(busy, gateway_id="h")), members(), False, True))
    assert [each.num_tokens for each in seen.workers] == [200.0] * 4


def test_a_worker_of_which_no_gateway_has_heard_is_missing() -> None:
    window = Window(60.0, 5.0)
    other = (*members(), Member("w9", "new", Role.DECODE, 0, "a:1", COHORT))
    seen = window.after(Look(10.0, (report(50.0, 1),), other, False, True))
    assert len(seen.workers) == 4
    assert seen.is_incomplete
