"""`steelyard report`: times that add up, and Amdahl's gains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.ledger_report import report, timelines
from engine.errors import InvalidRequest
from engine.types import FinishReason
from router.ledger import Ledger, Outcome
from router.ledger_log import LedgerLog

STAGES = {"prepare": 0.1, "route": 0.1, "prefill_queue": 0.3, "prefill": 1.5, "transfer": 0.2, "steps": 1.6}


class Lines(list[str]):
    def put(self, line: str) -> None:
        self.append(line)


def ledger_lines(count: int = 3) -> str:
    """Requests of 4, 8, 12... seconds with the same shares; 0.2 of 4 are nobody's."""
    lines = Lines()
    ledgers = LedgerLog(lambda: 5.0, lines)
    for scale in range(1, count + 1):
        ledger = Ledger(0.0)
        ledger.add_stages(tuple((name, scale * duration_s) for name, duration_s in STAGES.items()))
        ledger.sent(1, 2.0 * scale)
        ledger.close(4.0 * scale)
        ledgers.add(ledger, Outcome("r", FinishReason.STOP, 1, 0, 1))
    return "\n".join(lines)


def test_waiting_and_service_of_prefill_and_decode_add_up_to_the_whole() -> None:
    told = report(timelines(ledger_lines()))
    means = {one.name: one.mean_s for one in told.spreads}
    assert means == pytest.approx({"T": 8, "W_p": 0.8, "S_p": 3.2, "W_d": 0.4, "S_d": 3.2, "rest": 0.4, "TTFT": 4})
    assert means["T"] == pytest.approx(sum(means[name] for name in ("W_p", "S_p", "W_d", "S_d", "rest")))
    assert next(one.p50_s for one in told.spreads if one.name == "T") == pytest.approx(8)


def test_a_stage_of_two_fifths_that_takes_half_as_long_gives_a_quarter() -> None:
    told = report(timelines(ledger_lines()))
    assert sum(one.share for one in told.stages) == pytest.approx(1)
    assert (told.stages[0].stage, told.stages[0].share) == ("steps", pytest.approx(0.4))
    assert told.stages[0].gain == pytest.approx(1.25)


@pytest.mark.parametrize("text", ["", "no json", '{"timeline": 3}', '{"requests": 3}', '{"timeline": {"stages": 1}}'])
def test_what_is_no_ledger_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        report(timelines(text))


def test_the_command_reads_a_file_and_prints_tables_or_json(tmp_path: Path) -> None:
    path = tmp_path / "ledgers.jsonl"
    path.write_text(ledger_lines())
    tables = CliRunner().invoke(app, ["report", str(path)])
    assert tables.exit_code == 0
    assert "prefill_queue" in tables.output
    figures = CliRunner().invoke(app, ["report", str(path), "--json"])
    assert json.loads(figures.output)["num_requests"] == 3
    assert CliRunner().invoke(app, ["report", str(tmp_path / "none")]).exit_code == 2
