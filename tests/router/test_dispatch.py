from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    SteelyardError,
    TransferFailed,
    Unavailable,
    WorkerLost,
)
from engine.types import EngineStats, ErrorInfo, FinishReason, Key, TokenOutput
from router.dispatch import LONGEST_PAUSE_S, REFUSED_PAUSE_S
from router.membership import Membership
from tests.router.fake_workers import Client, Cluster, keys, member, ready, request, token
from tests.virtual import in_virtual_time, settle, until

LENGTH = FinishReason.LENGTH


def failure(key: Key, error: SteelyardError) -> TokenOutput:
    return TokenOutput(key, 0, (), FinishReason.ERROR, ErrorInfo(error.code, error.message))


async def placed(cluster: Cluster, name: str = "r", **fields: float) -> Client:
    client = cluster.generate(request(name, **fields))  # type: ignore[arg-type]
    await settle()
    return client


async def finish(cluster: Cluster, client: Client, on: str = "d0") -> None:
    """Let the request end with one token more."""
    worker = cluster[on]
    key = cluster["p0"].key if on.startswith("d") else worker.key
    worker.say(token(key, len(client.ids), finish=LENGTH))
    await settle()
    assert client.is_done and client.error is None


async def closed(cluster: Cluster) -> None:
    """Nothing is left when the dispatcher is closed."""
    await cluster.dispatcher.close()
    await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert cluster.dispatcher.health().num_live_requests == 0


# --- a request that goes well ---------------------------------------------------------------------------------


@in_virtual_time
async def test_tokens_come_first_from_prefill_and_then_from_decode() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    (submission,) = cluster["p0"].submissions
    assert submission.gateway_id == "g0"
    assert submission.decode is not None
    assert (submission.decode.worker_id, submission.decode.incarnation) == ("d0", "i1")
    cluster["p0"].say(token(submission.request.key, 0))
    await settle()
    cluster["d0"].say(token(submission.request.key, 1), token(submission.request.key, 2))
    await settle()
    await finish(cluster, client)
    assert client.ids == [0, 1, 2, 3]
    assert cluster["p0"].aborted == cluster["d0"].aborted == []
    await closed(cluster)


@in_virtual_time
async def test_a_first_token_that_is_overtaken_by_all_others_costs_nothing() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    key = cluster["p0"].key
    for index in range(1, 5):
        cluster["d0"].say(token(key, index, finish=LENGTH if index == 4 else None))
    await settle()
    assert client.ids == []
    cluster["p0"].say(token(key, 0))
    await settle()
    assert client.ids == [0, 1, 2, 3, 4]
    assert client.is_done
    await closed(cluster)


@in_virtual_time
async def test_many_requests_are_spread_over_the_workers_of_each_pool() -> None:
    cluster = await ready("p0", "p1", "d0", "d1")
    for index in range(8):
        await placed(cluster, f"r{index}")
    assert [len(cluster[name].submissions) for name in ("p0", "p1")] == [4, 4]
    decodes = [s.decode.worker_id for name in ("p0", "p1") for s in cluster[name].submissions if s.decode]
    assert (decodes.count("d0"), decodes.count("d1")) == (4, 4)
    await closed(cluster)


@in_virtual_time
async def test_prompts_that_are_prefilled_no_longer_weigh_on_their_worker() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster, num_prompt=50)
    assert {load.member.worker_id: load.num_prompt_tokens for load in cluster.dispatcher.loads()} == {"p0": 50, "d0": 0}
    cluster["p0"].say(token(cluster["p0"].key, 0))
    await settle()
    assert {load.num_prompt_tokens for load in cluster.dispatcher.loads()} == {0}
    assert {load.member.worker_id: load.num_sequences for load in cluster.dispatcher.loads()} == {"p0": 1, "d0": 1}
    await finish(cluster, client)
    assert {load.num_sequences for load in cluster.dispatcher.loads()} == {0}
    await closed(cluster)


