"""What the prefix cache costs a step: hashing a prompt's blocks, looking them up, and taking blocks from a full cache.

    python -m benchmarks.prefix_cache [--quick] [--threads N] [--json FILE]

1. Caches of 1,000 to 1,000,000 blocks are filled with named blocks that nobody holds: every new block evicts one.
2. A prompt of 512 tokens is hashed; looked up where all its blocks are known, and where only the last is not; then its
   blocks are allocated, named and freed again.
3. The same run measures two steps of an engine with the default model: one that computes such a prompt, and one that
   decodes 16 streams, which needs one such block on average. Shares are of these.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from benchmarks.engine_sides import Ours, real_prompts
from benchmarks.report import Row, Target, machine, median, print_table, print_targets, target, write_json
from engine.block_manager import BlockManager, Holder, HolderKind
from engine.config import EngineConfig, ModelSource
from engine.prefix import extend_hashes, root_hash
from engine.setup import plan_engine
from engine.types import Key

SIZES = (1_000, 10_000, 100_000, 1_000_000)
JUDGED = 100_000  # blocks, where the target holds
BLOCK, PROMPT = 16, 512
KEY = bytes(16)
HOLDER = Holder(HolderKind.SEQUENCE, Key("benchmark", 0))


def main() -> None:
    options = _options()
    sizes = SIZES[:3] if options.quick else SIZES
    prefill_s, decode_s = step_times(options.threads)
    rows, targets = [], list[Target]()
    for size in sizes:
        hash_s, match_s, miss_s, take_s = cache_times(size, 20 if options.quick else 100)
        whole = hash_s + match_s + take_s
        per_block = (hash_s + match_s + take_s) / (PROMPT // BLOCK)
        shares = {"prefill": whole / prefill_s, "decode": per_block / decode_s}
        rows.append(_row(size, hash_s, match_s, miss_s, take_s, shares))
        if size == JUDGED:
            targets += [target("prefix_cache", f"share of a {name} step", share) for name, share in shares.items()]
    steps = f"prefill of {PROMPT} {1e3 * prefill_s:.0f} ms, decode of 16 {1e3 * decode_s:.1f} ms"
    print_table(f"{PROMPT} tokens in blocks of {BLOCK}; {steps}; {machine()}", rows)
    print_targets(targets)
    write_json(options.json, rows, targets)


def step_times(threads: int) -> tuple[float, float]:
    """Of a prompt and of 16 streams, in bfloat16."""
    config = EngineConfig(
        threads=threads, prefix_cache=False, num_blocks=1024, max_batch_tokens=PROMPT, prefill_chunk=PROMPT
    )
    setup = plan_engine(ModelSource(dtype="bfloat16"), config, hash_key=KEY)
    ours = Ours(setup)
    prompts, _ = real_prompts(setup, 16, PROMPT)
    ours.run(prompts[:1], 1)
    prefill = [ours.run(prompts[:1], 1).total_s for _ in range(5)]
    decode = [ours.run([prompt[:64] for prompt in prompts], 17).step_s for _ in range(3)]
    return median(prefill), median(decode)


def cache_times(size: int, rounds: int) -> tuple[float, float, float, float]:
    """Seconds, medians: to hash a prompt, to match all of it, to match all but its last block, to take its blocks."""
    blocks, root = BlockManager(size), root_hash(KEY, "benchmark")
    names = fill(blocks, size, root)
    num_blocks = PROMPT // BLOCK
    prompts = [[round_ * PROMPT + index for index in range(PROMPT)] for round_ in range(rounds)]
    known = names[-num_blocks:]
    hashed = [_timed(lambda prompt=prompt: hashes_of(prompt, root)) for prompt in prompts]
    matched = [_timed(lambda: blocks.match(known)) for _ in range(rounds)]
    missed = [_timed(lambda: blocks.match([*known[:-1], b"unknown"])) for _ in range(rounds)]
    assert len(blocks.match(known)) == num_blocks and len(blocks.match([*known[:-1], b"unknown"])) == num_blocks - 1
    taken = [_timed(lambda prompt=prompt: take(blocks, hashes_of(prompt, root))) for prompt in prompts]
    assert len(blocks.match(hashes_of(prompts[-1], root))) == num_blocks, "what came last is not there"
    assert blocks.num_available == size and blocks.num_leaked({}) == 0
    take_s = median(taken) - median(hashed)
    return median(hashed), median(matched), median(missed), take_s


def fill(blocks: BlockManager, size: int, root: bytes) -> list[bytes]:
    """Every block is cached under a name: the names, from the least to the most recently used."""
    names: list[bytes] = []
    extend_hashes(KEY, names, root, range(size * BLOCK), BLOCK)
    held = blocks.allocate(HOLDER, size)
    assert held is not None
    for block_id, name in zip(held, names, strict=True):
        blocks.name(block_id, name)
    blocks.free(HOLDER, held[::-1])  # the last of them is given back first
    blocks.take_changes()
    return names


def hashes_of(prompt: list[int], root: bytes) -> list[bytes]:
    names: list[bytes] = []
    extend_hashes(KEY, names, root, prompt, BLOCK)
    return names


def take(blocks: BlockManager, names: list[bytes]) -> None:
    """As a sequence does that computes a prompt which nobody had before: each block evicts another."""
    held = blocks.allocate(HOLDER, len(names))
    assert held is not None
    for block_id, name in zip(held, names, strict=True):
        blocks.name(block_id, name)
    blocks.free(HOLDER, held)
    blocks.take_changes()


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _row(size: int, hash_s: float, match_s: float, miss_s: float, take_s: float, shares: dict[str, float]) -> Row:
    times = {"hash": hash_s, "match": match_s, "match but one": miss_s, "allocate, name, free": take_s}
    row: Row = {"blocks": f"{size:,}", **{f"{name} us": f"{1e6 * one:.0f}" for name, one in times.items()}}
    return row | {f"of a {name} step": f"{share:.3%}" for name, share in shares.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100,000 blocks: under a minute")
    parser.add_argument("--threads", type=int, default=2, help="of the engine whose steps are measured")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
