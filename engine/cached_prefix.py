"""The longest prefix of a sequence that can be used from the cache: pure, from names to a number of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.block_table import first_needed
from engine.planes import Group
from engine.prefix import group_name

IsKnown = Callable[[bytes], bool]


def longest_prefix(
    groups: Sequence[Group], block_size: int, hashes: Sequence[bytes], num_tokens: int, is_known: IsKnown
) -> int:
    """In blocks: the longest prefix after which all that the next token sees is known in every group. `num_tokens`: of
    the sequence, whose last token is computed in any case."""
    longest = len(hashes)
    runs: list[list[int]] = []  # of each windowed group: how many blocks up to each are known without a gap
    for number, group in enumerate(groups):
        names = [group_name(block_hash, number) for block_hash in hashes]
        if group.window is None:
            longest = next((index for index, name in enumerate(names[:longest]) if not is_known(name)), longest)
        else:
            runs.append(_runs(names, is_known))
    windowed = [group for group in groups if group.window is not None]
    for count in range(longest, 0, -1):
        computed = min(count * block_size, num_tokens - 1)
        needed = [count - first_needed(group, computed, block_size) for group in windowed]
        if all(run[count - 1] >= num for run, num in zip(runs, needed, strict=True)):
            return count
    return 0


def _runs(names: Sequence[bytes], is_known: IsKnown) -> list[int]:
    runs, run = [], 0
    for name in names:
        run = run + 1 if is_known(name) else 0
        runs.append(run)
    return runs
