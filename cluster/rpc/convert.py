"""Records to protobuf messages and back. Everything that comes from a peer is rebuilt as our own frozen records."""

from __future__ import annotations

from dataclasses import asdict

from cluster.rpc import control_pb2, request_pb2, token_pb2
from cluster.sides import WorkerStatus
from engine.step_shape import Chunk, StepRecord, StepShape
from engine.streams import StreamBatch
from engine.types import (
    CacheNews,
    CarrierTotals,
    Endpoint,
    EngineStats,
    ErrorInfo,
    FinishReason,
    Key,
    KvPath,
    KvTransfer,
    Move,
    Request,
    SamplingParams,
    Service,
    Submission,
    TokenLogprob,
    TokenOutput,
    TransferReport,
)
from kv_transfer.lease import Lease, Loan, Offer


def key_to(key: Key) -> request_pb2.Key:
    return request_pb2.Key(request_id=key.request_id, epoch=key.epoch)


def key_from(message: request_pb2.Key) -> Key:
    return Key(message.request_id, message.epoch)


def endpoint_to(endpoint: Endpoint) -> request_pb2.Endpoint:
    return request_pb2.Endpoint(**asdict(endpoint))


def endpoint_from(message: request_pb2.Endpoint) -> Endpoint:
    return Endpoint(message.worker_id, message.incarnation, message.address, message.cohort)


def submission_to(submission: Submission, role_epoch: int) -> request_pb2.SubmitRequest:
    request = submission.request
    message = request_pb2.Request(
        key=key_to(request.key), prompt_ids=request.prompt_ids, generated_ids=request.generated_ids,
        sampling=_sampling_to(request.sampling), namespace=request.namespace,
        timeout_s=request.timeout_s, service=request_pb2.Service(**asdict(request.service)),
    )  # fmt: skip
    decode = None if submission.decode is None else endpoint_to(submission.decode)
    siblings = [request_pb2.Sibling(key=key_to(one.key), choice=one.sampling.choice) for one in submission.siblings]
    source = None if submission.source is None else endpoint_to(submission.source)
    return request_pb2.SubmitRequest(
        request=message, gateway_id=submission.gateway_id, decode=decode, role_epoch=role_epoch, siblings=siblings,
        source=source,
    )  # fmt: skip


def submission_from(message: request_pb2.SubmitRequest) -> Submission:
    key = key_from(message.request.key)
    request = Request(
        key.request_id, tuple(message.request.prompt_ids), _sampling_from(message.request.sampling), key.epoch,
        tuple(message.request.generated_ids), message.request.namespace, message.request.timeout_s,
        _service_from(message.request.service),
    )  # fmt: skip
    decode = endpoint_from(message.decode) if message.HasField("decode") else None
    source = endpoint_from(message.source) if message.HasField("source") else None
    siblings = tuple(request.sibling(key_from(one.key), one.choice) for one in message.siblings)
    return Submission(request, message.gateway_id, decode, siblings, source)


def _service_from(message: request_pb2.Service) -> Service:
    return Service(message.tenant, message.priority, message.ttft_s, message.tpot_s)


def _sampling_to(params: SamplingParams) -> request_pb2.SamplingParams:
    fields = asdict(params) | {
        "logit_bias": [request_pb2.TokenBias(token_id=token_id, bias=bias) for token_id, bias in params.logit_bias],
        "bad_words": [request_pb2.TokenIds(ids=ids) for ids in params.bad_words],
    }
    return request_pb2.SamplingParams(**fields)


def _sampling_from(message: request_pb2.SamplingParams) -> SamplingParams:
    fields = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields} | {
        "stop_token_ids": tuple(message.stop_token_ids),
        "logit_bias": tuple((one.token_id, one.bias) for one in message.logit_bias),
        "bad_words": tuple(tuple(words.ids) for words in message.bad_words),
    }
    return SamplingParams(**fields)


