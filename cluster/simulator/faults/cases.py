"""The cases of seeds: which scenario, and which faults in it.

PLANS_PER_SCENARIO successive seeds share a scenario. The first of them is the scenario without faults, which also
counts its points; the plans of the others are drawn over these.
"""

from __future__ import annotations

from cluster.simulator.faults.case import Case
from cluster.simulator.faults.drawing import draw_plan
from cluster.simulator.faults.points import Census
from cluster.simulator.faults.run import run_case
from cluster.simulator.faults.scenario import draw_scenario

PLANS_PER_SCENARIO = 8


class Cases:
    """Keeps the last scenario's census, for the seeds that come next."""

    def __init__(self) -> None:
        self._census: dict[int, Census] = {}

    def of(self, seed: int) -> Case:
        number, nth = divmod(seed, PLANS_PER_SCENARIO)
        scenario = draw_scenario(number)
        if not nth:
            return Case(scenario)
        if number not in self._census:
            self._census = {number: run_case(Case(scenario)).census}
        return Case(scenario, draw_plan(seed, scenario, self._census[number]))