# --- workers that fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["p0", "d0"])
@pytest.mark.parametrize("num_tokens", [0, 1])
@in_virtual_time
async def test_a_worker_lost_before_the_hand_off_is_replaced_under_a_new_epoch(lost: str, num_tokens: int) -> None:
    cluster = await ready("p0", "p1", "d0", "d1")
    client = await placed(cluster)
    cluster["p0"].say(*(token(cluster["p0"].key, index) for index in range(num_tokens)))
    await settle()
    cluster[lost].die()
    await asyncio.sleep(1)
    again = (
        cluster["p1"]
        if lost == "p0"
        else next(w for w in (cluster["p0"], cluster["p1"]) if keys(w.submissions)[-1].epoch)
    )
    submission = again.submissions[-1]
    assert submission.request.key == Key("r", 1)
    assert submission.request.generated_ids == tuple(range(num_tokens))
    assert submission.decode is not None and (lost == "p0" or submission.decode.worker_id == "d1")
    survivor = cluster["d0" if lost == "p0" else "p0"]
    assert survivor.aborted == [Key("r", 0)]
    again.say(token(Key("r", 1), num_tokens))
    await settle()
    cluster[submission.decode.worker_id].say(token(Key("r", 1), num_tokens + 1, finish=LENGTH))
    await settle()
    assert client.ids == list(range(num_tokens + 2))
    await closed(cluster)


@in_virtual_time
async def test_a_decode_worker_lost_in_the_middle_loses_no_token() -> None:
    cluster = await ready("p0", "d0", "d1")
    client = await placed(cluster)
    cluster["p0"].say(token(Key("r", 0), 0))
    await settle()
    cluster["d0"].say(token(Key("r", 0), 1), token(Key("r", 0), 2))
    cluster["d0"].die()
    await asyncio.sleep(1)
    submission = cluster["p0"].submissions[-1]
    assert (submission.request.key, submission.request.generated_ids) == (Key("r", 1), (0, 1, 2))
    cluster["p0"].say(token(Key("r", 1), 3))
    await settle()
    cluster["d1"].say(token(Key("r", 1), 4, finish=LENGTH))
    await settle()
    assert client.ids == [0, 1, 2, 3, 4]
    await closed(cluster)


@in_virtual_time
async def test_a_prefill_worker_lost_after_the_hand_off_is_not_missed() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    cluster["p0"].say(token(Key("r", 0), 0))
    await settle()
    cluster["d0"].say(token(Key("r", 0), 1))
    await settle()
    cluster["p0"].die()
    await asyncio.sleep(5)
    assert len(cluster["p0"].submissions) == 1
    cluster["d0"].say(token(Key("r", 0), 2, finish=LENGTH))
    await settle()
    assert client.ids == [0, 1, 2]
    await closed(cluster)


@in_virtual_time
async def test_late_tokens_of_a_lost_placement_are_dropped() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    cluster["p0"].say(failure(Key("r", 0), WorkerLost("cut")))
    await asyncio.sleep(1)
    assert cluster["p0"].key == Key("r", 1)
    cluster["d0"].say(token(Key("r", 0), 0, 99, finish=LENGTH))
    cluster["p0"].say(token(Key("r", 0), 0, 98), failure(Key("r", 0), Overloaded("full")))
    await settle()
    assert client.ids == []
    cluster["p0"].say(token(Key("r", 1), 0))
    await settle()
    await finish(cluster, client)
    assert client.ids == [0, 1]
    await closed(cluster)


@in_virtual_time
async def test_after_a_failed_transfer_the_decode_worker_computes_the_request_itself() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    cluster["p0"].say(token(Key("r", 0), 0))
    await settle()
    cluster["d0"].say(failure(Key("r", 0), TransferFailed("cut")))
    await asyncio.sleep(1)
    (submission,) = cluster["d0"].submissions
    assert submission.decode is None
    assert submission.request.generated_ids == (0,)
    cluster["d0"].say(token(Key("r", 1), 1, finish=LENGTH))
    await settle()
    assert client.ids == [0, 1]
    await closed(cluster)


@in_virtual_time
async def test_a_pool_that_is_gone_leaves_the_other_to_serve_alone() -> None:
    for left in ("p0", "d0"):
        cluster = await ready(left)
        client = await placed(cluster)
        (submission,) = cluster[left].submissions
        assert submission.decode is None
        cluster[left].say(token(Key("r", 0), 0), token(Key("r", 0), 1, finish=LENGTH))
        await settle()
        assert client.ids == [0, 1]
        await closed(cluster)


@in_virtual_time
async def test_a_worker_that_serves_alone_and_is_lost_in_the_middle_is_replaced() -> None:
    cluster = await ready("p0", "p1")
    client = await placed(cluster)
    cluster["p0"].say(token(Key("r", 0), 0), token(Key("r", 0), 1))
    await settle()
    cluster["p0"].die()
    await asyncio.sleep(1)
    assert cluster["p1"].submissions[-1].request.generated_ids == (0, 1)
    cluster["p1"].say(token(Key("r", 1), 2, finish=LENGTH))
    await settle()
    assert client.ids == [0, 1, 2]
    await closed(cluster)


