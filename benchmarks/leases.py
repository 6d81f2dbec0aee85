"""Leases under overload: what is computed again because a lease ended, in the simulator. Virtual time: timings of this
machine play no part, and a seed always gives the same table.

    python -m benchmarks.leases [--quick] [--json FILE]

Two prefill and two decode workers, in three kinds of world: where prefill is what runs out, or decode's blocks, or
the links. Of each: its capacity, the highest rate at which all requests are answered and 99 % keep the targets (first
token within 2 s, then 50 ms per token); then 1, 2 and 3 times that rate, of requests that share nothing. Positions that
are computed again are counted by what lost them (cluster/simulator/recomputation.py), as part of those that were
computed once: the end of a lease, a refusal for lack of room, preemption, anything else. The last row is a control, and
no part of the target: one owner of leases is cut off, and the count must rise.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.report import Row, print_table, print_targets, target, write_json
from cluster.config import ClusterConfig
from cluster.simulator.log import EventLog
from cluster.simulator.network import LinkTimes
from cluster.simulator.planning.rates import highest_rate
from cluster.simulator.play import simulate
from cluster.simulator.recomputation import PREEMPTED
from cluster.simulator.report.summary import Targets, is_finished, keeps, quantile
from cluster.simulator.results import SimulationResult
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.world import World
from engine.errors import DeadlineExceeded, LeaseLost, Overloaded

SEED = 1
SECONDS, QUICK_SECONDS = 60.0, 20.0  # of arrivals, in virtual time
TRIAL_PART = 0.5  # of that, for a trial of the capacity's search
TARGETS = Targets(ttft_s=2.0, tpot_s=0.05)
ATTAINED = 0.99
FACTORS = (1, 2, 3)
ENGINE = {"num_blocks": 16384, "max_batch_tokens": 4096, "prefill_chunk": 2048, "max_batch_seqs": 128}
CUT_OFF_AT_S, CUT_OFF_S = 1.0, 2.0
CONTROL = "poisson:rate=2,prompt=6000,output=60,seconds=8"
SHORT_LEASE = {"lease_ttl_s": 1.0, "heartbeat_s": 0.4}  # ends before the gateway notices that its owner is cut off


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of world. `guess`: its capacity, about, in requests/s."""

    name: str
    lengths: str
    guess: float
    num_blocks: int = 16384
    gb_per_s: float = 25.0

    def spec(self, transfer: dict[str, float] | None = None, prefill_token_s: float = 1e-4) -> WorldSpec:
        config = ClusterConfig.model_validate(
            {
                "engine": ENGINE | {"num_blocks": self.num_blocks},
                "pools": {"prefill": {"workers": 2}, "decode": {"workers": 2}},
                "router": {"max_live_requests": 1024},
                "kv_transfer": transfer or {},
            }
        )
        links, steps = LinkTimes(bytes_per_s=self.gb_per_s * 1e9), Roofline(prefill_token_s=prefill_token_s)
        return WorldSpec(SEED, config, steps, links, plain=True, frame_bytes=2**25)


KINDS = (
    Kind("prefill", "prompt=lognormal:1500:0.8,output=lognormal:150:0.6,max_prompt=6000,max_output=600", 10),
    Kind("decode's blocks", "prompt=lognormal:400:0.8,output=lognormal:400:0.6,max_prompt=2000,max_output=1500", 15,
         num_blocks=2048),
    Kind("links", "prompt=lognormal:1500:0.8,output=lognormal:150:0.6,max_prompt=6000,max_output=600", 6,
         gb_per_s=1.0),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS:g} s of arrivals instead of {SECONDS:g}")
    parser.add_argument("--json", metavar="FILE", help="write rows and target there too")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # of offers that are refused
    seconds = QUICK_SECONDS if options.quick else SECONDS
    rows: list[Row] = []
    shares: list[float] = []
    for kind in KINDS:
        capacity = highest_rate(lambda rate, kind=kind: _has_room(kind, rate, TRIAL_PART * seconds), kind.guess)
        assert capacity, f"{kind.name}: no rate keeps the targets"
        for factor in FACTORS:
            row, share = _row(f"{kind.name} x{factor}", kind.spec(), _source(kind, factor * capacity, seconds))
            rows.append({"what runs out": row.pop("name"), "rate/s": round(factor * capacity, 1)} | row)
            shares += [share] if factor == max(FACTORS) else []
    control, share = _row("control", KINDS[0].spec(SHORT_LEASE, prefill_token_s=2e-4), CONTROL, _cut_off)
    assert share > 0, "the leases of an owner that is cut off end, and this is seen"
    rows.append({"what runs out": control.pop("name"), "rate/s": 2.0} | control)
    print_table("computed again, as part of what was computed once, by what lost it", rows)
    promised = [target("leases", "recomputed for an ended lease", max(shares))]
    print_targets(promised)
    write_json(options.json, rows, promised)


