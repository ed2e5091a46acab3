"""What outlives the processes of an engine: endpoints, rings, bells, the death pipe, the HTTP socket.

Made by `engine-launch` before anything starts, used by its supervisor; closing it leaves nothing. Holds the sole write
end of the death pipe: when the launcher is gone, children see it.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from ipc.config import (
    RING_SLOTS,
    EngineConfig,
    ExecutorChannels,
    FrontendChannels,
    RelayChannels,
    SchedulerChannels,
)
from ipc.doorbell import Doorbell
from ipc.ring import create_ring
from ipc.sockets import EndpointDirectory
from ipc.trace import MAX_FRONTENDS


class Plumbing:
    """Of the whole engine: what frontends inherit, and the lines of each replica."""

    def __init__(
        self,
        config: EngineConfig,
        listener: socket.socket | None,
        trace: int = -1,
        *,
        replicas: int = 1,
        nodes: socket.socket | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """`trace`: memory of the step trace, -1 for none. `nodes`: where other
        nodes with ranks of the only replica connect; `elsewhere`: on such a node."""
        self.listener = listener
        self._trace = trace
        self._frontends_started = itertools.count()
        self.ready_bell = Doorbell.create()  # its count adds up: one for each frontend that can serve
        self.parent_pipe, self._death_pipe = os.pipe2(os.O_CLOEXEC)
        self.endpoints = EndpointDirectory()
        self.lines: list[Lines] = []
        try:
            for number in range(replicas):
                endpoints = self.endpoints.replica(number)
                self.lines.append(Lines(config, endpoints, self.parent_pipe, trace, nodes, elsewhere))
        except OSError:
            self.close()
            raise

    def frontend(self, life: int) -> tuple[FrontendChannels, list[int]]:
        """A serving frontend's channels, and the fds among them; `life` counts those that were restarted."""
        assert self.listener is not None, "an engine without an HTTP socket has no frontends"
        channels = FrontendChannels(
            directory=self.endpoints.frontend,
            listen_fd=self.listener.fileno(),
            ready_bell=self.ready_bell.fd,
            index=next(self._frontends_started) % MAX_FRONTENDS,
            parent_pipe=self.parent_pipe,
            life=life,
            trace=self._trace,
        )
        return channels, [channels.listen_fd, channels.ready_bell, channels.parent_pipe, *_present(self._trace)]

    def close(self) -> None:
        self.endpoints.close()
        for lines in self.lines:
            lines.close()
        self.ready_bell.close()
        for fd in (self.parent_pipe, self._death_pipe):
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What the ranks of a node without the scheduler go by."""

    node: int  # from 1
    head: int  # of the scheduler's plan ring
    store: str  # HOST:PORT where all ranks meet


class Lines:
    """Of one replica: the rings and bells between its scheduler and its ranks, and the endpoints of the scheduler.

    On a node without the scheduler: the same for the ranks there.
    """

    def __init__(
        self,
        config: EngineConfig,
        endpoints: tuple[str, str],
        parent_pipe: int,
        trace: int = -1,
        nodes: socket.socket | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """`endpoints`: of its frontend and control sockets. Raises OSError if /dev/shm cannot hold the rings."""
        self.frontend, self.control = endpoints
        self._parent_pipe = parent_pipe
        self._trace = trace
        self._nodes = nodes
        self._ranks_here = config.ranks_per_node
        self._first_rank, head = 0, 0
        self._store = ""
        if elsewhere is not None:
            self._first_rank, head = elsewhere.node * self._ranks_here, elsewhere.head
            self._store = elsewhere.store
        readers = self._ranks_here + (nodes is not None)  # ranks, and the relay
        self.plan_ring = create_ring(RING_SLOTS, config.limits.plan_bytes, readers, head=head)
        try:
            self.result_ring = create_ring(RING_SLOTS, config.result_layout.nbytes)
        except OSError:
            os.close(self.plan_ring)
            raise
        self.plan_bells = [Doorbell.create() for _ in range(readers)]
        self.result_bell = Doorbell.create()
        self._rendezvous = (-1, -1)  # (epoch, memory file) of the executor's youngest life

    @property
    def _fds(self) -> list[int]:
        """What both ends of the rings inherit."""
        bells = [bell.fd for bell in self.plan_bells]
        rings = [self.plan_ring, self.result_ring]
        return [*rings, *bells, self.result_bell.fd, self._parent_pipe, *_present(self._trace)]

    def scheduler(self, life: int, epoch: int) -> tuple[SchedulerChannels, list[int]]:
        """The channels of the scheduler's life number `life`, whose first epoch this is, and the fds among them."""
        channels = SchedulerChannels(
            plan_ring=self.plan_ring,
            plan_bell=self.plan_bells[0].fd,
            result_ring=self.result_ring,
            result_bell=self.result_bell.fd,
            frontend=self.frontend,
            control=self.control,
            parent_pipe=self._parent_pipe,
            life=life,
            epoch=epoch,
            trace=self._trace,
        )
        return channels, self._fds

    def executor(self, epoch: int, place: int) -> tuple[ExecutorChannels | RelayChannels, list[int]]:
        """The channels of a rank of this node, or of the relay that follows them, and the fds among them. `epoch`: the
        executor's first."""
        rendezvous = self._meet(epoch)
        if place == self._ranks_here:
            return self._relay(epoch, place)
        rank = self._first_rank + place
        channels = ExecutorChannels(
            epoch=epoch,
            rank=rank,
            place=place,
            rendezvous=rendezvous,
            store=self._store,
            plan_ring=self.plan_ring,
            plan_bell=self.plan_bells[place].fd,
            next_bells=tuple(bell.fd for bell in self.plan_bells[2 * place + 1 : 2 * place + 3]),  # a binary tree
            result_ring=self.result_ring,
            result_bell=self.result_bell.fd,
            control=self.control,
            parent_pipe=self._parent_pipe,
            trace=-1 if rank else self._trace,
        )
        return channels, [*self._fds, *_present(rendezvous)]

    def _relay(self, epoch: int, place: int) -> tuple[RelayChannels, list[int]]:
        assert self._nodes is not None, "only ranks elsewhere need a relay"
        channels = RelayChannels(
            epoch=epoch,
            place=place,
            plan_ring=self.plan_ring,
            plan_bell=self.plan_bells[place].fd,
            result_bell=self.result_bell.fd,
            control=self.control,
            listener=self._nodes.fileno(),
            store=self._store,
            parent_pipe=self._parent_pipe,
        )
        return channels, [*self._fds, channels.listener]

    def _meet(self, epoch: int) -> int:
        """Where the ranks that start in `epoch` meet, a new place for each: a memory file, or rank 0's listener for
        those of other nodes. -1 where rank 0 is not."""
        if self._first_rank:
            return -1
        if self._rendezvous[0] != epoch:
            for old in _present(self._rendezvous[1]):
                os.close(old)
            if self._nodes is None:
                self._rendezvous = epoch, os.memfd_create("tandem-ranks", os.MFD_CLOEXEC)
            else:
                listener = socket.create_server((self._nodes.getsockname()[0], 0), family=self._nodes.family)
                self._store = address_of(listener)
                self._rendezvous = epoch, listener.detach()
        return self._rendezvous[1]

    def close(self) -> None:
        for bell in (*self.plan_bells, self.result_bell):
            bell.close()
        for fd in (self.plan_ring, self.result_ring, *_present(self._rendezvous[1])):
            os.close(fd)


def address_of(listener: socket.socket) -> str:
    """HOST:PORT of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{host}:{port}"


def _present(fd: int) -> Sequence[int]:
    return () if fd < 0 else (fd,)