@in_virtual_time
async def test_without_any_worker_a_new_request_is_refused_at_once() -> None:
    cluster = await ready()
    client = await placed(cluster)
    assert isinstance(client.error, Unavailable)
    assert client.error.retry_after_s
    await closed(cluster)


@in_virtual_time
async def test_a_request_whose_workers_are_all_lost_waits_for_new_ones() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    cluster["p0"].die()
    cluster["d0"].die()
    await asyncio.sleep(10)
    assert not client.is_done
    cluster.list(member("p0", "i2"), member("d0", "i2"))
    await asyncio.sleep(LONGEST_PAUSE_S + 1)
    assert keys(cluster["p0"].submissions) == [Key("r", 1)]
    cluster["p0"].say(token(Key("r", 1), 0, finish=LENGTH))
    await settle()
    assert client.ids == [0]
    await closed(cluster)


# --- refusals, attempts, deadlines ----------------------------------------------------------------------------


@in_virtual_time
async def test_refusals_for_lack_of_room_are_tried_again_ever_more_rarely_and_count_as_no_failure() -> None:
    cluster = await ready("p0", "d0", max_attempts=1)
    client = await placed(cluster)
    begun = asyncio.get_running_loop().time()
    pauses = []
    for epoch in range(8):
        cluster["p0"].say(failure(Key("r", epoch), Overloaded("no room")))
        await until(lambda epoch=epoch: cluster["p0"].key.epoch > epoch)
        pauses.append(asyncio.get_running_loop().time() - begun)
        begun = asyncio.get_running_loop().time()
    wanted = [min(REFUSED_PAUSE_S * 2**count, LONGEST_PAUSE_S) for count in range(1, 9)]
    assert pauses == pytest.approx(wanted, abs=0.03)
    cluster["p0"].say(token(Key("r", 8), 0, finish=LENGTH))
    await settle()
    assert client.ids == [0]
    await closed(cluster)


@in_virtual_time
async def test_a_submit_that_is_refused_is_tried_again() -> None:
    cluster = await ready("p0", "d0")
    cluster["p0"].refusals = [Overloaded("queue is full"), WorkerLost("gone")]
    client = await placed(cluster)
    await asyncio.sleep(1)
    assert keys(cluster["p0"].submissions) == [Key("r", 0), Key("r", 1), Key("r", 2)]
    cluster["p0"].say(token(Key("r", 2), 0, finish=LENGTH))
    await settle()
    assert client.ids == [0]
    await closed(cluster)


@in_virtual_time
async def test_after_the_last_attempt_the_error_reaches_the_client() -> None:
    cluster = await ready("p0", "d0", max_attempts=3)
    client = await placed(cluster)
    for epoch in range(3):
        cluster["d0"].say(failure(Key("r", epoch), WorkerLost(f"cut {epoch}")))
        await asyncio.sleep(1)
    assert isinstance(client.error, WorkerLost)
    assert client.error.message == "cut 2"
    assert len(cluster["p0"].submissions) == 3
    assert set(cluster["d0"].aborted) == {Key("r", epoch) for epoch in range(3)}
    await closed(cluster)


@in_virtual_time
async def test_an_invalid_request_surfaces_at_once() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    cluster["p0"].say(failure(Key("r", 0), InvalidRequest("too long")))
    await settle()
    assert isinstance(client.error, InvalidRequest)
    assert len(cluster["p0"].submissions) == 1
    await closed(cluster)


@pytest.mark.parametrize("answers", [0, 1])
@in_virtual_time
async def test_a_request_that_gets_no_further_ends_at_its_deadline_and_is_aborted(answers: int) -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster, timeout_s=30.0)
    cluster["p0"].say(*(token(Key("r", 0), index) for index in range(answers)))
    await asyncio.sleep(29)
    assert not client.is_done
    await asyncio.sleep(2)
    assert isinstance(client.error, DeadlineExceeded)
    assert f"after {answers} tokens" in client.error.message
    assert cluster["p0"].aborted == cluster["d0"].aborted == [Key("r", 0)]
    await closed(cluster)


