"""Messages about the lives of processes, apart from requests: between launcher, scheduler, executors and nodes.

Structs as those of ipc/schema.py, on sockets of their own.

    launcher  -> scheduler   Hello, ExecutorHello, ExecutorLost, Drain
    executor  -> scheduler   ExecutorHello
    scheduler -> launcher    Alive, SchedulerReady, Drained, ExecutorStuck, ExecutorFaulty, FrontendStuck
    node      -> relay       NodeHello, Heartbeat, ExecutorHello, PlanAck, RanksLost    (of ranks on another node)
    relay     -> node        StartRanks, Heartbeat, PlanFrame, Goodbye, Rejected
"""

from __future__ import annotations

from typing import Final

from ipc.schema import Decoder, Goodbye, Heartbeat, Hello, Message, Rejected


class ExecutorHello(Message, frozen=True, tag="executor_hello"):
    """A rank is attached to the rings and ready to run; plans are sent once all have said so. `num_blocks` counts the
    null block.

    After the scheduler was restarted the launcher says it for ranks that were attached before, with a new epoch.
    """

    version: int
    epoch: int
    pid: int
    num_blocks: int
    rank: int = 0


class ExecutorLost(Message, frozen=True, tag="executor_lost"):
    """The ranks of this epoch are gone; running requests wait with their tokens for the next ones."""

    epoch: int


class Drain(Message, frozen=True, tag="drain"):
    """Take no new request; answer Drained when the last open one ends. A second Drain with abort ends them now."""

    abort: bool = False


class Drained(Message, frozen=True, tag="drained"):
    pass


class Alive(Message, frozen=True, tag="alive"):
    """The scheduler's loop turns; sent every HEARTBEAT_S."""


class SchedulerReady(Message, frozen=True, tag="scheduler_ready"):
    """An executor is attached and requests are served."""

    epoch: int
    max_model_len: int
    kv_tokens: int
    tcp_endpoint: str = ""  # as bound, with its port, for frontends of other hosts


class ExecutorStuck(Message, frozen=True, tag="executor_stuck"):
    """No result for `age_s` seconds while plans are in flight."""

    epoch: int
    age_s: float


class ExecutorFaulty(Message, frozen=True, tag="executor_faulty"):
    """It published what no executor could have made of its plans. Said at each heartbeat until another one comes."""

    epoch: int
    reason: str


class FrontendStuck(Message, frozen=True, tag="frontend_stuck"):
    """A frontend was silent for HEARTBEAT_LIMIT_S; its requests were aborted."""

    pid: int


class NodeHello(Message, frozen=True, tag="node_hello"):
    """A node that will run ranks of this replica, and runs none yet."""

    version: int
    node: int  # from 1: the scheduler's is 0


class StartRanks(Message, frozen=True, tag="start_ranks"):
    """Start this node's ranks, for as long as this connection lasts."""

    version: int
    config: bytes  # EngineConfig, as the scheduler's node has it
    epoch: int
    head: int  # of the plan ring: the first frame that comes is the next one
    store: str  # HOST:PORT where the ranks find each other


class PlanFrame(Message, frozen=True, tag="plan_frame"):
    """One plan, as it stands in the ring."""

    seq: int
    payload: bytes


class PlanAck(Message, frozen=True, tag="plan_ack"):
    """Every rank of this node has given back the plans up to this one."""

    seq: int


class RanksLost(Message, frozen=True, tag="ranks_lost"):
    """A rank of this node has ended, and with it the life of all."""

    reason: str
    fault_of_user: bool = False  # it would come again


ControlMessage = Hello | ExecutorHello | ExecutorLost | Drain
LauncherMessage = Alive | SchedulerReady | Drained | ExecutorStuck | ExecutorFaulty | FrontendStuck
NodeMessage = NodeHello | Heartbeat | ExecutorHello | PlanAck | RanksLost
RelayMessage = StartRanks | Heartbeat | PlanFrame | Goodbye | Rejected

decode_control: Final = Decoder(ControlMessage)
decode_launcher: Final = Decoder(LauncherMessage)
decode_node: Final = Decoder(NodeMessage)
decode_relay: Final = Decoder(RelayMessage)
