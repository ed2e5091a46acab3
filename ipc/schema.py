"""Messages between processes: rare, variable in size, from peers that come and go. msgspec structs over ZMQ.

A message is one ZMQ part: a msgpack array tagged with its type. Token ids travel as packed int32 bytes and results as
columns, because a list of 8k ids costs 200 us and the bytes 0.4 us.

    frontend  -> scheduler   Hello, Heartbeat, Admit, Abort, GetStats, GetInvariants, Goodbye
    frontend  -> directory   Hello, Heartbeat, Goodbye    (the launcher's socket; answered with Members)
    launcher  -> directory   Join, Goodbye                (of a replica elsewhere)
    scheduler -> frontend    Welcome, Tokens, Rejected, Stats, Invariants, Draining, Paused
    directory -> frontend    Members, Draining, Rejected

What processes say of their own lives, apart from requests: ipc/control.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from ipc.errors import ProtocolError

PROTOCOL_VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 64 << 20
MAX_GRAMMAR_CHARS: Final = 1 << 18
HEARTBEAT_S: Final = 1.0  # each frontend sends one; silence of HEARTBEAT_LIMIT_S means it is gone
HEARTBEAT_LIMIT_S: Final = 10.0

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # what a column can hold; decoding checks it
BUBBLE_NS: Final = 20_000  # a stream takes a few us from one queued step to the next; that is not waiting for a host
RECONNECT_LIMIT_S: Final = 30.0  # open requests wait this long for a scheduler that went away


class FinishReason(IntEnum):
    """Why a request ended. RUNNING rows carry a token and are not the last."""

    RUNNING = 0
    STOP = 1  # end of sequence or a stop id; that token is the last one sent
    LENGTH = 2  # max_tokens or the context limit
    ABORTED = 3  # its owner asked for it
    INVALID_LOGITS = 4  # the model produced NaN; carries no token
    SLOW_CONSUMER = 5  # its frontend did not read; carries no token
    CRASHED = 6  # the executor crashed twice in a row in a step of it; carries no token
    INVALID_GRAMMAR = 7  # its grammar ran into a limit or a dead end; carries no token


class Message(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """Base of all messages. Fields are only ever added at the end, with defaults."""


class SamplingParams(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """How tokens of one request are chosen. The frontend validates; the scheduler checks what would harm others."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # any int64; the frontend draws one when the user gave none
    logprobs: int = -1  # -1 = none, 0 = the sampled token, N = the N most probable too
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: int = -1  # like logprobs, of each prompt token but the first


class ModelCard(msgspec.Struct, frozen=True, array_like=True):
    """What a frontend must know of the model to serve it."""

    name: str  # as served
    path: str  # folder with the tokenizer
    max_model_len: int  # in a Welcome: what also fits the KV cache
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_logprobs: int
    sampling_defaults: dict[str, float] = {}  # of requests over HTTP that do not say, by name in SamplingParams


class Hello(Message, frozen=True, tag="hello"):
    """First message of a peer. A peer of another version is answered with Rejected(request_id=-1)."""

    version: int
    role: str  # "frontend" or "launcher"
    name: str  # for logs and metrics
    pid: int


class Welcome(Message, frozen=True, tag="welcome"):
    version: int
    ready: bool  # False until an executor is attached; a second Welcome follows then
    card: ModelCard
    epoch: int  # which executor life serves now
    num_blocks: int
    block_size: int


class Paused(Message, frozen=True, tag="paused"):
    """The executor is being replaced; what is open, or admitted meanwhile, waits. A Welcome follows when it runs."""


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    sent_ns: int
    left: int = (
        -1
    )  # to a directory that drains: open sequences of this client, wherever they run; -1: not told to drain


class Goodbye(Message, frozen=True, tag="goodbye"):
    """A frontend leaves: its open requests are aborted."""


class Admit(Message, frozen=True, tag="admit"):
    """One sequence to continue. `request_id` is unique within its frontend's connection."""

    request_id: Int64
    prompt: bytes  # packed int32 [prompt tokens]
    params: SamplingParams
    priority: Int64 = 0  # lower runs first
    cache_salt: str = ""
    output: bytes = b""  # packed int32: tokens already received, when a request is replayed to a new scheduler
    replay: bool = False  # it was admitted before, by a scheduler that died: limits on new requests do not apply
    scored: int = 0  # in a replay: leading prompt positions whose log-probabilities were received
    grammar: str = ""  # what the output must match, as llguidance takes it; empty: anything


class Abort(Message, frozen=True, tag="abort"):
    """End requests early: those whose owner gave them up, and those whose text reached a stop string."""

    request_ids: list[int]
    stopped_ids: list[int] = []


class Rejected(Message, frozen=True, tag="rejected"):
    """The request was not taken, or cannot be continued. Terminal."""

    request_id: int
    code: str
    message: str
    param: str | None = None


