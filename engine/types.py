"""The records that cross the engine's seams: requests in, tokens out, commands and events of one engine.

A Request is what a user asked, in token ids. The gateway owns it and raises its epoch at every new placement
(retry, migration); `(request_id, epoch)` is its Key everywhere below the gateway. Nothing here knows text,
tensors, the network or Ray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from engine.runs import Runs
from engine.step_shape import StepRecord


class Role(StrEnum):
    """Which pool routes to a worker. A label: every worker holds both sides ready."""

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # max_tokens or the context is full
    ABORT = "abort"  # cancelled by its owner
    ERROR = "error"  # TokenOutput.error says why


LAST, MEAN = POOLINGS = ("last", "mean")  # how hidden states become an embedding: the last token's, or that of all


class Key(NamedTuple):
    """Names one placement of one request."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to end. Each default is neutral; temperature 0 is greedy; seed is always set.

    Applied in this order (engine/logits.py, engine/sampler.py): grammar, logit_bias, penalties, bad_words, min_tokens,
    temperature, top_k, top_p, min_p, typical_p.
    """

    max_tokens: int = 16
    min_tokens: int = 0  # no end-of-sequence or stop token before as many are generated
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # of the most likely token's probability
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # of what is in the prompt or generated (CTRL)
    presence_penalty: float = 0.0  # of what is generated, once
    frequency_penalty: float = 0.0  # of what is generated, per occurrence
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that are never completed
    seed: int = 0  # 0 <= seed < 2**64
    choice: int = 0  # which of the answers to one prompt: with the seed it keys the noise
    grammar: str = ""  # that the answer keeps to, as llguidance reads it; empty: none
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = -1  # of each token: -1 off, 0 its own, k also the k most likely tokens'
    prompt_logprobs: int = -1  # the same of each prompt token after the first
    embed: str = ""  # "last" or "mean": no tokens, but the prompt's hidden states pooled (engine/pooling.py)


@dataclass(frozen=True, slots=True)
class Service:
    """What was promised to whom. `ttft_s`: what is left until its first token is due when the record is sent; `tpot_s`:
    the most that each further one may take on average; infinite: nothing was promised."""

    tenant: str = ""
    priority: int = 0  # of two that cannot both be served in time the higher number yields
    ttft_s: float = math.inf
    tpot_s: float = math.inf


STANDARD = Service()
UNBOUNDED = 2**32 - 1  # tokens: nobody was promised anything


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. `generated_ids` are tokens that the client already has (after a retry or a hand-off)."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    epoch: int = 0
    generated_ids: tuple[int, ...] = ()
    namespace: str = ""  # separates prefix caches (tenant, adapter)
    timeout_s: float = 600.0  # what is left until the deadline when the record is sent
    service: Service = STANDARD

    @property
    def key(self) -> Key:
        return Key(self.request_id, self.epoch)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.generated_ids)

    def sibling(self, key: Key, choice: int, generated_ids: tuple[int, ...] = ()) -> Request:
        """Another answer to the same prompt, under the same parameters."""
        sampling = replace(self.sampling, choice=choice)
        return replace(self, request_id=key.request_id, epoch=key.epoch, sampling=sampling, generated_ids=generated_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was under the model's own distribution: before bias, penalties, temperature and truncation."""

    logprob: float  # natural logarithm
    rank: int  # 1: the most likely
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), the most likely first


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """A SteelyardError as a record: `code` is one of engine.errors.ERRORS."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class KvTransfer:
    """How the KV of one request came to where it decodes.

    `transfer_s`: from its first frame to the COMMIT, by the receiver's clock; `exposed_s` of it passed after the first
    token was sampled, and `hidden_bytes` of `size_bytes` had arrived by then."""

    carrier: str
    size_bytes: int
    hidden_bytes: int
    transfer_s: float
    exposed_s: float

    @property
    def hidden_share(self) -> float:
        """1: only the COMMIT was waited for."""
        return self.hidden_bytes / self.size_bytes if self.size_bytes else 1.0


@dataclass(slots=True)  # not frozen: one is made of each token in each process, and takes a sixth of the time so
class TokenOutput:
    """New tokens of one request: the unit of the token stream. Nobody alters one but the gateway that it is for.

    `first_index` counts generated tokens from 0. The owner takes only `first_index == next`.
    `logprobs` are those of `token_ids`, one each, and `prompt_logprobs` those of the prompt's tokens after the first,
    with the first output; both empty where they were not asked for.
    `cached_tokens` is how many prompt tokens came from a prefix cache; `stages` are (name, seconds); `transfer` comes
    with the first output after a hand-off. `embedding` (float32, little-endian) comes alone, where it was asked for.
    """

    key: Key
    first_index: int
    token_ids: tuple[int, ...] = ()
    finish: FinishReason | None = None
    error: ErrorInfo | None = None
    cached_tokens: int = 0
    stages: tuple[tuple[str, float], ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    transfer: KvTransfer | None = None
    embedding: bytes = b""

    @staticmethod
    def failed(key: Key, error: ErrorInfo) -> TokenOutput:
        """The last word on a request that could not go on."""
        return TokenOutput(key, 0, (), FinishReason.ERROR, error)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a model chose after one scheduled item: 0 to k + 1 tokens in order.

    `logprobs` has one for each token where they are wanted; `prompt_logprobs` those of the prompt's tokens at positions
    [start + 1, start + num_new + 1), as far as the prompt goes, where these are wanted. `siblings` is what was chosen
    for the sequence's other answers, in their order. With `error` nothing was, and these answers end with it.
    `embedding` comes instead of a token where one is wanted."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    siblings: tuple[Sampled, ...] = ()
    error: ErrorInfo | None = None
    embedding: bytes = b""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One life of one worker, and where to reach it."""

    worker_id: str
    incarnation: str
    address: str  # host:port of its gRPC server
    cohort: str  # layout hash; unequal cohorts are never paired


