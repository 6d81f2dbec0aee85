"""The predictor: how long steps, prompts and transfers will take, learnt from what workers report.

1. before any record a guess; 2. `calibrate` takes what a worker measured when it started; 3. `learn` takes every step
that a gateway hears of, after its prediction of it has been judged; 4. `learn_transfer` the same of transfers.

Steps are learnt by pool (cohort and role): roles may have other machines and other numbers of ranks, and the host of
one is busy in another way. A step that only decodes is bound by memory, one with chunks by arithmetic: each kind has a
fit of its own, so that what one learns does not unlearn the other. The measured times have the interference of
neighbours in them, and so have the predictions. A step after idleness counts: under light load every prompt meets one.
It knows no clock: times come with the records.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.step_shape import StepRecord, StepShape
from engine.types import KvTransfer, TransferReport
from router.fit import Fit
from router.membership import Member, Pool
from router.prediction_error import Prediction, PredictionError, PredictionErrors
from router.transfer_times import TransferTimes

NUM_COLD = 4  # steps at the begin of a life that do not count
TOKENS, PAIRS, SEQUENCES, CONTEXT = 256, 2**16, 16, 2**13  # what a feature of 1 stands for
DECODE_PRIOR = (0.01, 0.01, 0.01)  # s: a step, 16 sequences, 8192 positions
PREFILL_PRIOR = (0.01, 0.1, 0.01, 0.01, 0.01)  # s: a step, 256 tokens, 2**16 pairs, and as above


class _StepTimes:
    """Of one pool."""

    def __init__(self) -> None:
        self.decode = Fit(DECODE_PRIOR)
        self.prefill = Fit(PREFILL_PRIOR)
        self.calibrated = False

    def fit_of(self, shape: StepShape) -> tuple[Fit, tuple[float, ...]]:
        load = shape.num_decoding / SEQUENCES, shape.num_context / CONTEXT
        if not shape.chunks:
            return self.decode, (1.0, *load)
        num_pairs = sum(chunk.num_new * (chunk.num_new + 2 * chunk.num_before) for chunk in shape.chunks)
        return self.prefill, (1.0, shape.num_chunk_tokens / TOKENS, num_pairs / PAIRS, *load)

    def step_s(self, shape: StepShape) -> float:
        fit, features = self.fit_of(shape)
        return fit.predict(features)

    def learn(self, record: StepRecord) -> None:
        fit, features = self.fit_of(record.shape)
        fit.learn(features, record.step_s)


class Predictor:
    """Of all pools that a gateway knows."""

    def __init__(self) -> None:
        self._pools: dict[Pool, _StepTimes] = {}
        self._num_steps: dict[tuple[str, str], int] = {}  # by worker id and incarnation
        self._transfers = TransferTimes()
        self.errors = PredictionErrors()

    # --- predictions ---------------------------------------------------------------------------------------

    def step_s(self, pool: Pool, shape: StepShape) -> float:
        """Seconds of one step; 0 of an empty one."""
        if not shape.chunks:
            return self.decode_step_s(pool, shape.num_decoding, shape.num_context)
        return self._pool(pool).step_s(shape)

    def prefill_s(self, pool: Pool, num_new: int, num_cached: int, chunk: int) -> float:
        """Seconds of the steps that compute `num_new` tokens after `num_cached`, `chunk` at a time, with nothing
        beside them. Costs the same for any length."""
        if num_new <= 0:
            return 0.0
        num_pairs = num_new * (num_new + 2 * num_cached)  # of all chunks together: their squares telescope
        features = (-(-num_new // chunk), num_new / TOKENS, num_pairs / PAIRS, 0.0, 0.0)
        return self._pool(pool).prefill.predict(features)

    def decode_step_s(self, pool: Pool, num_sequences: int, num_context: int) -> float:
        """Seconds of a step of so many sequences, which read `num_context` positions together."""
        if not num_sequences:
            return 0.0
        return self._pool(pool).decode.predict((1.0, num_sequences / SEQUENCES, num_context / CONTEXT))

    def transfer_s(self, source: str, target: str, size_bytes: int) -> float:
        """Seconds until KV of so many bytes, none of which has moved yet, is adopted. Both ends are worker ids."""
        return self._transfers.transfer_s(source, target, size_bytes)

    # --- what has happened ---------------------------------------------------------------------------------

    def calibrate(self, pool: Pool, records: Iterable[StepRecord]) -> None:
        """What a worker measured when it started. A pool's first counts; later ones know less than its steps do."""
        times, listed = self._pool(pool), tuple(records)
        if not listed or times.calibrated:
            return
        times.calibrated = True
        for record in listed:
            times.learn(record)

    def learn(self, member: Member, records: Iterable[StepRecord]) -> None:
        """Judge the predictions of these steps, then learn from them."""
        times, life = self._pool(member.pool), (member.worker_id, member.incarnation)
        for record in records:
            count = self._num_steps[life] = self._num_steps.get(life, 0) + 1
            if count <= NUM_COLD:
                continue
            kind = Prediction.PREFILL if record.shape.chunks else Prediction.DECODE
            self.errors.add(kind, times.step_s(record.shape), record.step_s)
            times.learn(record)

    def learn_transfer(self, source: str, target: str, transfer: KvTransfer) -> None:
        """The same of a transfer from worker to worker."""
        num_left = transfer.size_bytes - transfer.hidden_bytes
        self.errors.add(Prediction.TRANSFER, self.transfer_s(source, target, num_left), transfer.exposed_s)
        self._transfers.learn(source, target, transfer)

    def hear_paths(self, target: str, report: TransferReport) -> None:
        """How fast KV comes to this worker, as it has measured."""
        self._transfers.hear(target, report)

    def judge_ttft(self, predicted_s: float, measured_s: float) -> None:
        """Of one placement: what was foretold, and what came."""
        self.errors.add(Prediction.TTFT, predicted_s, measured_s)

    def forget(self, worker_id: str, incarnation: str) -> None:
        """A life is over. What was learnt of its pool stays."""
        self._num_steps.pop((worker_id, incarnation), None)
        self._transfers.forget(worker_id)

    def view(self) -> tuple[PredictionError, ...]:
        return self.errors.view()

    def _pool(self, pool: Pool) -> _StepTimes:
        times = self._pools.get(pool)
        if times is None:
            times = self._pools[pool] = _StepTimes()
        return times
