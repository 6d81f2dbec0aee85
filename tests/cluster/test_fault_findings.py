"""What fault runs have found: each case broke a promise once, made as small as it could be."""

from __future__ import annotations

import pytest

from cluster.simulator.faults.case import Case
from cluster.simulator.faults.plan import Fault, FaultKind, How, Point, PointKind
from cluster.simulator.faults.run import run_case
from tests.cluster.fault_cases import asked, scenario

TWO_ANSWERS = (asked("r0", num_own=20, max_tokens=6, num_answers=2),)


def cancelled(answer: str, where: str, number: int) -> Fault:
    return Fault(Point(PointKind.TURN, where, number), FaultKind.CANCEL, answer, how=How.BY_GATEWAY)


FINDINGS = {
    # The decode side, which knew nothing of it, had the engine free the blocks that the other answer's lease is on.
    "the first of two answers ends during prefill": Case(
        scenario(TWO_ANSWERS), (cancelled("r0", "prefill-0", 3),)
    ),
    # Heard twice, the abort was taken for one of a sequence: the blocks went while the other's were pulled into them.
    "the first of two answers ends twice during its pull": Case(
        scenario(TWO_ANSWERS, bytes_per_s=5e7),
        (
            cancelled("r0", "decode-0", 8),
            Fault(Point(PointKind.MESSAGE, "gateway-0>decode-0", 1), FaultKind.DUPLICATE, for_s=0.002),
        ),
    ),
    # Prompt and growth were rounded up to blocks each: one more than there are, so every offer was refused for ever.
    "an answer takes the whole pool": Case(
        scenario((asked("r0", num_own=11, max_tokens=77),), block_size=8, num_blocks=11)
    ),
    # First tokens came between the loss and the next placement: then the second answer was placed by nobody.
    "decode dies while the first tokens of two answers are on their way": Case(
        scenario((asked("r0", num_own=13, max_tokens=8, num_answers=2),)),
        (
            Fault(
                Point(PointKind.MESSAGE, "prefill-0>gateway-0", 3),
                FaultKind.CRASH,
                "decode-0",
                for_s=1.0,
                how=How.UNLISTED,
            ),
        ),
    ),
    # The lease, shorter than the patience with an offer, ended in silence before its refusal came: nobody was told.
    "a refusal comes later than the lease lasts": Case(
        scenario(
            (asked("r2", at_s=0.01, num_own=12, max_tokens=12), asked("r3", at_s=0.015, num_own=12, max_tokens=12)),
            max_pulls=1,
        ),
        (Fault(Point(PointKind.MESSAGE, "decode-0>prefill-0", 0), FaultKind.CUT, "decode-0>prefill-0", for_s=5.5),),
    ),
    # It was computed and offered once more; those that had ended at decode were then never forgotten there.
    "a submission comes again when three of four answers have ended": Case(
        scenario((asked("r0", num_own=6, max_tokens=18, num_answers=4),), max_batch_seqs=3, step_s=0.005),
        (Fault(Point(PointKind.MESSAGE, "gateway-0>prefill-0", 1), FaultKind.DUPLICATE, for_s=0.12),),
    ),
    # Answers that had ended kept their seats in the gateway's book until the last one had: which waited for a seat.
    "four answers are placed again on a decode worker with two seats": Case(
        scenario(
            (asked("r0", num_own=6, max_tokens=17, num_answers=4),), block_size=2, num_blocks=66, max_batch_seqs=2
        ),
        (Fault(Point(PointKind.STEP, "decode-0", 13), FaultKind.CRASH, "decode-0", for_s=0.0146, how=How.UNLISTED),),
    ),
    # The abort came between the order to stand still and its answer: then a lease was granted on blocks that were free.
    "a client leaves while its request is about to stand still for a move": Case(
        scenario((asked("r2", num_own=26, max_tokens=20, leaves_after=13, moves_after=10),), num_decode=2), ()
    ),
    # It went to a worker whose stream had broken just before: nobody failed it there, and its tokens came to nobody.
    "a request moves while the gateway cannot hear the worker that it moves to": Case(
        scenario((asked("r6", num_own=20, max_tokens=60, moves_after=14),)),
        (Fault(Point(PointKind.STEP, "decode-0", 14), FaultKind.CUT, "decode-0>gateway-0", for_s=5.5,
               how=How.BOTH_WAYS),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("finding", FINDINGS)
def test_what_once_broke_a_promise_keeps_it(finding: str) -> None:
    assert run_case(FINDINGS[finding]).violation is None