class Logprobs(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Log-probabilities of rows of a Tokens frame. Packed columns over the rows named by `row`."""

    row: bytes  # int32 [n], index into the frame's rows, or into its scored_id
    logprob: bytes  # float32 [n]
    rank: bytes  # int32 [n]
    width: int  # N of the widest request
    top_token: bytes  # int32 [n, width]
    top_logprob: bytes  # float32 [n, width]


class Tokens(Message, frozen=True, tag="tokens"):
    """What one step, or several coalesced ones, brought a frontend. Columns over rows; rows of a request in order."""

    request_id: bytes  # int64 [rows]
    token: bytes  # int32 [rows]
    finish: bytes  # uint8 [rows], FinishReason
    started_id: bytes = b""  # int64 [started]: requests that left the queue
    started_cached: bytes = b""  # int32 [started]: their prompt tokens found in the prefix cache
    logprobs: Logprobs | None = None
    scored_id: bytes = b""  # int64 [scored]: whose prompt the rows of `scores` are of, each prompt in order
    scores: Logprobs | None = None
    running: int = -1  # in the scheduler, after this frame; the three make its load. -1: it does not say
    waiting: int = 0
    queued_tokens: int = 0  # of those that wait


class Draining(Message, frozen=True, tag="draining"):
    """No new request is taken any more; open ones finish."""


class GetStats(Message, frozen=True, tag="get_stats"):
    """Ask for a Stats message at once; one answers every Heartbeat anyway."""

    restart_longest: bool = False  # after the answer, `longest_*` begin anew: for whoever measures a span of time


class PeerStats(msgspec.Struct, frozen=True, gc=False):
    """One client of a scheduler: a frontend, or a Python program."""

    name: str
    pid: int  # on its host
    requests: int  # open now, waiting ones included
    tokens: int  # sent to it since it connected
    backlog_rows: int  # now: made, and not yet taken by its socket


class Stats(Message, frozen=True, tag="stats"):
    """Counters since start unless said otherwise. Times in nanoseconds."""

    epoch: int
    running: int  # now
    waiting: int  # now
    inflight: int  # plans now
    blocks_total: int
    blocks_free: int  # now, cached ones included
    steps: int
    hidden_steps: int  # steps that were queued before the device ran dry
    prompt_tokens: int
    generation_tokens: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    overshoot_rows: int  # rows that ran for a request already ended or preempted
    requests_finished: dict[str, int]  # by reason
    requests_rejected: int
    device_ns: int  # compute stream busy
    bubble_ns: int  # compute stream idle while there was work
    plan_ns: int  # scheduler: planning
    retire_ns: int  # scheduler: retiring
    launch_ns: int  # executor: launch thread
    step_age_ns: int  # since a result last arrived while plans are in flight; 0 when idle
    dropped_messages: int  # undecodable or unroutable; must stay 0
    frontends: int
    draining: bool
    bubbles: int = 0  # gaps of the compute stream while there was work that were longer than BUBBLE_NS
    longest_bubble_ns: int = 0  # since the start, or since somebody had it begin anew
    longest_step_ns: int = 0  # likewise, on the device
    compilations: int = 0  # kernels compiled and graphs captured while serving; must stay 0
    histograms: bytes = b""  # ipc.histograms
    queued_tokens: int = 0  # now, of those that wait
    peers: list[PeerStats] = []


class GetInvariants(Message, frozen=True, tag="get_invariants"):
    """Ask for Invariants, if the engine was started with debug endpoints."""


class Invariants(Message, frozen=True, tag="invariants"):
    """The parts of the scheduler's state that must add up, taken at one instant between two steps."""

    violations: list[str]  # empty if all holds
    requests: int
    running: int
    waiting: int
    slots_total: int
    slots_free: int
    blocks_total: int
    blocks_free: int  # nobody owns them; with or without cached content
    blocks_cached: int  # of the free ones, those that a prefix hit can revive
    blocks_owned: int
    plans_in_flight: int
    plan_published: int  # sequence number in the plan ring
    plan_acked: int
    result_published: int
    result_acked: int
    backlog_rows: int  # not yet sent to frontends
    frontends: int
    epoch: int


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One replica of an engine, as its clients see it."""

    number: int  # what metrics call it; never given to another one
    endpoint: str  # of its scheduler, for processes of the directory's host
    remote: str = ""  # the same for other hosts: tcp with CURVE; empty if there is none


class Members(Message, frozen=True, tag="members"):
    """All replicas there are now. Who is not listed has left: its open requests belong elsewhere."""

    version: int
    members: list[Member]


class Join(Message, frozen=True, tag="join"):
    """Replicas of a launcher elsewhere serve here too, for as long as this is repeated; numbers are the directory's."""

    version: int
    pid: int
    members: list[Member]


FrontendMessage = Hello | Heartbeat | Admit | Abort | GetStats | GetInvariants | Goodbye
SchedulerMessage = Welcome | Tokens | Rejected | Stats | Invariants | Draining | Paused | Members
DirectoryMessage = Hello | Heartbeat | Goodbye | Join

encode: Final = msgspec.msgpack.Encoder().encode


class Decoder:
    """Typed decoding of one direction of one socket; anything else is a ProtocolError."""

    def __init__(self, messages: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(messages)

    def __call__(self, payload: bytes | memoryview) -> Any:
        try:
            return self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"undecodable message of {len(payload)} bytes: {error}") from error


decode_frontend: Final = Decoder(FrontendMessage)
decode_scheduler: Final = Decoder(SchedulerMessage)
decode_directory: Final = Decoder(DirectoryMessage)


def pack_tokens(tokens: Sequence[int] | npt.NDArray[np.int32]) -> bytes:
    """Token ids as packed int32 bytes. Raises OverflowError for an id outside int32."""
    return np.asarray(tokens, dtype=np.int32).tobytes()


def unpack_tokens(payload: bytes) -> npt.NDArray[np.int32]:
    """Read-only int32 view of packed token ids; raises ProtocolError if the length is not a multiple of 4."""
    if len(payload) % 4:
        raise ProtocolError(f"packed token ids have {len(payload)} bytes, not a multiple of 4")
    return np.frombuffer(payload, np.int32)
