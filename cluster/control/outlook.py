"""Outlook: what one cohort of workers is about to be asked for, and what it would attain with any number of them. Pure.

Demand is that of the last seconds and that which is forecast a horizon ahead; in need what there is counts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.control.demand import Demand
from cluster.control.forecast import Forecast
from cluster.control.rules import ControllerConfig
from cluster.control.seen import Need, Seen, need_of
from cluster.control.sizing import Bias, Machine, Split, over_horizon, splits, together
from engine.types import Role

RATE, COMPUTE, OUTPUT = range(3)  # the series that are forecast


@dataclass(frozen=True, slots=True)
class Outlook:
    """`present` and `ahead`: the cohort's share of demand."""

    machine: Machine
    present: Demand
    ahead: Demand
    need: Need
    may_join: bool  # may all serve both phases?

    @property
    def demand(self) -> Demand:
        """The larger of both."""
        return max(self.present, self.ahead, key=lambda one: one.rate)

    def rated_now(self, num_workers: int, bias: Bias, times: float = 1.0) -> list[Split]:
        """All splits of so many workers, for so many times the demand of now."""
        return self._rated(self.present, num_workers, bias, times)

    def rated(self, num_workers: int, bias: Bias, times: float = 1.0, now: Sequence[Split] = ()) -> list[Split]:
        """The same over the horizon; `now`: if that is known already."""
        now = now or self.rated_now(num_workers, bias, times)
        return over_horizon(now, self._rated(self.ahead, num_workers, bias, times))

    def _rated(self, demand: Demand, num_workers: int, bias: Bias, times: float) -> list[Split]:
        demand = replace(demand, rate=demand.rate * times)
        without = [together(demand, self.machine, num_workers, bias)] if self.may_join else []
        return [*without, *splits(demand, self.machine, num_workers, bias)]


def outlook_of(
    seen: Seen, series: Sequence[Forecast], cohort: str, rules: ControllerConfig, fewest: int
) -> Outlook | None:  # fmt: skip
    """None: too little came to judge by, or nobody has said yet what a worker can do."""
    workers = seen.workers_of(cohort)
    machine, share = seen.machine(cohort), len(workers) / max(1, seen.num_workers)
    window = seen.demand(rules.window_s)
    if machine is None or window is None or seen.num_arrived(rules.window_s) < fewest:
        return None
    if (count := seen.num_arrived(rules.window_s)) < rules.fewest:  # the time since the first of a few says little
        window = replace(window, rate=min(window.rate, count / rules.window_s))
    need = need_of(seen, workers, rules)
    if need is Need.DECODE and all(worker.role is not Role.PREFILL for worker in workers):
        need = Need.NONE  # nobody could be given to it
    present, ahead = (replace(one, rate=one.rate * share) for one in _demands(seen, series, rules, window, need))
    return Outlook(machine, present, ahead, need, rules.together)


def _demands(
    seen: Seen, series: Sequence[Forecast], rules: ControllerConfig, window: Demand, need: Need
) -> tuple[Demand, Demand]:
    """What there is, by the last seconds if these tell enough, and what is forecast a horizon ahead."""
    recent = seen.demand(rules.recent_s)
    if recent is None or seen.num_arrived(rules.recent_s) < rules.fewest:
        recent = window
    recent = replace(recent, burstiness=window.burstiness)
    if need is not Need.NONE:
        return recent, recent
    ahead = [forecast.ahead() for forecast in series]
    rate = window.rate if ahead[RATE] is None else ahead[RATE]
    compute = _ratio(ahead[COMPUTE], window.compute_s)
    output = _ratio(ahead[OUTPUT], window.num_output)
    return recent, window.scaled(rate or 0.0, compute, output)


def _ratio(ahead: float | None, seen: float) -> float:
    """Of lengths forecast to lengths seen, within what is sane."""
    return min(4.0, max(0.25, ahead / seen)) if ahead is not None and ahead > 0 and seen > 0 else 1.0
