"""The forecast: how long prompts take on this worker, learnt from its own steps; what is refused by it. Pure.

Of a prompt that comes, so much is expected to be in the prefix cache as was of those before it. Where the chunks of a
step are bounded by those that decode beside them (engine/slack.py), a prompt takes what tokens took of late, beside
them; else what its own steps take.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.errors import Overloaded
from engine.pace import Pace
from engine.step_shape import StepRecord
from engine.types import UNBOUNDED, EngineStats
from prefill_worker.knee import Knee

CLEARLY = 1.15  # times the time that is left: what is predicted to take longer is late; predictions err by as much


@dataclass(slots=True, eq=False)
class Forecast:
    """`knee_tokens`: None where it is to be learnt."""

    prefill_chunk: int
    max_batch_tokens: int
    refuse_late: bool = True
    knee_tokens: int | None = None
    pace: Pace = field(default_factory=Pace)
    knee: Knee = field(default_factory=Knee)

    def learn(self, records: Iterable[StepRecord]) -> None:
        """Of steps with prompts, which are what is asked for here."""
        with_prompts = [record for record in records if record.shape.chunks]
        self.pace.learn_all(with_prompts)
        self.knee.learn(with_prompts)

    def compute_s(self, num_tokens: int, stats: EngineStats) -> float:
        """Of a prompt, with none before it. 0 as long as nothing was computed here."""
        found = stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0
        num_cached = min(int(num_tokens * found), num_tokens - 1)
        if stats.slack_tokens < UNBOUNDED:
            return (self.pace.token_s or 0.0) * (num_tokens - num_cached)
        return self.pace.prefill_s(num_tokens - num_cached, num_cached, self.prefill_chunk) or 0.0

    def step_tokens(self, stats: EngineStats) -> int:
        """Of prompts, that a step should have."""
        knee = self.knee_tokens or self.knee.tokens(self.max_batch_tokens)
        return max(1, min(knee, stats.slack_tokens))

    def check(self, ttft_s: float, before_s: float, compute_s: float) -> None:
        """Raises Overloaded if a first token would clearly be late for what goes before it. What would be late in any
        case is not refused, nor is what has no target."""
        late_s = before_s + compute_s - ttft_s
        if self.refuse_late and compute_s <= ttft_s and before_s + compute_s > CLEARLY * ttft_s:
            raise Overloaded(
                f"its first token would come after {before_s + compute_s:.3f} s, and is due in {ttft_s:.3f} s",
                retry_after_s=late_s,
            )
