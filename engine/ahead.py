"""A step that can be launched before the tokens of the one before it are known.

Which sequences it holds, and where each stores its next position, follows from the step before, if all of them go on;
only the tokens themselves are missing, and these the device has. A sequence that turns out to have ended has then been
computed once too often: it stored into a block that is given to nobody before that step, and what was chosen for it is
dropped (engine/engine.py). Where a new block evicts another that the host tier keeps, that is copied when the step
under way has ended.
"""

from __future__ import annotations

from dataclasses import replace

from engine.scheduler import Batch, Scheduled, Scheduler


def follow(scheduler: Scheduler, batch: Batch, max_context: int) -> Batch | None:
    """What follows `batch`, which is being computed, with its blocks allocated; None where that is still open: somebody
    waits, a prompt is under way, a sequence has ended or is at its last token, blocks are short."""
    items = batch.scheduled
    if scheduler.waiting or scheduler.holdings.copies or scheduler.limits.lookahead:
        return None
    if len(items) != len(scheduler.running) or not all(_goes_on(item, max_context) for item in items):
        return None
    if not all(scheduler.holdings.extend(item.sequence, item.start + 2) for item in items):
        return None
    return Batch(tuple(replace(item, start=item.start + 1) for item in items))


def _goes_on(item: Scheduled, max_context: int) -> bool:
    """Does it decode, and is the token that is being computed not its last by count?"""
    sequence, num_known = item.sequence, item.start + 2
    if not sequence.tables or not sequence.is_decoding or sequence.handoff or sequence.is_joint:
        return False
    return num_known < min(max_context, sequence.num_prompt + sequence.request.sampling.max_tokens)
