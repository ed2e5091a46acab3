"""What every process is told at its start: one frozen EngineConfig and the channels it inherits."""

from __future__ import annotations

import mmap
import os
from typing import Any, ClassVar, Final, TypeVar

import msgspec

from ipc.frames import FrameLimits
from ipc.logs import LogConfig
from ipc.results import ResultLayout
from ipc.schema import ModelCard

RING_SLOTS: Final = 4  # more than any depth: a slot is reused only after its step has retired
MAX_DEPTH: Final = 3


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a serving frontend is told, whether the launcher or a user starts it."""

    watchdog_timeout_s: float = 60.0
    shutdown_timeout_s: float = 30.0  # for open responses after SIGTERM
    request_timeout_s: float | None = None
    queue_timeout_s: float | None = None
    metrics_prefix: str = "engine"
    chat_template: str | None = None  # jinja text, instead of the model's own
    tool_call_parser: str | None = None  # None: as the chat template suggests
    api_key_digests: tuple[str, ...] = ()  # SHA-256 of the keys; none: the API is open
    isolate_api_keys: bool = False
    allowed_origins: tuple[str, ...] = ()  # of web pages whose scripts may call the API; "*": of any


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One engine: its model, limits and policies. Automatic choices that need no GPU are made before this exists."""

    card: ModelCard
    dtype: str = "auto"
    device: str = "cpu"  # "cpu" or "cuda"
    random_weights: bool = False  # keep the initial weights: for benchmarks of shapes
    random_seed: int = 0
    trust_remote_code: bool = False
    enforce_eager: bool = False  # no CUDA graphs
    compile: bool = False  # run the fused decoder, or compile the layers
    replica: int | None = None  # which one of several
    ranks: int = 1  # executor processes that share the model: tensor parallel
    nodes: int = 1  # that hold these ranks, as many each; the scheduler is on the first one
    nodes_endpoint: str = ""  # tcp://HOST:PORT of the first node, where the others find the relay
    fake_executor: bool = False  # ranks without a model
    sums_by_peers: bool = True  # GPUs write rows to each other where that is possible; else NCCL sums them
    block_size: int = 16
    num_blocks: int | None = None  # None: profile a full step and take the rest of the memory
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_prefill_chunk: int | None = None  # tokens one request may prefill in a step; None: the whole budget
    enable_prefix_caching: bool = True
    pipeline_depth: int = 2  # steps in flight; 0: chosen by their length
    max_num_queued_reqs: int = 100_000
    max_num_queued_tokens: int | None = None  # None: no limit but that on requests
    watchdog_timeout_s: float = 60.0
    frontend_endpoint: str = ""  # tcp://HOST:PORT for frontends of other hosts, beside the private ipc one
    auth_keys: str = ""  # key folder of the engine; needed for it
    http: HttpConfig = HttpConfig()
    log: LogConfig = LogConfig()
    log_stats: bool = True  # a line every ten seconds of work
    debug_endpoints: bool = False  # answer GetInvariants

    def title(self, role: str) -> str:
        """What a process of this replica is called in ps and in logs."""
        return role if self.replica is None else f"{role} of replica {self.replica}"

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    @property
    def limits(self) -> FrameLimits:
        return FrameLimits(
            max_rows=self.max_num_seqs,
            max_tokens=self.max_num_batched_tokens,
            max_seq_len=self.card.max_model_len,
            block_size=self.block_size,
            max_logprobs=self.card.max_logprobs,
            vocab_size=self.card.vocab_size,
        )

    @property
    def max_depth(self) -> int:
        """Steps that may ever be in flight."""
        return self.pipeline_depth or MAX_DEPTH

    @property
    def result_layout(self) -> ResultLayout:
        return ResultLayout(self.limits.max_results, self.card.max_logprobs)


class Channels(msgspec.Struct, frozen=True, kw_only=True):
    """Inherited by a child of the launcher: file descriptors and endpoints."""

    name: ClassVar[str]
    parent_pipe: int  # reads end-of-file when the launcher dies

    @property
    def role(self) -> str:
        """What the process is called in ps and in its errors."""
        return self.name


class ExecutorChannels(Channels, frozen=True, kw_only=True):
    """Inherited by an executor rank."""

    name = "executor"
    epoch: int  # counts lives of scheduler and executor together: plans of an earlier one are not run
    rank: int = 0  # of `EngineConfig.ranks`, all of which read the same plans
    place: int = 0  # among the ranks of its node: which device, and which reader of the ring
    rendezvous: int = -1  # where the ranks of one life find each other: an empty memory file, or rank 0's listener
    store: str = ""  # HOST:PORT of that listener, if there are ranks on other nodes
    plan_ring: int
    plan_bell: int
    next_bells: tuple[int, ...] = ()  # of the readers that this one wakes for each plan
    result_ring: int
    result_bell: int
    control: str  # the scheduler's endpoint
    trace: int = -1  # memory of the step trace; -1: nothing is traced

    @property
    def role(self) -> str:
        return f"{self.name} {self.rank}" if self.rank else self.name


class RelayChannels(Channels, frozen=True, kw_only=True):
    """Inherited by the relay, which stands for the ranks on other nodes."""

    name = "relay"
    epoch: int
    place: int  # which reader of the plan ring
    plan_ring: int
    plan_bell: int
    result_bell: int
    control: str
    listener: int  # bound and listening at `EngineConfig.nodes_endpoint`
    store: str  # as for a rank


class SchedulerChannels(Channels, frozen=True, kw_only=True):
    """Inherited by the scheduler."""

    name = "scheduler"
    plan_ring: int
    plan_bell: int  # of the first reader, who wakes others: ranks, and the relay
    result_ring: int
    result_bell: int
    frontend: str  # endpoint to bind
    control: str  # endpoint to bind
    trace: int = -1
    life: int = 0  # how many schedulers of this engine came before; their frontends come back
    epoch: int = 0  # executors of earlier ones have ended


class FrontendChannels(Channels, frozen=True, kw_only=True):
    """Inherited by a serving frontend that the launcher started."""

    name = "frontend"
    directory: str  # endpoint to connect to: it says where the schedulers are
    listen_fd: int  # the bound HTTP socket, shared by all frontends
    ready_bell: int  # rung once when this frontend can serve
    index: int = 0  # which frontend of this engine
    trace: int = -1
    life: int = 0  # how many frontends were restarted before


ChannelsT = TypeVar("ChannelsT", bound=Channels)


class ProcessStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a child reads from the fd in its argument: nothing secret or long ever stands in argv."""

    config: dict[str, Any]
    channels: dict[str, Any]


def write_start(config: msgspec.Struct, channels: msgspec.Struct) -> int:
    """A memory file with the start of one child; pass the returned fd on and close it after the fork."""
    payload = msgspec.msgpack.encode(
        ProcessStart(config=msgspec.to_builtins(config), channels=msgspec.to_builtins(channels))
    )
    fd = os.memfd_create("tandem-start", os.MFD_CLOEXEC)
    os.write(fd, payload)
    return fd


def read_start(fd: int, channels: type[ChannelsT]) -> tuple[EngineConfig, ChannelsT]:
    """The other end of `write_start`; closes `fd`."""
    with mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ) as memory:
        start = msgspec.msgpack.decode(memory[:], type=ProcessStart)
    os.close(fd)
    config = msgspec.convert(start.config, EngineConfig, strict=False)
    return config, msgspec.convert(start.channels, channels, strict=False)
