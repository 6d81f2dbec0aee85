"""The plan of a profile: which prompts, contexts and batches are measured. Pure.

Bounded by what the model's context holds and by how fast the cluster showed itself to be, so that one round of it takes
half a minute on a slow one.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST = 16  # tokens
LONGEST = 16384
LONGEST_S = 5.0  # that computing the longest prompt may take
HOLD_S = 1.2  # that as many decode steps as the largest batch has sequences may take
BATCH_SIZES = (64, 32, 16, 8, 4, 2, 1)
SMALLEST_LARGEST = 8  # of batches, however slow the steps are


@dataclass(frozen=True, slots=True)
class Plan:
    """One round. `prompts`: lengths, computed one at a time; the longest is there for its beginnings to be used again:
    by `cached` prompts, (tokens of it, new tokens after them), and as the contexts of decode batches."""

    prompts: tuple[int, ...]
    cached: tuple[tuple[int, int], ...]
    contexts: tuple[int, ...]
    batch_sizes: tuple[int, ...]  # falling
    num_steps: int = 6  # of each batch size and context
    at_once: int = 64  # tokens of each of several prompts that come together
    beside: tuple[int, ...] = (64, 128, 256, 512)  # of prompts, one after the other in turn, while a batch decodes
    num_beside: int = 8  # of these
    batch_beside: int = 4  # sequences that decode meanwhile

    @property
    def longest(self) -> int:
        return self.prompts[-1]


def make_plan(max_context: int, prompt_token_s: float, decode_step_s: float) -> Plan:
    """`prompt_token_s`: of a prompt's token, and `decode_step_s`: of one sequence's step, as they were met so far."""
    longest = SHORTEST
    while 2 * longest <= min(LONGEST, max_context // 2, LONGEST_S / prompt_token_s):
        longest *= 2
    prompts = [longest >> halved for halved in range(longest.bit_length()) if longest >> halved >= SHORTEST]
    largest = max(SMALLEST_LARGEST, HOLD_S / decode_step_s)
    parts = [longest // 16, longest // 4, longest * 3 // 4]
    return Plan(
        prompts=tuple(sorted(prompts)),
        cached=tuple((part, max(1, longest // 16)) for part in parts),
        contexts=tuple(max(SHORTEST // 2, part) for part in parts),
        batch_sizes=tuple(size for size in BATCH_SIZES if size <= largest),
        beside=tuple(max(SHORTEST, longest // part) for part in (16, 8, 4, 2)),
    )
