"""Feedback: what was observed, against what was predicted of the split that there was. Pure.

A pool that keeps fewer of its promises than predicted has more work than it seems to have; its bias, a factor on
demand, rises. It is an integrator with its windup kept out: nothing is added while a flip is under way or was of late,
while too few requests ended, or once the bias has reached its bound; and it leaks back to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.control.rules import ControllerConfig
from cluster.control.seen import LATE, ROOM, Seen
from cluster.control.sizing import NO_BIAS, Bias, Split

GAIN = 0.02  # for each tick, of the difference
LEAK = 0.005
LEAST, MOST = 0.8, 1.5


@dataclass(frozen=True, slots=True)
class Feedback:
    bias: Bias = NO_BIAS
    settles_at: float = 0.0

    def frozen(self, seen: Seen, rules: ControllerConfig) -> Feedback:
        """A flip is under way: what is observed until it has settled is not the split's."""
        return replace(self, settles_at=seen.now + rules.recent_s)

    def after(self, seen: Seen, split: Split, rules: ControllerConfig) -> Feedback:
        """`split`: what there was, as predicted."""
        fared = seen.fared_since(rules.recent_s)
        if seen.now < self.settles_at or len(fared) < rules.fewest:
            return self
        late = sum(one.refused in LATE or not (one.refused or one.ttft_kept) for one in fared) / len(fared)
        slow = sum(one.refused in ROOM or not (one.refused or one.tpot_kept) for one in fared) / len(fared)
        prefill = _moved(self.bias.prefill, late - (1 - split.prefill))
        decode = _moved(self.bias.decode, slow - split.prefill * (1 - split.decode))
        return replace(self, bias=Bias(prefill, decode))


def _moved(bias: float, difference: float) -> float:
    moved = bias + GAIN * difference - LEAK * (bias - 1)
    return min(MOST, max(LEAST, moved))


NO_FEEDBACK = Feedback()
