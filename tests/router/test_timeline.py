"""A client that asks for it gets its ledger; operators get the last ones, and all of them in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.line_file import LineFile
from engine.types import FinishReason
from router.ledger import Ledger, Outcome
from router.ledger_log import LedgerLog
from tests.router.fakes import CHAT, COMPLETIONS, FakeGenerator, chat, completion, events, make_client

ASKS = {"x-timeline": "1"}


def body_of(path: str, **fields: object) -> dict[str, object]:
    return chat(**fields) if path == CHAT else completion(**fields)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_whole_answer_has_its_timeline_beside_usage_only_if_asked(path: str) -> None:
    async with make_client(FakeGenerator()) as client:
        shown = (await client.post(path, json=body_of(path), headers=ASKS)).json()
        plain = (await client.post(path, json=body_of(path))).json()
    timeline = shown.pop("timeline")
    assert shown.keys() == plain.keys()
    assert timeline["num_tokens"] == shown["usage"]["completion_tokens"]
    claimed_s = sum(timeline["stages"].values()) - timeline["stages"]["unattributed"]
    assert timeline["stages"]["unattributed"] == pytest.approx(max(0.0, timeline["e2e_s"] - claimed_s))
    assert {"prepare", "decode", "unattributed"} <= timeline["stages"].keys()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_has_it_in_an_event_without_choices_before_its_end(path: str) -> None:
    async with make_client(FakeGenerator()) as client:
        body = body_of(path, stream=True, stream_options={"include_usage": True})
        reply = await client.post(path, json=body, headers=ASKS)
        plain = await client.post(path, json=body)
    *others, last = events(reply)
    assert reply.text.endswith("data: [DONE]\n\n")
    assert last["choices"] == []
    assert last["timeline"]["num_tokens"] == others[-1]["usage"]["completion_tokens"]
    assert len(others) == len(events(plain))
    assert "timeline" not in plain.text


async def test_the_last_ledgers_are_told_oldest_first() -> None:
    async with make_client(FakeGenerator()) as client:
        for text in ("a", "ab", "abc"):
            await client.post(COMPLETIONS, json=completion(text))
        told = (await client.get("/debug/requests", params={"last": "2"})).json()["requests"]
        refused = await client.get("/debug/requests", params={"last": "-1"})
    assert [one["request_id"] for one in told] == ["r2", "r3"]
    assert [one["end"] for one in told] == ["stop", "stop"]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "last")


def log_lines(sink: LineFile, count: int) -> None:
    ledgers = LedgerLog(lambda: 5.0, sink)
    for number in range(count):
        ledgers.add(Ledger(0.0), Outcome(f"r{number}", FinishReason.STOP, 1, 0, 0))


def test_every_ledger_is_a_line_of_the_file(tmp_path: Path) -> None:
    sink = LineFile(tmp_path / "ledgers.jsonl", 2**20)
    log_lines(sink, 50)
    sink.close()
    lines = (tmp_path / "ledgers.jsonl").read_text().splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == [f"r{number}" for number in range(50)]


def test_the_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "ledgers.jsonl"
    path.write_text("x" * 1000)
    sink = LineFile(path, 1000)
    log_lines(sink, 1)
    sink.close()
    assert (tmp_path / "ledgers.jsonl.1").read_text() == "x" * 1000
    assert len(path.read_text().splitlines()) == 1


def test_a_file_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    sink = LineFile(tmp_path / "no" / "such" / "folder.jsonl", 1000)
    log_lines(sink, 10)
    sink.close()
    assert not (tmp_path / "no").exists()
