"""How long each step of a cluster's end may take. Every limit holds those inside it, so that none cuts another short.

1. The gateway drains, its last requests are aborted on the workers, its connections close.
2. Then the workers end, all at once; 3. then whatever still carries the cluster's names is cleared away.
A process that has not ended within its limit is killed, which the step around it leaves time for.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.config import RouterConfig

ANSWER_ENDS_S = 2.0  # for clients to take the ends of their answers
SERVER_S = 2.0  # for the HTTP server's loops to see that it ends, and for channels to close
WORKER_S = 2.0
KILL_S = 1.0
KEEPERS_S = 1.0
SWEEP_S = 5.0


@dataclass(frozen=True, slots=True)
class EndLimits:
    """`gateway_s` and `worker_s`: what a process may take to end by itself."""

    gateway_s: float
    worker_s: float = WORKER_S

    @property
    def gateway_step_s(self) -> float:
        return self.gateway_s + KILL_S

    @property
    def worker_step_s(self) -> float:
        return self.worker_s + KILL_S

    @property
    def total_s(self) -> float:
        return KEEPERS_S + self.gateway_step_s + self.worker_step_s + SWEEP_S


def end_limits(router: RouterConfig) -> EndLimits:
    """Aborts are control calls, all at once: they take no longer than one."""
    return EndLimits(gateway_s=router.drain_s + router.rpc_timeout_s + ANSWER_ENDS_S + SERVER_S)