def offer_to(offer: Offer) -> request_pb2.OfferRequest:
    return request_pb2.OfferRequest(
        lease=_lease_to(offer.lease), num_tokens=offer.num_tokens, num_growth=offer.num_growth,
        gateway_id=offer.gateway_id, timeout_s=offer.timeout_s, siblings=map(key_to, offer.siblings),
        names=offer.names, moving=offer.moving, service=request_pb2.Service(**asdict(offer.service)),
    )  # fmt: skip


def offer_from(message: request_pb2.OfferRequest) -> Offer:
    siblings = tuple(map(key_from, message.siblings))
    return Offer(
        _lease_from(message.lease), message.num_tokens, message.num_growth, message.gateway_id, message.timeout_s,
        siblings, tuple(message.names), message.moving, _service_from(message.service),
    )  # fmt: skip


def loan_to(loan: Loan) -> request_pb2.Loan:
    return request_pb2.Loan(lease=_lease_to(loan.lease), names=loan.names)


def loan_from(message: request_pb2.Loan) -> Loan:
    return Loan(_lease_from(message.lease), tuple(message.names))


def _lease_to(lease: Lease) -> request_pb2.Lease:
    producer = request_pb2.Endpoint(
        worker_id=lease.worker_id, incarnation=lease.incarnation, address=lease.address, cohort=lease.cohort
    )
    return request_pb2.Lease(key=key_to(lease.key), producer=producer, secret=lease.secret)


def _lease_from(message: request_pb2.Lease) -> Lease:
    producer = message.producer
    return Lease(
        key_from(message.key), producer.worker_id, producer.incarnation, producer.address, producer.cohort,
        message.secret,
    )  # fmt: skip


def move_to(move: Move) -> request_pb2.MoveRequest:
    to = None if move.to is None else key_to(move.to)
    return request_pb2.MoveRequest(
        key=key_to(move.key), target=endpoint_to(move.target), to=to, timeout_s=move.timeout_s
    )


def move_from(message: request_pb2.MoveRequest) -> Move:
    to = key_from(message.to) if message.HasField("to") else None
    return Move(key_from(message.key), endpoint_from(message.target), to, message.timeout_s)


def stats_to(stats: EngineStats) -> token_pb2.Stats:
    return token_pb2.Stats(**asdict(stats))


def stats_from(message: token_pb2.Stats) -> EngineStats:
    return EngineStats(**{field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields})


def status_to(status: WorkerStatus) -> control_pb2.WorkerStatus:
    totals = status.transfers
    return control_pb2.WorkerStatus(
        endpoint=endpoint_to(status.endpoint), role=status.role, role_epoch=status.role_epoch,
        stats=stats_to(status.stats), num_queued=status.num_queued, num_leases=status.num_leases,
        num_pulls=status.num_pulls, num_streams=status.num_streams, transfers=totals.num_pulls,
        transfers_failed=totals.num_failed, transfer_bytes=totals.size_bytes, transfer_seconds=totals.duration_s,
        last_step_seconds=status.last_step_s,
    )  # fmt: skip


def batch_to(batch: StreamBatch) -> token_pb2.TokenBatch:
    outputs = [_output_to(output) for output in batch.outputs]
    return token_pb2.TokenBatch(
        outputs=outputs, stats=stats_to(batch.stats), steps=map(_step_to, batch.steps),
        carriers=map(_carrier_to, batch.transfers.totals), paths=map(_path_to, batch.transfers.paths),
        kept=batch.cache.kept, lost=batch.cache.lost, cache_anew=batch.cache.anew,
        calibration=map(_step_to, batch.calibration),
    )  # fmt: skip


def batch_from(message: token_pb2.TokenBatch) -> StreamBatch:
    outputs = tuple(_output_from(output) for output in message.outputs)
    transfers = TransferReport(tuple(map(_carrier_from, message.carriers)), tuple(map(_path_from, message.paths)))
    steps, calibration = (tuple(map(_step_from, steps)) for steps in (message.steps, message.calibration))
    cache = CacheNews(tuple(message.kept), tuple(message.lost), message.cache_anew)
    return StreamBatch(outputs, stats_from(message.stats), steps, transfers, cache, calibration)


