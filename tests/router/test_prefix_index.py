"""The index says of each worker what that worker has said, and names blocks as workers do."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from engine.prefix import extend_hashes, root_hash, short_names
from engine.types import CacheNews
from router.block_names import UNNAMED, BlockNames, Naming
from router.prefix_index import Name, PrefixIndex

A, B = ("a", "1"), ("b", "1")
WORKERS = st.sampled_from([A, B, ("a", "2"), ("c", "1")])
NAMES = st.lists(st.integers(0, 7), max_size=6).map(tuple)
NEWS = st.builds(CacheNews, NAMES, NAMES, st.booleans())
STEPS = st.lists(st.tuples(WORKERS, st.none() | NEWS), max_size=30)


def counted(known: dict[Name, set[int]], chain: Sequence[int]) -> dict[Name, int]:
    """The slow way."""
    counts = {}
    for worker, names in known.items():
        count = next((index for index, name in enumerate(chain) if name not in names), len(chain))
        counts |= {worker: count} if count else {}
    return counts


@given(STEPS, st.lists(st.integers(0, 7), unique=True, max_size=8))
def test_it_knows_what_workers_have_said(steps: list[tuple[Name, CacheNews | None]], chain: list[int]) -> None:
    index, known = PrefixIndex(), dict[Name, set[int]]()
    for worker, news in steps:
        if news is None:
            index.forget(worker)
            known.pop(worker, None)
        else:
            index.apply(worker, news)
            names = set() if news.anew else known.get(worker, set())
            known[worker] = (names | set(news.kept)) - set(news.lost)
        assert index.num_cached(chain) == counted(known, chain)
    assert index.num_names == len(set().union(*known.values()))


def test_nothing_is_left_of_workers_that_are_forgotten() -> None:
    index = PrefixIndex()
    for worker in (A, B):
        index.apply(worker, CacheNews((1, 2, 3)))
    index.apply(B, CacheNews((), (2,)))
    assert index.num_cached((1, 2, 3)) == {A: 3, B: 1}
    index.forget(A)
    index.forget(A)
    assert (index.num_names, index.num_cached((1, 2, 3))) == (2, {B: 1})
    index.forget(B)
    assert index.num_names == 0


@given(st.lists(st.integers(0, 99), max_size=60), st.lists(st.integers(0, 99), max_size=40), st.integers(1, 9))
def test_blocks_are_named_as_workers_name_them_also_piece_by_piece(
    prompt: list[int], more: list[int], block_size: int
) -> None:
    naming = Naming(block_size, b"key")
    names, hashes = BlockNames(naming, "tenant"), list[bytes]()
    for tokens in (prompt, prompt + more):
        extend_hashes(b"key", hashes, root_hash(b"key", "tenant"), tokens, block_size)
        assert tuple(names.of(tuple(tokens))) == short_names(hashes)
    other = BlockNames(naming, "another").of(tuple(prompt))
    assert not set(other) & set(short_names(hashes))
    assert BlockNames(UNNAMED, "").of(tuple(prompt)) == ()
