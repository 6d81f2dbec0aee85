"""Clusters as the planner sees them: small records with sane numbers, to be made absurd one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.control.seen import Seen
from engine.types import Role
from router.arrivals import Arrived, Fared
from router.report import StepTable, WorkerStand

COHORT = "c"
PREFILL_TOKEN_S = 1e-4
STEP_S, SEQUENCE_S = 0.01, 2e-4


def table() -> StepTable:
    """A step takes longer by a little for each sequence, whatever their contexts."""
    sequences, contexts = (1, 2, 4, 8, 16, 32, 64, 128), (64, 1024, 16384)
    return StepTable(sequences, contexts, tuple(tuple(STEP_S + SEQUENCE_S * n for _ in contexts) for n in sequences))


def worker(name: str, role: Role, **fields: object) -> WorkerStand:
    values: dict[str, object] = {
        "incarnation": f"{name}.1", "queued_s": 0.0, "num_decodes": 0, "num_tokens": 0.0, "num_blocks": 4096,
        "num_free_blocks": 4096, "num_cached_blocks": 0,
    }  # fmt: skip
    return WorkerStand(worker_id=name, cohort=COHORT, role=role, role_epoch=0, takes_requests=True, **(values | fields))  # type: ignore[arg-type]


def pools(num_prefill: int, num_decode: int) -> list[WorkerStand]:
    prefill = [worker(f"w{index}", Role.PREFILL) for index in range(num_prefill)]
    return prefill + [worker(f"w{num_prefill + index}", Role.DECODE) for index in range(num_decode)]


def arrived(
    at: float, num_prompt: int = 1000, num_output: float = 100.0, ttft_s: float = 1.0, tpot_s: float = 0.03
) -> Arrived:
    return Arrived(at, num_prompt, 0, num_output, num_prompt * PREFILL_TOKEN_S, ttft_s, tpot_s)


def steady(rate: float, begin: float, end: float, **fields: float) -> tuple[Arrived, ...]:
    """Evenly."""
    count = math.floor((end - begin) * rate)
    return tuple(arrived(begin + index / rate, **fields) for index in range(count))  # type: ignore[arg-type]


def seen(now: float, workers: Sequence[WorkerStand], arrivals: Sequence[Arrived], **fields: object) -> Seen:
    values: dict[str, object] = {
        "reported_at": now, "fared": (), "tables": ((COHORT, table()),), "transfer_token_s": 0.0, "block_size": 16,
        "max_batch_seqs": 128,
    }  # fmt: skip
    return Seen(now=now, arrived=tuple(arrivals), workers=tuple(workers), **(values | fields))  # type: ignore[arg-type]


def refused(at: float, why: str, count: int) -> tuple[Fared, ...]:
    return tuple(Fared(at, why, False, True) for _ in range(count))