@dataclass(frozen=True, slots=True)
class Submission:
    """A placement as a gateway sends it: prefill here, then decode there (`decode` None: all of it here).

    `siblings` are other answers to the same prompt, which is computed once and moved once, under the request's key.
    `source`: a worker that has, as far as the gateway knows, a long prefix of the prompt in its cache."""

    request: Request
    gateway_id: str
    decode: Endpoint | None
    siblings: tuple[Request, ...] = ()
    source: Endpoint | None = None

    @property
    def requests(self) -> tuple[Request, ...]:
        """All that are to be answered."""
        return (self.request, *self.siblings)


@dataclass(frozen=True, slots=True)
class Move:
    """A gateway's wish: the sequence that runs under `key` goes on at `target` under the key `to`. Without `to` it only
    gets a copy of its full blocks there, so that it could move soon. `timeout_s`: until the request's deadline."""

    key: Key
    target: Endpoint
    to: Key | None
    timeout_s: float


# --- commands: what an engine is told, over a queue -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Add:
    """Compute this request. With `handoff` it leaves after its first token, and its blocks stay held under
    its key until Release; without, it runs to its end. `siblings` get their first tokens from the same prompt."""

    request: Request
    handoff: bool = False
    siblings: tuple[Request, ...] = ()


@dataclass(frozen=True, slots=True)
class Reserve:
    """Take blocks for `num_tokens` positions, to be written from outside, and for the token that comes with them, if
    `num_growth` more of each of `num_answers` are likely to fit.

    `names` are the prefix hashes of the full blocks: what is here under them is shared and need not be written.
    `tpot_s`: what was promised to these answers."""

    key: Key
    num_tokens: int
    num_growth: int = 0
    num_answers: int = 1
    names: tuple[bytes, ...] = ()
    tpot_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Adopt:
    """Go on with a request whose reserved blocks now hold its first `computed` positions, verified.

    `cached_tokens` is the prefill side's count, carried on into the outputs. `siblings` go on from the same blocks.
    `reserved` names the reservation, where it is not the request's own. `waited_s`: since the first token."""

    request: Request
    computed: int
    cached_tokens: int = 0
    siblings: tuple[Request, ...] = ()
    reserved: Key | None = None
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Release:
    """Let go of blocks held under a key by a hand-off or a reservation. Releasing twice is no error."""

    key: Key


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request wherever it is; all that it alone holds is freed. Aborting an unknown key is no error."""

    key: Key


@dataclass(frozen=True, slots=True)
class Lend:
    """Hold, under this key until its Release, the blocks of the longest prefix that is here: of these names, or of the
    sequence that runs under the key `of`."""

    key: Key
    names: tuple[bytes, ...] = ()
    of: Key | None = None


@dataclass(frozen=True, slots=True)
class Keep:
    """The blocks reserved under this key now hold what these prefix hashes name: they become the prefix cache's."""

    key: Key
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Freeze:
    """Let a sequence that decodes stand still with all that it holds, until Resume, Release or Abort."""

    key: Key


@dataclass(frozen=True, slots=True)
class Resume:
    """Let a frozen sequence go on. Of one that is not frozen it is no error."""

    key: Key


