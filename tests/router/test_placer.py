"""Admission at the gateway: who waits for room, who is called, and who is told to come back."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from engine.errors import Overloaded
from engine.step_shape import Chunk, StepRecord, StepShape
from engine.types import LAST, MEAN, EngineStats, ErrorInfo, FinishReason, Request, Service, TokenOutput
from router.canary import CANARY
from router.dispatch import Dispatcher
from router.membership import Member
from router.policies import POLICIES
from router.waiting_room import WaitingRoom
from tests.router.fake_workers import Client, Cluster, ready, request, token
from tests.virtual import in_virtual_time, settle

LENGTH = FinishReason.LENGTH


async def calibrated(*names: str, **settings: float) -> Cluster:
    """Workers with room, of which it is known that a prompt token takes 1 ms, and a step of n sequences n times 10."""
    cluster = await ready(*names, **settings)
    for worker in cluster.lives.values():
        worker.stats = EngineStats(num_blocks=10_000, num_free_blocks=10_000)
        worker.say()
    shapes = [StepShape((Chunk(0, size),)) for size in (64, 128, 256)] * 8
    prefills = [StepRecord(shape, 1e-3 * shape.num_chunk_tokens) for shape in shapes]
    decodes = [StepRecord(StepShape((), num, num * 10), 0.01 * num) for num in (1, 2, 4, 8)] * 8
    for member in members(cluster.dispatcher):
        cluster.dispatcher.learnt.predictor.calibrate(member.pool, prefills + decodes)
    await settle()
    return cluster


def members(dispatcher: Dispatcher) -> list[Member]:
    return [load.member for load in dispatcher.loads()]


def promised(name: str, ttft_s: float = math.inf, tpot_s: float = math.inf, priority: int = 0, **size: int) -> Request:
    return replace(request(name, **size), service=Service("", priority, ttft_s, tpot_s))


async def served(cluster: Cluster, asked: Request) -> Client:
    client = cluster.generate(asked)
    await settle()
    return client


def admissions(cluster: Cluster) -> dict[tuple[str, str], int]:
    return {(outcome, reason): count for outcome, reason, count in cluster.dispatcher.health().admissions}


async def full(cluster: Cluster) -> Overloaded:
    """Three prompts of 256 ms each are there, all due within a second; why the fourth is refused."""
    for index in range(3):
        assert (await served(cluster, promised(f"r{index}", ttft_s=1.0, num_prompt=256))).error is None
    late = await served(cluster, promised("late", ttft_s=1.0, num_prompt=256))
    assert isinstance(late.error, Overloaded)
    return late.error


@in_virtual_time
async def test_a_first_token_that_would_be_late_is_refused_with_the_time_to_come_back() -> None:
    cluster = await calibrated("p0", "d0")
    refusal = await full(cluster)
    assert refusal.retry_after_s == 1.0 and "come back in 1 s" in refusal.message
    assert len(cluster["p0"].submissions) == 3
    assert admissions(cluster) == {("admitted", "targets"): 3, ("refused", "ttft"): 1}
    await cluster.dispatcher.close()


@in_virtual_time
async def test_who_comes_back_when_told_is_taken() -> None:
    cluster = await calibrated("p0", "d0")
    refusal = await full(cluster)
    for submission in list(cluster["p0"].submissions):
        await asyncio.sleep((refusal.retry_after_s or 0.0) / 3)
        cluster["p0"].say(token(submission.request.key, 0))
    again = await served(cluster, promised("again", ttft_s=1.0, num_prompt=256))
    assert again.error is None and cluster["p0"].key.request_id == "again"
    await cluster.dispatcher.close()


@in_virtual_time
async def test_one_without_targets_waits_for_room_and_is_called_when_there_is() -> None:
    cluster = await calibrated("p0", "d0")
    first = await served(cluster, promised("first", tpot_s=0.015, num_prompt=256, max_tokens=800))
    second = await served(cluster, promised("second", num_prompt=256))
    assert not second.is_done and len(cluster["p0"].submissions) == 1, "a step with two takes 20 ms"
    assert cluster.dispatcher.health().num_waiting == 1
    key = cluster["p0"].key
    cluster["p0"].say(token(key, 0))
    await settle()
    cluster["d0"].say(token(key, 1, finish=LENGTH))
    await settle()
    assert first.is_done and cluster["p0"].key.request_id == "second"
    assert cluster.dispatcher.health().num_waiting == 0
    await cluster.dispatcher.close()


@in_virtual_time
async def test_a_client_that_leaves_while_it_waits_leaves_its_seat() -> None:
    cluster = await calibrated("p0", "d0")
    await served(cluster, promised("first", tpot_s=0.015, num_prompt=256, max_tokens=800))
    second = await served(cluster, promised("second", num_prompt=256))
    await second.leave()
    assert cluster.dispatcher.health().num_waiting == 0
    await cluster.dispatcher.close()


@in_virtual_time
async def test_when_all_seats_are_taken_the_next_one_is_refused() -> None:
    cluster = await calibrated("p0", "d0", max_waiting=1)
    await served(cluster, promised("first", tpot_s=0.015, num_prompt=256, max_tokens=800))
    await served(cluster, promised("second", num_prompt=256))
    third = await served(cluster, promised("third", num_prompt=256))
    assert isinstance(third.error, Overloaded)
    assert admissions(cluster)["refused", "full"] == 1
    await cluster.dispatcher.close()


@in_virtual_time
async def test_best_effort_waits_behind_requests_with_targets_and_for_their_prompts() -> None:
    cluster = await calibrated("p0", "d0")
    await served(cluster, promised("first", ttft_s=5.0, num_prompt=256))
    await served(cluster, promised("batch", priority=10))
    await served(cluster, promised("next", ttft_s=5.0, num_prompt=256))
    assert [one.request.request_id for one in cluster["p0"].submissions] == ["first", "next"]
    for submission in list(cluster["p0"].submissions):
        cluster["p0"].say(token(submission.request.key, 0))
        await settle()
    assert cluster["p0"].key.request_id == "batch"
    await cluster.dispatcher.close()


@in_virtual_time
async def test_workers_that_refuse_a_request_with_targets_are_asked_once_more() -> None:
    cluster = await calibrated("p0", "d0", "d1")
    client = await served(cluster, promised("r", ttft_s=60.0))
    decodes = []
    for _ in range(2):
        submission = cluster["p0"].submissions[-1]
        assert submission.decode is not None
        decodes.append(submission.decode.worker_id)
        error = ErrorInfo(Overloaded.code, "no room")
        cluster["p0"].say(TokenOutput(submission.request.key, 0, (), FinishReason.ERROR, error))
        await settle()
        await asyncio.sleep(1.0)
    assert sorted(decodes) == ["d0", "d1"], "who has just refused is not asked again where there is a choice"
    assert isinstance(client.error, Overloaded) and client.error.retry_after_s is not None
    assert admissions(cluster)["refused", "worker"] == 1
    await cluster.dispatcher.close()


@in_virtual_time
async def test_what_is_left_of_its_time_to_the_first_token_goes_along() -> None:
    cluster = await calibrated("p0", "d0")
    await served(cluster, promised("r", ttft_s=60.0))
    assert cluster["p0"].submissions[0].request.service.ttft_s == 60.0
    cluster["p0"].say(TokenOutput(cluster["p0"].key, 0, (), FinishReason.ERROR, ErrorInfo("overloaded", "no room")))
    await asyncio.sleep(10.0)
    assert 50.0 <= cluster["p0"].submissions[1].request.service.ttft_s < 60.0
    await cluster.dispatcher.close()


@in_virtual_time
async def test_the_waiting_room_calls_the_first_by_class_then_by_when_they_are_due() -> None:
    room = WaitingRoom(10)
    tickets = [room.enter(priority, due) for priority, due in ((5, 1.0), (0, 9.0), (0, 2.0), (5, 0.5), (5, 3.0))]
    room.call()
    assert [ticket.called.is_set() for ticket in tickets] == [True, True, True, True, False]
    assert room.has_before(0, math.inf) and not room.has_before(0, 1.0)
    for ticket in tickets:
        room.leave(ticket)
    assert len(room) == 0


@in_virtual_time
async def test_health_tells_how_far_off_a_first_token_was_predicted() -> None:
    cluster = await calibrated("p0", "d0")
    assert "ttft" not in {error.kind for error in cluster.dispatcher.health().prediction}
    await served(cluster, promised("r", ttft_s=5.0, num_prompt=256))
    await asyncio.sleep(2 * 0.256)
    cluster["p0"].say(token(cluster["p0"].key, 0))
    await settle()
    (error,) = [error for error in cluster.dispatcher.health().prediction if error.kind == "ttft"]
    assert error.num_judged == 1 and error.median == pytest.approx(0.5, abs=0.05)
    await cluster.dispatcher.close()


@in_virtual_time
async def test_a_hand_off_that_takes_its_time_makes_no_first_token_late() -> None:
    """What first tokens are off by is what admission adds to every prediction. Another prompt is there meanwhile."""
    cluster = await calibrated("p0", "d0")
    await served(cluster, promised("r", ttft_s=5.0, num_prompt=256))
    key = cluster["p0"].key
    await asyncio.sleep(0.2)
    await served(cluster, promised("next", ttft_s=5.0, num_prompt=256))
    await asyncio.sleep(0.056)
    cluster["p0"].say(token(key, 0))
    await asyncio.sleep(0.3)
    cluster["d0"].say(token(key, 1))
    await settle()
    (error,) = [error for error in cluster.dispatcher.health().prediction if error.kind == "ttft"]
    assert error.num_judged == 1 and error.p90 < 0.05
    await cluster.dispatcher.close()


def embedding(name: str, embed: str, **size: int) -> Request:
    asked = request(name, max_tokens=1, **size)
    return replace(asked, sampling=replace(asked.sampling, embed=embed))


@pytest.mark.parametrize("policy", POLICIES)
@in_virtual_time
async def test_the_canary_is_handed_off_under_every_policy(policy: str) -> None:
    """Also where so short a prompt would be computed where it decodes."""
    cluster = await ready("p0", "d0", policy=policy)  # pyright: ignore[reportArgumentType]
    await served(cluster, replace(request("c", num_prompt=8), namespace=CANARY))
    ((submission, *_),) = (cluster["p0"].submissions,)
    assert submission.decode is not None and submission.decode.worker_id == "d0"
    await cluster.dispatcher.close()


@pytest.mark.parametrize("policy", POLICIES)
@in_virtual_time
async def test_an_embedding_is_placed_on_one_worker_by_every_policy_and_again_when_that_dies(policy: str) -> None:
    cluster = await ready("p0", "p1", "d0", policy=policy)  # pyright: ignore[reportArgumentType]
    client = await served(cluster, embedding("r", LAST))
    first = next(worker for worker in cluster.lives.values() if worker.submissions)
    assert first.submissions[0].decode is None
    first.die()
    await asyncio.sleep(5)
    (other,) = (one for one in cluster.lives.values() if one is not first and one.submissions)
    assert other.submissions[0].decode is None
    other.say(TokenOutput(other.key, 0, (), FinishReason.STOP, embedding=b"abcd"))
    await client.task
    assert [output.embedding for output in client.outputs] == [b"abcd"]
    assert not cluster.dispatcher._live


@in_virtual_time
async def test_an_embedding_asks_for_no_room_to_decode_and_one_by_the_mean_reads_no_cache() -> None:
    cluster = await calibrated("p0", "d0")
    cluster["d0"].stats = EngineStats(num_blocks=4, num_free_blocks=0)
    cluster["d0"].say()
    await settle()
    for name, embed in (("last", LAST), ("mean", MEAN)):
        asked = replace(embedding(name, embed, num_prompt=100), service=Service(ttft_s=5.0))
        client = await served(cluster, asked)
        assert client.error is None and cluster["p0"].key.request_id == name
    live = cluster.dispatcher._live["mean"]
    live.refused_after = ("p0", "i1")
    assert cluster.dispatcher.placer.cached(live) == {}


@in_virtual_time
async def test_who_has_a_part_of_its_answer_is_not_refused_for_a_target_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was admitted, then steps became too slow for anybody's target, and its decode worker let it go."""
    cluster = await calibrated("p0", "d0")
    client = await served(cluster, promised("r", ttft_s=5.0, tpot_s=0.015, num_prompt=64, max_tokens=8))
    cluster["p0"].say(token(cluster["p0"].key, 0))
    await settle()
    key = cluster["p0"].key
    cluster["d0"].say(token(key, 1))
    await settle()
    monkeypatch.setattr(type(cluster.dispatcher.learnt.predictor), "decode_step_s", lambda *_: 0.05)
    refused = await served(cluster, promised("new", ttft_s=5.0, tpot_s=0.015, num_prompt=64, max_tokens=8))
    assert isinstance(refused.error, Overloaded)
    cluster["d0"].say(TokenOutput.failed(key, ErrorInfo("worker_lost", "it died")))
    await asyncio.sleep(1.0)
    assert client.error is None and not client.is_done
    again = [one.request for one in cluster["p0"].submissions if one.request.request_id == "r"]
    assert len(again) == 2 and len(again[-1].generated_ids) == 2
    await cluster.dispatcher.close()
