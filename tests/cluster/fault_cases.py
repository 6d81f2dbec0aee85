"""Small cases for tests of fault runs."""

from __future__ import annotations

from dataclasses import replace

from cluster.simulator.faults.scenario import Asked, Scenario

ASKED = Asked("r0", at_s=0.0, family=0, num_shared=0, num_own=20, max_tokens=6)


def asked(name: str, **changed: object) -> Asked:
    return replace(ASKED, name=name, **changed)


def scenario(requests: tuple[Asked, ...] = (ASKED,), **changed: object) -> Scenario:
    """One worker of each role with room for all; a step takes 21 ms."""
    plain = Scenario(
        seed=1, num_prefill=1, num_decode=1, block_size=4, num_blocks=40, max_batch_tokens=36, prefill_chunk=20,
        max_batch_seqs=4, max_pulls=4, prefix_cache=True, eos_every=0, lease_ttl_s=3.0, step_s=0.02, bytes_per_s=3e9,
        requests=requests,
    )  # fmt: skip
    return replace(plain, **changed)