@in_virtual_time
async def test_a_worker_that_does_not_answer_in_time_is_not_the_requests_deadline() -> None:
    cluster = await ready("p0", "d0", max_attempts=2)
    cluster["p0"].refusals = [DeadlineExceeded("a peer did not answer in time")] * 2
    client = await placed(cluster)
    await asyncio.sleep(1)
    assert type(client.error) is Unavailable and "did not answer" in client.error.message
    await closed(cluster)


@in_virtual_time
async def test_the_gateways_own_deadline_bounds_the_clients() -> None:
    cluster = await ready("p0", "d0", deadline_s=5.0)
    client = await placed(cluster, timeout_s=1e6)
    await asyncio.sleep(5)
    assert isinstance(client.error, DeadlineExceeded)
    assert cluster["p0"].submissions[0].request.timeout_s == pytest.approx(5.0)
    await closed(cluster)


@in_virtual_time
async def test_the_deadline_also_ends_a_wait_for_workers() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster, timeout_s=30.0)
    cluster["p0"].die()
    cluster["d0"].die()
    await asyncio.sleep(31)
    assert isinstance(client.error, DeadlineExceeded)
    await closed(cluster)


@in_virtual_time
async def test_each_placement_is_told_what_is_left_of_the_deadline() -> None:
    cluster = await ready("p0", "d0")
    await placed(cluster, timeout_s=30.0)
    await asyncio.sleep(10)
    cluster["p0"].say(failure(Key("r", 0), WorkerLost("cut")))
    await asyncio.sleep(1)
    assert cluster["p0"].submissions[1].request.timeout_s == pytest.approx(20.0, abs=0.5)
    await closed(cluster)


@in_virtual_time
async def test_more_live_requests_than_allowed_and_doubled_ids_are_refused() -> None:
    cluster = await ready("p0", "d0", max_live_requests=2)
    await placed(cluster, "a")
    doubled = await placed(cluster, "a")
    assert isinstance(doubled.error, InvalidRequest)
    await placed(cluster, "b")
    third = await placed(cluster, "c")
    assert isinstance(third.error, Overloaded)
    assert third.error.retry_after_s
    assert cluster.dispatcher.health().num_live_requests == 2
    await closed(cluster)


# --- the client leaves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
@in_virtual_time
async def test_a_client_that_leaves_is_aborted_on_both_workers(num_tokens: int) -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    for index in range(num_tokens):
        cluster["d0" if index else "p0"].say(token(Key("r", 0), index))
        await settle()
    assert len(client.ids) == num_tokens
    await client.leave()
    assert cluster["p0"].aborted == cluster["d0"].aborted == [Key("r", 0)]
    assert cluster.dispatcher.health().num_live_requests == 0
    await closed(cluster)


@in_virtual_time
async def test_a_client_that_leaves_while_it_is_submitted_is_aborted() -> None:
    cluster = await ready("p0", "d0")
    client = cluster.generate()
    await until(lambda: bool(cluster["p0"].submissions))
    await client.leave()
    assert cluster["p0"].aborted == [Key("r", 0)]
    await closed(cluster)


@in_virtual_time
async def test_a_client_that_leaves_between_two_placements_is_aborted_where_it_was() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    cluster["p0"].say(failure(Key("r", 0), Overloaded("full")))
    await settle()
    await client.leave()
    await asyncio.sleep(5)
    assert keys(cluster["p0"].submissions) == [Key("r", 0)]
    assert set(cluster["d0"].aborted) == {Key("r", 0)}
    await closed(cluster)


@in_virtual_time
async def test_an_abort_that_cannot_be_delivered_is_no_error() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    cluster["d0"].reachable = False
    await client.leave()
    assert cluster["p0"].aborted == [Key("r", 0)]
    await closed(cluster)


@in_virtual_time
async def test_closing_ends_live_requests_with_an_error_at_once_and_aborts_them() -> None:
    cluster = await ready("p0", "d0")
    clients = [await placed(cluster, name) for name in ("a", "b")]
    begun = asyncio.get_running_loop().time()
    await cluster.dispatcher.close()
    await settle()
    assert asyncio.get_running_loop().time() == begun
    assert [type(client.error) for client in clients] == [Unavailable, Unavailable]
    assert set(cluster["p0"].aborted) == set(cluster["d0"].aborted) == {Key("a", 0), Key("b", 0)}
    late = await placed(cluster, "c")
    assert isinstance(late.error, Unavailable)
    assert cluster["p0"].closed and cluster["d0"].closed
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_virtual_time
async def test_closing_ends_requests_that_wait_for_workers() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    cluster["p0"].die()
    cluster["d0"].die()
    await asyncio.sleep(3)
    await closed(cluster)
    assert isinstance(client.error, Unavailable)


