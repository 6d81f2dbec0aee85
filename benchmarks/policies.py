"""Policies under load, in the simulator: which keep the targets, of how many requests. Virtual time: timings of this
machine play no part, and a seed always gives the same table.

    python -m benchmarks.policies [--quick] [--json FILE]

Two prefill and two decode workers, Poisson arrivals, mixed lengths, the same arrivals for every policy. Targets: the
first token within 1.5 s (a prompt of mean length takes 0.15 s alone, the longest 0.6 s), then 15 ms per token (6 ms
alone). Capacity is the highest rate at which the best of the policies that refuse nobody keeps the targets of 90 %. A
refused request has not kept its targets, and does not come back. Goodput: requests with their targets kept, per second.
Workers refuse late prompts under `slo` alone: they have the last word of that policy, and of no other.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass

from benchmarks.report import Row, Target, print_table, print_targets, target, write_json
from cluster.config import ClusterConfig
from cluster.simulator.log import EventLog
from cluster.simulator.network import LinkTimes
from cluster.simulator.planning.rates import highest_rate
from cluster.simulator.play import simulate
from cluster.simulator.report.summary import Targets, keeps, known, quantile
from cluster.simulator.results import RequestResult, SimulationResult
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.load import load_workload
from engine.errors import Overloaded
from router.policies import POLICIES, PolicyName

SEED = 1
SECONDS, QUICK_SECONDS = 60.0, 10.0  # of arrivals, in virtual time
TARGETS = Targets(ttft_s=1.5, tpot_s=0.015)
ATTAINED = 0.9
LOADS, QUICK_LOADS = (0.5, 0.8, 1.0, 1.5, 2.0), (0.8, 1.0, 2.0)
REFUSING: tuple[PolicyName, ...] = ("mooncake", "slo")
LENGTHS = "prompt=lognormal:1500:0.8,output=lognormal:150:0.6,max_prompt=6000,max_output=600"
GUESS = 13.0  # the capacity, about, in requests/s; --quick takes it as it is
ENGINE = {
    "num_blocks": 16384, "max_batch_tokens": 4096, "prefill_chunk": 2048, "max_batch_seqs": 128,
}  # fmt: skip
STEPS = Roofline(prefill_token_s=1e-4, decode_sequence_s=4e-4)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one policy at one load."""

    policy: PolicyName
    load: float
    requests: tuple[RequestResult, ...]
    span_s: float

    @property
    def num_kept(self) -> int:
        return sum(keeps(request, TARGETS) for request in self.requests)

    @property
    def num_refused(self) -> int:
        return sum(request.error == Overloaded.code for request in self.requests)

    @property
    def refused(self) -> float:
        return self.num_refused / len(self.requests)

    @property
    def attained(self) -> float:
        """Of those that were admitted."""
        return self.num_kept / max(1, len(self.requests) - self.num_refused)

    @property
    def goodput(self) -> float:
        return self.num_kept / self.span_s

    def row(self) -> Row:
        ttfts = known([request.ttft_s for request in self.requests])
        tpots = known([request.tpot_s for request in self.requests])
        return {
            "load": self.load, "policy": self.policy, "requests": len(self.requests), "refused": f"{self.refused:.1%}",
            "kept, of admitted": f"{self.attained:.1%}", "of all": f"{self.num_kept / len(self.requests):.1%}",
            "goodput/s": round(self.goodput, 2),
            **{f"TTFT {name} s": round(quantile(ttfts, part) or 0.0, 2) for name, part in PARTS},
            **{f"TPOT {name} ms": round(1e3 * (quantile(tpots, part) or 0.0), 1) for name, part in PARTS},
        }  # fmt: skip


PARTS = (("P50", 0.5), ("P90", 0.9), ("P99", 0.99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS:g} s of arrivals, fewer loads, no search")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    seconds, loads = (QUICK_SECONDS, QUICK_LOADS) if options.quick else (SECONDS, LOADS)
    capacity = GUESS if options.quick else capacity_of(seconds)
    outcomes = [outcome(policy, load, load * capacity, seconds) for load in loads for policy in POLICIES]
    rows = [one.row() for one in outcomes]
    print_table(f"policies at parts of the capacity, {capacity:.2f} requests/s", rows)
    promised = promises(outcomes)
    print_targets(promised)
    write_json(options.json, rows, promised)


def capacity_of(seconds: float) -> float:
    """The highest rate at which some policy that refuses nobody keeps the targets of ATTAINED."""
    patient: list[PolicyName] = [policy for policy in reversed(POLICIES) if policy not in REFUSING]

    def is_kept(rate: float) -> bool:
        return any(outcome(policy, 1.0, rate, seconds).attained >= ATTAINED for policy in patient)

    return highest_rate(is_kept, GUESS)


def outcome(policy: PolicyName, load: float, rate: float, seconds: float) -> Outcome:
    workload = load_workload(f"poisson:rate={rate:.6g},seconds={seconds:g},{LENGTHS}", SEED)
    result = play(policy, f"poisson:rate={rate:.6g},seconds={seconds:g},{LENGTHS}")
    return Outcome(policy, load, result.requests, workload.span_s)


def play(policy: PolicyName, source: str) -> SimulationResult:
    config = ClusterConfig.model_validate(
        {
            "engine": ENGINE,
            "pools": {"prefill": {"workers": 2}, "decode": {"workers": 2}},
            "router": {
                "policy": policy, "ttft_s": TARGETS.ttft_s, "tpot_s": TARGETS.tpot_s, "max_live_requests": 10**6,
            },
            "prefill": {"refuse_late": policy == "slo"},
        }
    )  # fmt: skip
    spec = WorldSpec(SEED, config, STEPS, LinkTimes(bytes_per_s=25e9), plain=True, frame_bytes=2**25)
    return simulate(spec, load_workload(source, SEED), EventLog(keep=False, detailed=False))


def promises(outcomes: list[Outcome]) -> list[Target]:
    """What `slo` is held to, beside the best at capacity of those that refuse nobody."""
    ours = {one.load: one for one in outcomes if one.policy == "slo"}
    best = max(one.goodput for one in outcomes if one.load == 1.0 and one.policy not in REFUSING)
    over = {load: one.goodput / best for load, one in ours.items()}
    return [
        target("policies", "kept, of admitted", min(one.attained for one in ours.values())),
        target("policies", "refused at 0.5 and 0.8", max(one.refused for one in ours.values() if one.load < 1)),
        target("policies", "goodput at 1.0", over[1.0]),
        target("policies", "goodput beyond", min(over[load] for load in over if load > 1)),
    ]


if __name__ == "__main__":
    main()
