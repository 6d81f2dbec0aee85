from cluster.rpc import request_pb2 as _request_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stage(_message.Message):
    __slots__ = ("name", "seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    seconds: float
    def __init__(self, name: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class TopToken(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("logprob", "rank", "top")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top: _containers.RepeatedCompositeFieldContainer[TopToken]
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top: _Optional[_Iterable[_Union[TopToken, _Mapping]]] = ...) -> None: ...

class KvTransfer(_message.Message):
    __slots__ = ("carrier", "bytes", "hidden_bytes", "seconds", "exposed_seconds")
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    carrier: str
    bytes: int
    hidden_bytes: int
    seconds: float
    exposed_seconds: float
    def __init__(self, carrier: _Optional[str] = ..., bytes: _Optional[int] = ..., hidden_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., exposed_seconds: _Optional[float] = ...) -> None: ...

class TokenOutput(_message.Message):
    __slots__ = ("key", "first_index", "token_ids", "finish", "error_code", "error_message", "cached_tokens", "stages", "logprobs", "prompt_logprobs", "transfer", "embedding")
    KEY_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    key: _request_pb2.Key
    first_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish: str
    error_code: str
    error_message: str
    cached_tokens: int
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    transfer: KvTransfer
    embedding: bytes
    def __init__(self, key: _Optional[_Union[_request_pb2.Key, _Mapping]] = ..., first_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish: _Optional[str] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., transfer: _Optional[_Union[KvTransfer, _Mapping]] = ..., embedding: _Optional[bytes] = ...) -> None: ...

class Stats(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_held", "num_blocks", "num_free_blocks", "num_cached_blocks", "num_held_blocks", "num_leaked_blocks", "num_waiting_tokens", "num_steps", "num_preemptions", "prefix_queries", "prefix_hits", "host_blocks", "host_queries", "host_hits", "host_saves", "slack_tokens", "num_queued_tokens", "queued_s")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEAKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_QUERIES_FIELD_NUMBER: _ClassVar[int]
    HOST_HITS_FIELD_NUMBER: _ClassVar[int]
    HOST_SAVES_FIELD_NUMBER: _ClassVar[int]
    SLACK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_held: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_held_blocks: int
    num_leaked_blocks: int
    num_waiting_tokens: int
    num_steps: int
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int
    host_blocks: int
    host_queries: int
    host_hits: int
    host_saves: int
    slack_tokens: int
    num_queued_tokens: int
    queued_s: float
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_held: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_cached_blocks: _Optional[int] = ..., num_held_blocks: _Optional[int] = ..., num_leaked_blocks: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., prefix_queries: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., host_blocks: _Optional[int] = ..., host_queries: _Optional[int] = ..., host_hits: _Optional[int] = ..., host_saves: _Optional[int] = ..., slack_tokens: _Optional[int] = ..., num_queued_tokens: _Optional[int] = ..., queued_s: _Optional[float] = ...) -> None: ...

class TokensRequest(_message.Message):
    __slots__ = ("gateway_id",)
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    def __init__(self, gateway_id: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("num_before", "num_new")
    NUM_BEFORE_FIELD_NUMBER: _ClassVar[int]
    NUM_NEW_FIELD_NUMBER: _ClassVar[int]
    num_before: int
    num_new: int
    def __init__(self, num_before: _Optional[int] = ..., num_new: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("chunks", "num_decoding", "num_context", "step_seconds")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODING_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[Chunk]
    num_decoding: int
    num_context: int
    step_seconds: float
    def __init__(self, chunks: _Optional[_Iterable[_Union[Chunk, _Mapping]]] = ..., num_decoding: _Optional[int] = ..., num_context: _Optional[int] = ..., step_seconds: _Optional[float] = ...) -> None: ...

class CarrierTotals(_message.Message):
    __slots__ = ("carrier", "pulls", "bytes", "seconds", "fallbacks", "saved_bytes", "hidden_bytes")
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    SAVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    carrier: str
    pulls: int
    bytes: int
    seconds: float
    fallbacks: int
    saved_bytes: int
    hidden_bytes: int
    def __init__(self, carrier: _Optional[str] = ..., pulls: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., fallbacks: _Optional[int] = ..., saved_bytes: _Optional[int] = ..., hidden_bytes: _Optional[int] = ...) -> None: ...

class KvPath(_message.Message):
    __slots__ = ("peer", "carrier", "bytes_per_second")
    PEER_FIELD_NUMBER: _ClassVar[int]
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    peer: str
    carrier: str
    bytes_per_second: float
    def __init__(self, peer: _Optional[str] = ..., carrier: _Optional[str] = ..., bytes_per_second: _Optional[float] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("outputs", "stats", "steps", "carriers", "paths", "kept", "lost", "cache_anew", "calibration")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    CARRIERS_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    CACHE_ANEW_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[TokenOutput]
    stats: Stats
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    carriers: _containers.RepeatedCompositeFieldContainer[CarrierTotals]
    paths: _containers.RepeatedCompositeFieldContainer[KvPath]
    kept: _containers.RepeatedScalarFieldContainer[int]
    lost: _containers.RepeatedScalarFieldContainer[int]
    cache_anew: bool
    calibration: _containers.RepeatedCompositeFieldContainer[Step]
    def __init__(self, outputs: _Optional[_Iterable[_Union[TokenOutput, _Mapping]]] = ..., stats: _Optional[_Union[Stats, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ..., carriers: _Optional[_Iterable[_Union[CarrierTotals, _Mapping]]] = ..., paths: _Optional[_Iterable[_Union[KvPath, _Mapping]]] = ..., kept: _Optional[_Iterable[int]] = ..., lost: _Optional[_Iterable[int]] = ..., cache_anew: _Optional[bool] = ..., calibration: _Optional[_Iterable[_Union[Step, _Mapping]]] = ...) -> None: ...
