"""Config model of the prefill side of a worker (pydantic: from YAML)."""

from __future__ import annotations

from pydantic import Field

from engine.config import EngineConfig, StrictModel
from prefill_worker.queue import QueueRules


class PrefillConfig(StrictModel):
    """When prefill starts a request, and when it refuses one."""

    outbox_fraction: float = Field(
        default=0.3, gt=0, le=1, description="no request starts while unclaimed blocks exceed this part"
    )
    fetch_prefixes: bool = Field(
        default=True, description="copy a prompt's prefix from the worker that has it, where that beats computing it"
    )
    max_queue: int = Field(default=1024, ge=1, description="requests waiting for prefill; more are refused")
    refuse_late: bool = Field(
        default=True, description="refuse a request whose first token the queue would make late, for another worker"
    )
    default_ttft_s: float = Field(
        default=2.0, gt=0, description="how urgent a request without a target for its first token is"
    )
    oldest_every: int = Field(default=8, ge=2, description="one start in so many is that of the oldest request")
    fairness_tokens: int = Field(
        default=1024, ge=0, description="what a tenant may be served more than another that waits"
    )
    prompt_weight: float = Field(default=1.0, ge=0, description="what a prompt's token counts for a tenant")
    output_weight: float = Field(default=2.0, ge=0, description="what a generated token counts for a tenant")
    knee_tokens: int | None = Field(
        default=None, ge=1, description="prompt tokens of a step, where more make none cheaper; null: learnt"
    )

    def queue_rules(self, engine: EngineConfig) -> QueueRules:
        return QueueRules(
            self.max_queue, self.outbox_fraction, self.default_ttft_s, self.oldest_every, self.fairness_tokens,
            self.prompt_weight, self.output_weight,
            engine.prefill_chunk, engine.max_batch_tokens, engine.max_batch_seqs,
        )  # fmt: skip
