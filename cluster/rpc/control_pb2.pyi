from cluster.rpc import request_pb2 as _request_pb2
from cluster.rpc import token_pb2 as _token_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("endpoint", "role", "role_epoch", "stats", "num_queued", "num_leases", "num_pulls", "num_streams", "transfers", "transfers_failed", "transfer_bytes", "transfer_seconds", "last_step_seconds")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ROLE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_PULLS_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FAILED_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    endpoint: _request_pb2.Endpoint
    role: str
    role_epoch: int
    stats: _token_pb2.Stats
    num_queued: int
    num_leases: int
    num_pulls: int
    num_streams: int
    transfers: int
    transfers_failed: int
    transfer_bytes: int
    transfer_seconds: float
    last_step_seconds: float
    def __init__(self, endpoint: _Optional[_Union[_request_pb2.Endpoint, _Mapping]] = ..., role: _Optional[str] = ..., role_epoch: _Optional[int] = ..., stats: _Optional[_Union[_token_pb2.Stats, _Mapping]] = ..., num_queued: _Optional[int] = ..., num_leases: _Optional[int] = ..., num_pulls: _Optional[int] = ..., num_streams: _Optional[int] = ..., transfers: _Optional[int] = ..., transfers_failed: _Optional[int] = ..., transfer_bytes: _Optional[int] = ..., transfer_seconds: _Optional[float] = ..., last_step_seconds: _Optional[float] = ...) -> None: ...
