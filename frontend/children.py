"""Child processes of the launcher: what they inherit, how one is started, and what it last said.

Used by the supervisor only. Holds the sole write end of the death pipe: when the launcher is gone, children see it.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import socket
import subprocess
import sys
import termios
from typing import Final

import msgspec

from ipc.config import (
    RING_SLOTS,
    EngineConfig,
    ExecutorChannels,
    FrontendChannels,
    SchedulerChannels,
    write_start,
)
from ipc.doorbell import Doorbell
from ipc.ring import create_ring
from ipc.sockets import EndpointDirectory
from ipc.trace import MAX_FRONTENDS

_TAIL_BYTES: Final = 32 << 10
TRACEBACK: Final = "Traceback (most recent call last):"
_READ_BYTES: Final = 64 << 10


class Plumbing:
    """What outlives a child: endpoints, rings, bells, the death pipe, the HTTP socket. Closing it leaves nothing."""

    def __init__(self, config: EngineConfig, listener: socket.socket | None, trace: int = -1) -> None:
        """`trace`: memory of the step trace, -1 for none."""
        self.listener = listener
        self._trace = trace
        self._frontends_started = itertools.count()
        self.plan_ring = create_ring(RING_SLOTS, config.limits.plan_bytes, config.ranks)
        self.result_ring = create_ring(RING_SLOTS, config.result_layout.nbytes)
        self.plan_bells = [Doorbell.create() for _ in range(config.ranks)]
        self.result_bell = Doorbell.create()
        self._rendezvous = (-1, -1)  # (epoch, memory file) of the executor's youngest life
        self.ready_bell = Doorbell.create()  # its count adds up: one for each frontend that can serve
        self.parent_pipe, self._death_pipe = os.pipe2(os.O_CLOEXEC)
        self.endpoints = EndpointDirectory()

    @property
    def _traces(self) -> tuple[int, ...]:
        return () if self._trace < 0 else (self._trace,)

    def scheduler(self, life: int) -> tuple[SchedulerChannels, list[int]]:
        """The channels of the scheduler's life number `life`, and the fds among them."""
        channels = SchedulerChannels(
            plan_ring=self.plan_ring,
            plan_bells=tuple(bell.fd for bell in self.plan_bells),
            result_ring=self.result_ring,
            result_bell=self.result_bell.fd,
            frontend=self.endpoints.frontend,
            control=self.endpoints.control,
            parent_pipe=self.parent_pipe,
            life=life,
            trace=self._trace,
        )
        return channels, self._ring_fds

    @property
    def _ring_fds(self) -> list[int]:
        """What both ends of the rings inherit."""
        bells = [bell.fd for bell in self.plan_bells]
        return [self.plan_ring, *bells, self.result_ring, self.result_bell.fd, self.parent_pipe, *self._traces]

    def executor(self, epoch: int, rank: int) -> tuple[ExecutorChannels, list[int]]:
        """The channels of a rank of an executor whose first epoch is `epoch`, and the fds among them."""
        channels = ExecutorChannels(
            epoch=epoch,
            rank=rank,
            rendezvous=self._meet(epoch),
            plan_ring=self.plan_ring,
            plan_bell=self.plan_bells[rank].fd,
            result_ring=self.result_ring,
            result_bell=self.result_bell.fd,
            control=self.endpoints.control,
            parent_pipe=self.parent_pipe,
            trace=-1 if rank else self._trace,
        )
        return channels, [*self._ring_fds, channels.rendezvous]

    def _meet(self, epoch: int) -> int:
        """The memory file where the ranks that start in `epoch` meet: an empty one, whatever an earlier life left."""
        if self._rendezvous[0] != epoch:
            if self._rendezvous[1] >= 0:
                os.close(self._rendezvous[1])
            self._rendezvous = epoch, os.memfd_create("tandem-ranks", os.MFD_CLOEXEC)
        return self._rendezvous[1]

    def frontend(self, life: int) -> tuple[FrontendChannels, list[int]]:
        """A serving frontend's channels, and the fds among them; `life` counts those that were restarted."""
        assert self.listener is not None, "an engine without an HTTP socket has no frontends"
        channels = FrontendChannels(
            scheduler=self.endpoints.frontend,
            listen_fd=self.listener.fileno(),
            ready_bell=self.ready_bell.fd,
            index=next(self._frontends_started) % MAX_FRONTENDS,
            parent_pipe=self.parent_pipe,
            life=life,
            trace=self._trace,
        )
        return channels, [channels.listen_fd, channels.ready_bell, channels.parent_pipe, *self._traces]

    def close(self) -> None:
        self.endpoints.close()
        for bell in (*self.plan_bells, self.result_bell, self.ready_bell):
            bell.close()
        if self._rendezvous[1] >= 0:
            os.close(self._rendezvous[1])
        for fd in (self.plan_ring, self.result_ring, self.parent_pipe, self._death_pipe):
            os.close(fd)


class Child:
    """One running process. Its stderr passes through the launcher, so that the first failure can be shown last."""

    def __init__(
        self, role: str, index: int, module: str, config: EngineConfig, channels: msgspec.Struct, fds: list[int]
    ) -> None:
        self.role, self.index = role, index  # index: the rank of an executor
        self.tail = bytearray()  # the last of what it wrote to stderr
        self.ended_for = ""  # why the launcher ended it
        start = write_start(config, channels)
        self.stderr, writer = _stderr_pair(terminal=index == 0)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, "--start-fd", str(start)],
                stdin=subprocess.DEVNULL,
                stderr=writer,
                pass_fds=[start, *fds],
                start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone
            )
        finally:
            os.close(start)
            os.close(writer)
        os.set_blocking(self.stderr, False)
        self.pidfd = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def forward_stderr(self) -> bytes | None:
        """Pass on what the child wrote since the last call: None if nothing, b"" once it has closed its stderr."""
        try:
            text = os.read(self.stderr, _READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:  # a terminal whose other end is closed
            return b""
        self.tail += text
        del self.tail[:-_TAIL_BYTES]
        _write_all(sys.stderr.fileno(), text)
        return text

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def reap(self) -> int:
        """Exit code of a child whose pidfd is readable: negative for a signal. Closes its fds."""
        code = self._process.wait()
        while self.forward_stderr():
            pass
        os.close(self.pidfd)
        os.close(self.stderr)
        return code

    def failure(self) -> str:
        """The last traceback it printed, or why it was ended and its last lines."""
        text = self.tail.decode(errors="replace").replace("\r\n", "\n").rstrip()
        start = text.rfind(TRACEBACK)
        if start >= 0:
            return text[start:]
        return "\n".join(filter(None, (self.ended_for, *text.splitlines()[-20:])))


def _stderr_pair(terminal: bool) -> tuple[int, int]:
    """(read end, write end): a terminal if ours is one and progress bars shall show, else a pipe."""
    if not terminal or not sys.stderr.isatty():
        return os.pipe2(os.O_CLOEXEC)
    reader, writer = os.openpty()
    size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
    fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
    return reader, writer


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