# --- membership -----------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_older_or_equal_membership_changes_nothing() -> None:
    cluster = await ready("p0", "d0")
    cluster.dispatcher.apply(Membership(5, (member("p0"), member("d0"))))
    for version in (5, 4, 0):
        cluster.dispatcher.apply(Membership(version, ()))
    await settle()
    assert cluster.dispatcher.health().membership_version == 5
    assert len(cluster.dispatcher.health().workers) == 2
    await closed(cluster)


@in_virtual_time
async def test_a_member_that_is_replaced_by_a_new_incarnation_loses_no_request() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    cluster["p0"].say(token(Key("r", 0), 0))
    await settle()
    old = cluster["d0"]
    cluster.list(member("p0"), member("d0", "i2"))
    await asyncio.sleep(1)
    assert old.closed
    submission = cluster["p0"].submissions[-1]
    assert submission.decode is not None
    assert (submission.request.key, submission.decode.incarnation) == (Key("r", 1), "i2")
    old.say(token(Key("r", 0), 1, 99))
    cluster["p0"].say(token(Key("r", 1), 1))
    await settle()
    await finish(cluster, client)
    assert client.ids == [0, 1, 2]
    await closed(cluster)


@in_virtual_time
async def test_a_member_that_leaves_is_asked_for_nothing_more() -> None:
    cluster = await ready("p0", "p1", "d0")
    cluster.list(member("p1"), member("d0"))
    await settle()
    await placed(cluster)
    assert cluster["p0"].submissions == []
    assert len(cluster["p1"].submissions) == 1
    await closed(cluster)


@in_virtual_time
async def test_a_member_that_leaves_and_comes_back_is_linked_anew() -> None:
    cluster = await ready("p0", "d0")
    first = cluster["d0"]
    cluster.list(member("p0"))
    cluster.list(member("p0"), member("d0"))
    await settle()
    assert first.closed
    assert cluster["d0"] is not first
    await placed(cluster)
    assert cluster["p0"].submissions[0].decode is not None
    await closed(cluster)


@in_virtual_time
async def test_a_flip_keeps_the_link_and_changes_what_is_sent() -> None:
    cluster = await ready("p0", "p1", "d0")
    flipped = replace(member("p1", role_epoch=1), role=member("d1").role)
    cluster.list(member("p0"), flipped, replace(member("d0"), role=member("p1").role, role_epoch=4))
    await settle()
    assert cluster["p1"].num_streams == 1
    cluster["p0"].stats = EngineStats(num_waiting_tokens=1000)
    cluster["p0"].say()
    await settle()
    await placed(cluster)
    (submission,) = cluster["d0"].submissions
    assert cluster["d0"].role_epochs == [4]
    assert submission.decode is not None and submission.decode.worker_id == "p1"
    await closed(cluster)


# --- health ---------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_only_tokens_that_decode_gave_after_a_hand_off_are_proof() -> None:
    cluster = await ready("p0", "d0")
    client = await placed(cluster)
    cluster["p0"].say(token(Key("r", 0), 0))
    await settle()
    assert not cluster.dispatcher.health().healthy
    cluster["d0"].say(token(Key("r", 0), 1))
    await settle()
    assert cluster.dispatcher.health().healthy
    await asyncio.sleep(7)
    cluster["d0"].say(token(Key("r", 0), 1), failure(Key("r", 0), TransferFailed("cut")))
    await settle()
    assert cluster.dispatcher.health().canary_age_s == pytest.approx(7)
    await client.leave()
    await closed(cluster)


@in_virtual_time
async def test_a_canary_proves_the_way_through_the_dispatcher() -> None:
    cluster = await ready("p0", "d0")
    cluster.dispatcher.canary.start()
    await settle()
    key = cluster["p0"].key
    cluster["p0"].say(token(key, 0))
    cluster["d0"].say(token(key, 1, finish=LENGTH))
    await cluster.dispatcher.canary.first_proof()
    health = cluster.dispatcher.health()
    assert (health.healthy, health.reason) == (True, "ok")
    assert [view.connected for view in health.workers] == [True, True]
    await closed(cluster)
