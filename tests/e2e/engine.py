"""A real engine in its own processes, for tests: started by `engine-launch`, stopped by SIGTERM, bounded everywhere."""

from __future__ import annotations

import contextlib
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

DEMO_MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
START_LIMIT_S = 180
STOP_LIMIT_S = 60


@dataclass
class Engine:
    """A serving engine: its HTTP address, its ZMQ endpoint, its launcher."""

    url: str  # ends in /v1; empty without HTTP frontends
    endpoint: str
    process: subprocess.Popen[str]
    tcp: str = ""  # its endpoint for other hosts, if it has one

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def children(self) -> dict[str, psutil.Process]:
        """Processes of this engine by role, as ps shows them."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
                if match := re.search(r"engine-launch: (\w+)", " ".join(child.cmdline())):
                    found[match.group(1)] = child
        return found

    def stop(self) -> int:
        """SIGTERM, then wait; stacks of every process go to stderr if that takes too long."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            dump_stacks(self.process.pid)
            self.process.kill()
            raise


def dump_stacks(launcher: int) -> None:
    """Every child prints its stacks to stderr (SIGUSR1 is armed in each)."""
    for child in psutil.Process(launcher).children(recursive=True):
        child.send_signal(signal.SIGUSR1)


def read_line(process: subprocess.Popen[str], limit_s: float) -> str:
    """One line of the launcher's stdout, or a failure with stacks after `limit_s`."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], limit_s)
    if not readable:
        dump_stacks(process.pid)
        raise AssertionError(f"the engine printed nothing for {limit_s} s")
    return process.stdout.readline()


@contextlib.contextmanager
def running_engine(
    *flags: str,
    model: Path | str = DEMO_MODEL,
    exit_code: int = 0,
    stderr: IO[str] | None = None,
    on_awaiting: Callable[[str], object] | None = None,
) -> Iterator[Engine]:
    """An engine with the given flags on a free port; checks on leaving that it ends with `exit_code`.

    `on_awaiting`: called with the port where it waits for further nodes.
    """
    command = [sys.executable, "-P", "-m", "frontend.launch", "--model", str(model), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        line = read_line(process, START_LIMIT_S)
        if on_awaiting is not None:
            on_awaiting(line.rpartition(":")[2].strip())
            line = read_line(process, START_LIMIT_S)
        url, endpoint = re.search(r"http://\S+/v1", line), re.search(r"ipc://\S+\.sock", line)
        assert endpoint, f"no ZMQ endpoint in {line!r}"
        tcp = re.search(r"tcp://\S+", line)
        engine = Engine(url.group() if url else "", endpoint.group(), process, tcp.group() if tcp else "")
        yield engine
        assert engine.stop() == exit_code
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until(condition: object, limit_s: float, what: str) -> None:
    """Poll a condition of another process; fails after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.02)