def _carrier_to(totals: CarrierTotals) -> token_pb2.CarrierTotals:
    return token_pb2.CarrierTotals(
        carrier=totals.carrier, pulls=totals.num_pulls, bytes=totals.size_bytes, seconds=totals.duration_s,
        fallbacks=totals.num_fallbacks, saved_bytes=totals.saved_bytes, hidden_bytes=totals.hidden_bytes,
    )  # fmt: skip


def _carrier_from(message: token_pb2.CarrierTotals) -> CarrierTotals:
    return CarrierTotals(
        message.carrier, message.pulls, message.bytes, message.seconds, message.fallbacks, message.saved_bytes,
        message.hidden_bytes,
    )  # fmt: skip


def _path_to(path: KvPath) -> token_pb2.KvPath:
    return token_pb2.KvPath(peer=path.peer, carrier=path.carrier, bytes_per_second=path.bytes_per_s)


def _path_from(message: token_pb2.KvPath) -> KvPath:
    return KvPath(message.peer, message.carrier, message.bytes_per_second)


def _step_to(record: StepRecord) -> token_pb2.Step:
    shape = record.shape
    chunks = [token_pb2.Chunk(num_before=chunk.num_before, num_new=chunk.num_new) for chunk in shape.chunks]
    return token_pb2.Step(
        chunks=chunks, num_decoding=shape.num_decoding, num_context=shape.num_context, step_seconds=record.step_s
    )


def _step_from(message: token_pb2.Step) -> StepRecord:
    chunks = tuple(Chunk(chunk.num_before, chunk.num_new) for chunk in message.chunks)
    return StepRecord(StepShape(chunks, message.num_decoding, message.num_context), message.step_seconds)


def _output_to(output: TokenOutput) -> token_pb2.TokenOutput:
    error = output.error or ErrorInfo("", "")
    return token_pb2.TokenOutput(
        key=key_to(output.key), first_index=output.first_index, token_ids=output.token_ids, finish=output.finish or "",
        error_code=error.code, error_message=error.message, cached_tokens=output.cached_tokens,
        stages=[token_pb2.Stage(name=name, seconds=seconds) for name, seconds in output.stages],
        logprobs=map(_logprob_to, output.logprobs), prompt_logprobs=map(_logprob_to, output.prompt_logprobs),
        transfer=None if output.transfer is None else _transfer_to(output.transfer), embedding=output.embedding,
    )  # fmt: skip


def _output_from(message: token_pb2.TokenOutput) -> TokenOutput:
    return TokenOutput(
        key_from(message.key), message.first_index, tuple(message.token_ids),
        FinishReason(message.finish) if message.finish else None,
        ErrorInfo(message.error_code, message.error_message) if message.error_code else None,
        message.cached_tokens, tuple((stage.name, stage.seconds) for stage in message.stages),
        tuple(map(_logprob_from, message.logprobs)), tuple(map(_logprob_from, message.prompt_logprobs)),
        _transfer_from(message.transfer) if message.HasField("transfer") else None, message.embedding,
    )  # fmt: skip


def _transfer_to(transfer: KvTransfer) -> token_pb2.KvTransfer:
    return token_pb2.KvTransfer(
        carrier=transfer.carrier, bytes=transfer.size_bytes, hidden_bytes=transfer.hidden_bytes,
        seconds=transfer.transfer_s, exposed_seconds=transfer.exposed_s,
    )  # fmt: skip


def _transfer_from(message: token_pb2.KvTransfer) -> KvTransfer:
    return KvTransfer(message.carrier, message.bytes, message.hidden_bytes, message.seconds, message.exposed_seconds)


def _logprob_to(one: TokenLogprob) -> token_pb2.TokenLogprob:
    top = [token_pb2.TopToken(token_id=token_id, logprob=logprob) for token_id, logprob in one.top]
    return token_pb2.TokenLogprob(logprob=one.logprob, rank=one.rank, top=top)


def _logprob_from(message: token_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.logprob, message.rank, tuple((one.token_id, one.logprob) for one in message.top))
