"""An engine for a benchmark: started by `engine-launch`, its log passed through and read for the start-up table.

Used by the benches that measure whole engines; each run of them starts one engine and drives it over ZMQ.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STOP_S = 30.0
_PHASE = re.compile(r"executor: {3}(\S.*?) +([\d.]+) +([\d.]+)$")


@dataclass
class Engine:
    """A serving engine. `phases` are seconds of the executor's start, by name."""

    endpoint: str
    ready_s: float  # from the launcher's start to the line that says it serves
    description: str = ""
    phases: dict[str, float] = field(default_factory=dict)


def read_log_line(line: str, phases: dict[str, float]) -> str:
    """Take a phase from a line of the executor's table; returns the description if this is the line that has it."""
    if match := _PHASE.match(line.rstrip()):
        phases[match[1]] = float(match[2])
    match = re.match(r"executor: (.*); ready in ", line)
    return match[1] if match else ""


@contextmanager
def running_engine(flags: list[str], env: dict[str, str] | None = None) -> Iterator[Engine]:
    """An engine without HTTP; SIGTERM at the end. Exits the program if it does not start."""
    command = [sys.executable, "-P", "-m", "frontend.launch", *flags, "--frontends", "0", "--port", "0"]
    start = time.perf_counter()
    engine = Engine("", 0.0)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )

    def follow() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            engine.description = read_log_line(line, engine.phases) or engine.description

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        engine.ready_s = time.perf_counter() - start
        endpoint = re.search(r"ipc://\S+\.sock", line)
        if endpoint is None:
            reader.join(STOP_S)
            raise SystemExit(f"the engine did not start: {line!r}")
        engine.endpoint = endpoint.group()
        yield engine
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(STOP_S)
