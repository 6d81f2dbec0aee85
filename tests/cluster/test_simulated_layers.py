"""Layers that leave while their step is computed, in the simulator: what is hidden, the same tokens, the same log."""

from __future__ import annotations

from collections import Counter
from contextlib import aclosing

import pytest

from cluster.simulator.chance import Chance
from cluster.simulator.log import EventLog
from cluster.simulator.spec import WorldSpec
from cluster.simulator.world import World
from engine.types import KvTransfer
from tests.cluster.test_simulator import config, drive_load, play, request


def transfer_of(tells_layers: bool, num_prompt: int) -> KvTransfer:
    spec, found = WorldSpec(seed=1, config=config(), tells_layers=tells_layers), list[KvTransfer]()
    asked = request(num_prompt=num_prompt)

    async def scenario(world: World) -> None:
        async with aclosing(world.generate(asked)) as outputs:
            seen = [output async for output in outputs]
        assert tuple(token for output in seen for token in output.token_ids) == spec.weights.continuation(asked)
        found.extend(output.transfer for output in seen if output.transfer is not None)

    play(spec, scenario)
    (transfer,) = found
    return transfer


def test_of_a_prompt_of_one_step_the_first_half_of_the_layers_is_hidden() -> None:
    whole, layered = transfer_of(False, 100), transfer_of(True, 100)
    assert (whole.hidden_share, layered.hidden_share) == (0.0, 0.5)
    assert layered.size_bytes == whole.size_bytes
    assert layered.exposed_s < whole.exposed_s == whole.transfer_s


def test_of_a_prompt_of_three_steps_only_half_of_the_last_one_is_seen() -> None:
    """Chunks of 128, 128 and 44 tokens in blocks of 16."""
    assert transfer_of(False, 300).hidden_share == pytest.approx(16 / 19)
    assert transfer_of(True, 300).hidden_share == pytest.approx(17.5 / 19)


def log_of(seed: int) -> EventLog:
    spec = WorldSpec(seed, config(2, 2, num_blocks=64), eos_every=100, tells_layers=True)

    async def scenario(world: World) -> None:
        await drive_load(world, Chance(seed, "load"), 60, Counter[str]())

    return play(spec, scenario)


def test_under_load_tokens_are_right_and_two_runs_are_one() -> None:
    assert log_of(3).to_bytes() == log_of(3).to_bytes()
