"""Entry of an executor rank: `python -P -m executor --start-fd N`, started by the launcher."""

from __future__ import annotations

import gc
import os
import sys

import executor
from ipc.clock import now_s
from ipc.config import EngineConfig, ExecutorChannels
from ipc.lifetime import run_child


def run(config: EngineConfig, channels: ExecutorChannels) -> int:
    """Serve plans until SIGTERM; returns the exit code."""
    started_s = now_s()
    # OpenMP threads that spin while idle starve the other processes of a small machine; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.disable()  # it would walk what is imported again and again, a fifth of the time
    # Only now: importing torch takes seconds, and the parent may die in them.
    from executor import process

    gc.freeze()
    gc.enable()
    return process.run(config, channels, started_s)


if __name__ == "__main__":
    code = run_child(executor, ExecutorChannels, run)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a hung device must not hold up the exit in CUDA's own teardown