def _source(kind: Kind, rate: float, seconds: float) -> str:
    return f"poisson:rate={rate:.6g},seconds={seconds:g},{kind.lengths}"


def _has_room(kind: Kind, rate: float, seconds: float) -> bool:
    result, _ = _play(kind.spec(), _source(kind, rate, seconds))
    num_kept = sum(keeps(request, TARGETS) for request in result.requests)
    return all(map(is_finished, result.requests)) and num_kept >= ATTAINED * len(result.requests)


def _cut_off(world: World) -> None:
    """One decode worker is reachable by nobody for a while, and reaches nobody."""
    loop, port = asyncio.get_running_loop(), world.workers["decode-1"].port
    loop.call_later(CUT_OFF_AT_S, world.network.silence, port)
    loop.call_later(CUT_OFF_AT_S + CUT_OFF_S, world.network.restore, port)


# --- one run ----------------------------------------------------------------------------------------------------


def _row(
    name: str, spec: WorldSpec, source: str, act: Callable[[World], None] = lambda _world: None
) -> tuple[Row, float]:
    """With the share that was computed again because a lease ended."""
    result, world = _play(spec, source, act)
    _check(result, world)
    again, requests = dict(result.recomputed), result.requests
    lease, room, preempted = (again.pop(cause, 0) for cause in (LeaseLost.code, Overloaded.code, PREEMPTED))
    ttfts = [request.ttft_s for request in requests if request.ttft_s is not None]
    row: Row = {
        "name": name, "requests": len(requests), "answered": sum(map(is_finished, requests)),
        "TTFT P50 s": round(quantile(ttfts, 0.5) or 0.0, 2), "P99 s": round(quantile(ttfts, 0.99) or 0.0, 2),
        "kilotokens": round(result.num_computed / 1e3),
        **{cause: f"{count / result.num_computed:.2%}" for cause, count in
           (("lease ended", lease), ("refused", room), ("preempted", preempted), ("other", sum(again.values())))},
        "placed again": sum(count for _, count in world.dispatcher.retries),
    }  # fmt: skip
    return row, lease / result.num_computed


def _play(
    spec: WorldSpec, source: str, act: Callable[[World], None] = lambda _world: None
) -> tuple[SimulationResult, World]:
    worlds: list[World] = []

    def start(world: World) -> None:
        worlds.append(world)
        act(world)

    workload = load_workload(source, SEED)
    result = simulate(spec, workload, EventLog(keep=False, detailed=False), on_start=start)
    return result, worlds[0]


def _check(result: SimulationResult, world: World) -> None:
    """Is what was measured what it is said to be?"""
    requests = result.requests
    for request in requests:
        honest = request.error in (Overloaded.code, DeadlineExceeded.code)
        assert honest if request.error else is_finished(request), f"{request} has neither an answer nor a reason"
    stats = [worker.engine.stats() for worker in world.all_workers]
    assert not sum(one.num_leaked_blocks for one in stats), "no block is lost"
    answered = sum(request.num_prompt for request in requests if is_finished(request))
    begun = sum(request.num_prompt for request in requests)
    retries = sum(count for _, count in world.dispatcher.retries) + sum(one.num_preemptions for one in stats)
    # One that is computed again may have a generated token at its end, which was never computed before.
    assert answered <= result.num_computed <= begun + retries, "each position is first computed once"


if __name__ == "__main__":
    main()
