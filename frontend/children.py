"""Child processes of a launcher: which there are, how one is started, and what it last said."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from ipc.config import EngineConfig, write_start
from ipc.logs import write_stderr

_TAIL_BYTES: Final = 32 << 10
TRACEBACK: Final = "Traceback (most recent call last):"
_READ_BYTES: Final = 64 << 10
NO_REPLICA: Final = -1


@dataclass(frozen=True, slots=True)
class Role:
    """One kind of process: the module that is its entry, and how many of it there are, in each replica if it is its."""

    module: str
    count: int
    last: str = ""  # the module of the last one, if it is another


def engine_roles(
    frontends: int, *, ranks: int = 1, relay: bool = False, fake_executor: bool = False
) -> dict[str, Role]:
    """The processes of an engine in the order of their start; they stop in the opposite order. `ranks`: here; a relay
    stands for those on other nodes, and lives and dies as one of them."""
    return {
        "scheduler": Role("scheduler", 1),
        "executor": Role(executor_module(fake_executor), ranks + relay, "executor.relay" if relay else ""),
        "frontend": Role("frontend", frontends),
    }


def executor_module(fake: bool) -> str:
    return "executor.fake" if fake else "executor"


class Child:
    """One running process. Its stderr passes through the launcher, so that the first failure can be shown last."""

    def __init__(
        self,
        role: str,
        index: int,
        module: str,
        config: EngineConfig,
        channels: msgspec.Struct,
        fds: list[int],
        *,
        replica: int = NO_REPLICA,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`index`: the rank of an executor. `environment`: what it has beside the launcher's."""
        self.role, self.index, self.replica = role, index, replica
        self.tail = bytearray()  # the last of what it wrote to stderr
        self.ended_for = ""  # why the launcher ended it
        start = write_start(config, channels)
        self.stderr, writer = _stderr_pair(terminal=index == 0 and replica <= 0)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, "--start-fd", str(start)],
                stdin=subprocess.DEVNULL,
                stderr=writer,
                pass_fds=[start, *fds],
                env={**os.environ, **(environment or {})},
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
        write_stderr(text)
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