Command = Add | Reserve | Adopt | Release | Abort | Lend | Keep | Freeze | Resume


# --- events: what an engine tells ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """`block_ids` of a hand-off are stored and will not change: the first ones of those to be transferred, in the
    order of engine.block_table.transfer_entries.

    The first event of a key says that its first chunk was scheduled (it may name no block), and brings `names`, the
    prefix hashes of its full blocks (none without a prefix cache). `done` comes with the first token: now all are
    there. `computed` counts positions.

    With `num_layers` it comes in the middle of a step: of the blocks that were not told before, the first so many
    layers are stored."""

    key: Key
    computed: int
    block_ids: tuple[int, ...]
    done: bool = False
    names: tuple[bytes, ...] = ()
    num_layers: int | None = None  # None: all


@dataclass(frozen=True, slots=True)
class Reserved:
    """Answer to Reserve: the blocks, in the order of engine.block_table.transfer_entries and with what the next token
    needs after them; or None with the reason of the refusal. Those in `present` hold their bytes already, and are never
    written to."""

    key: Key
    block_ids: tuple[int, ...] | None
    reason: str = ""
    present: Runs = ()


@dataclass(frozen=True, slots=True)
class Lent:
    """Answer to Lend: the prefix hashes of what is held, and its blocks, in the order of transfer_entries of as many
    full blocks. Both are empty if nothing of it is here."""

    key: Key
    names: tuple[bytes, ...] = ()
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Frozen:
    """Answer to Freeze: the request with all that has been generated, of which `computed` positions are stored in these
    blocks, in the order of transfer_entries; or None with the reason why it cannot stand still. `names` are those of
    its full blocks."""

    key: Key
    request: Request | None
    reason: str = ""
    computed: int = 0
    cached_tokens: int = 0
    block_ids: tuple[int, ...] = ()
    names: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Load of one engine after a step; all derived from live tables."""

    num_running: int = 0
    num_waiting: int = 0
    num_held: int = 0  # hand-offs, loans, reservations and frozen sequences
    num_blocks: int = 0
    num_free_blocks: int = 0  # free or cached: available at once
    num_cached_blocks: int = 0
    num_held_blocks: int = 0  # in these
    num_leaked_blocks: int = 0
    num_waiting_tokens: int = 0  # positions still to be prefilled
    num_steps: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # of these, found
    host_blocks: int = 0  # blocks in the host tier
    host_queries: int = 0  # blocks looked up there, after the pool did not have them
    host_hits: int = 0  # of these, loaded
    host_saves: int = 0  # blocks that the pool evicted into it
    slack_tokens: int = UNBOUNDED  # that a step takes of a prompt, by what was promised to those that decode
    num_queued_tokens: int = 0  # positions that wait in the prefill queue
    queued_s: float = 0.0  # until a prompt that came now would begin, as predicted


@dataclass(frozen=True, slots=True)
class CarrierTotals:
    """Of a worker's life: what one carrier of KV has brought to it, and how often another had to go on for it."""

    carrier: str
    num_pulls: int = 0
    size_bytes: int = 0
    duration_s: float = 0.0
    num_fallbacks: int = 0
    saved_bytes: int = 0  # that were there already, and did not move
    hidden_bytes: int = 0  # of `size_bytes`: came while the prompt was still computed


@dataclass(frozen=True, slots=True)
class KvPath:
    """How fast KV comes from a worker by one carrier, as it was measured at first contact."""

    peer: str  # worker id
    carrier: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What a worker tells of the KV that comes to it."""

    totals: tuple[CarrierTotals, ...] = ()
    paths: tuple[KvPath, ...] = ()


NO_TRANSFERS = TransferReport()


@dataclass(frozen=True, slots=True)
class CacheNews:
    """Which blocks the prefix cache of a worker has come to have, and which it has lost, by engine.prefix.short_name.

    `anew`: what was told before does not hold any more; what is kept is told from the start. Host-tier blocks count as
    kept."""

    kept: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    anew: bool = False


NO_NEWS = CacheNews()


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Everything that one turn of an engine produced."""

    tokens: tuple[TokenOutput, ...] = ()
    progress: tuple[Progress, ...] = ()
    reserved: tuple[Reserved, ...] = ()
    lent: tuple[Lent, ...] = ()
    frozen: tuple[Frozen, ...] = ()
    stats: EngineStats = field(default_factory=EngineStats)
    steps: tuple[StepRecord, ...] = ()  # that were computed, measured by the runner
    cache: CacheNews = NO_NEWS
    calibration: tuple[StepRecord, ...] = ()  # measured before the first command
