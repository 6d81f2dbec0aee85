"""Where the time of running sequences goes on one worker: into the steps that gave them tokens, or between these.

1. With a sequence's first output here its account opens; the step of that one is told by who knows what came before;
2. each further output adds its step; the time since the one before, less that step, is a stall: it was preempted,
   frozen, or steps went by without it;
3. every REPORT_EVERY outputs, and with the last one, what has come together goes out with the output, as the stages
   `steps` and `stalls`. Together they are the time since the report before, by this process's clock;
4. accounts of sequences that left without a last output are dropped when there are many more than live ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.types import Key, TokenOutput

REPORT_EVERY = 32  # bounds what is never told of a worker that dies; the wire has a report for so many tokens
STEPS, STALLS = "steps", "stalls"


@dataclass(slots=True)
class _Account:
    """Since the last report."""

    since: float
    steps_s: float = 0.0
    num_outputs: int = 0


class StepAccount:
    """`is_live` says whether a key's sequence may still give outputs."""

    def __init__(self, is_live: Callable[[Key], bool]) -> None:
        self._is_live = is_live
        self._accounts: dict[Key, _Account] = {}
        self._max_accounts = 64

    def take(self, outputs: tuple[TokenOutput, ...], step_s: float, now: float) -> tuple[TokenOutput, ...]:
        """A step's outputs, with reports on those that are due. `step_s`: 0 where no step was computed."""
        return tuple(self._take(output, step_s, now) for output in outputs)

    def _take(self, output: TokenOutput, step_s: float, now: float) -> TokenOutput:
        account = self._accounts.get(output.key)
        if account is None:
            self._open(output, now)
            return output
        account.steps_s += step_s
        account.num_outputs += 1
        if output.finish is None and account.num_outputs < REPORT_EVERY:
            return output
        self._accounts.pop(output.key)
        if output.finish is None:
            self._accounts[output.key] = _Account(now)
        steps_s = min(account.steps_s, now - account.since)  # outputs may be read together, and late
        stages = ((STEPS, steps_s), (STALLS, now - account.since - steps_s))
        return replace(output, stages=(*output.stages, *stages))

    def _open(self, output: TokenOutput, now: float) -> None:
        if output.finish is not None or not output.token_ids:
            return
        if len(self._accounts) >= self._max_accounts:
            self._accounts = {key: one for key, one in self._accounts.items() if self._is_live(key)}
            self._max_accounts = 64 + 2 * len(self._accounts)
        self._accounts[output.key] = _Account(now)
