"""A gateway's report to the controller: what came, how it fared, and how its workers stand. Plain records.

Times are of the gateway's own clock; `now` says what that was, so that a reader with another clock can shift them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.step_shape import Chunk, StepShape
from engine.types import Role
from router.arrivals import Arrived, Fared
from router.membership import Pool
from router.policies.snapshot import EngineLimits, Predictor, WorkerLoad

PROBED = (1024, 9216)  # tokens: between transfers of so many lies what one token takes
CONTEXTS = (64, 256, 1024, 4096, 16384, 65536)  # positions of one sequence at which steps are told
CHUNKS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # tokens of a prompt beside those that decode
BESIDE = (16, 1024)  # so many of these, with so many positions each
CHUNK_AFTER = 1024  # tokens of the same prompt


@dataclass(frozen=True, slots=True)
class StepTable:
    """How long a decode step of a pool takes, as predicted: `step_s[i][j]` of `sequences[i]` with `contexts[j]`
    positions each, and `added_s[k]` longer with `chunks[k]` tokens of a prompt beside a few. Between these it is
    linear."""

    sequences: tuple[int, ...]
    contexts: tuple[int, ...]
    step_s: tuple[tuple[float, ...], ...]
    chunks: tuple[int, ...] = (0, 1)
    added_s: tuple[float, ...] = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class WorkerStand:
    """One worker now. `queued_s`: until its prompts are done; `num_tokens`: stored by those that decode there."""

    worker_id: str
    incarnation: str
    cohort: str
    role: Role
    role_epoch: int
    takes_requests: bool
    queued_s: float
    num_decodes: int
    num_tokens: float
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int


@dataclass(frozen=True, slots=True)
class GatewayReport:
    """`steps`: of the decode steps of each cohort. `transfer_token_s`: that KV of one token takes on a link."""

    gateway_id: str
    now: float
    arrived: tuple[Arrived, ...]
    fared: tuple[Fared, ...]
    workers: tuple[WorkerStand, ...]
    steps: tuple[tuple[str, StepTable], ...]
    transfer_token_s: float
    block_size: int
    max_batch_seqs: int


@dataclass(frozen=True, slots=True)
class Times:
    """By what a gateway decides."""

    predictor: Predictor
    limits: EngineLimits


def gateway_report(
    gateway_id: str, now: float, arrived: tuple[Arrived, ...], fared: tuple[Fared, ...], loads: Sequence[WorkerLoad],
    times: Times,
) -> GatewayReport:  # fmt: skip
    cohorts = dict.fromkeys(load.member.cohort for load in loads)
    pools = [Pool(cohort, Role.DECODE) for cohort in cohorts]
    steps = tuple((pool.cohort, _step_table(times, pool)) for pool in pools)
    stands = tuple(_stand(load, now) for load in loads)
    limits = times.limits
    return GatewayReport(
        gateway_id, now, arrived, fared, stands, steps, _transfer_token_s(loads, times.predictor), limits.block_size,
        limits.max_batch_seqs,
    )  # fmt: skip


def _stand(load: WorkerLoad, now: float) -> WorkerStand:
    member, stats = load.member, load.stats
    num_decodes, num_tokens, _ = load.decodes.at(now)
    return WorkerStand(
        member.worker_id, member.incarnation, member.cohort, member.role, member.role_epoch, load.connected,
        max(load.prompts.left_s(now), stats.queued_s), max(num_decodes, stats.num_running), num_tokens,
        stats.num_blocks, stats.num_free_blocks, stats.num_cached_blocks,
    )  # fmt: skip


def _step_table(times: Times, pool: Pool) -> StepTable:
    most = times.limits.max_batch_seqs
    sequences = tuple(dict.fromkeys(min(2**power, most) for power in range(most.bit_length() + 1)))
    step_s = times.predictor.decode_step_s
    chunks = tuple(dict.fromkeys((0, *(size for size in CHUNKS if size < times.limits.prefill_chunk),
                                  times.limits.prefill_chunk)))  # fmt: skip
    num, context = BESIDE
    alone_s = step_s(pool, num, num * context)
    shapes = [StepShape((Chunk(CHUNK_AFTER, size),), num, num * context) for size in chunks[1:]]
    added_s = (0.0, *(max(0.0, times.predictor.step_s(pool, shape) - alone_s) for shape in shapes))
    return StepTable(
        sequences, CONTEXTS, tuple(tuple(step_s(pool, n, n * each) for each in CONTEXTS) for n in sequences), chunks,
        added_s,
    )  # fmt: skip


def _transfer_token_s(loads: Sequence[WorkerLoad], predictor: Predictor) -> float:
    """Between the first two of different roles; where all have one role, between the first two."""
    first = {load.member.role: load.member for load in reversed(loads)}
    if len(loads) < 2:
        return 0.0
    source, target = first.get(Role.PREFILL, loads[0].member), first.get(Role.DECODE, loads[1].member)
    if len(first) < len(Role):
        source, target = loads[0].member, loads[1].member
    times_s = [predictor.transfer_s(source.worker_id, target.worker_id, n * source.kv_token_bytes) for n in PROBED]
    return max(0.0, times_s[1] - times_s[0]) / (PROBED[1] - PROBED[0])
