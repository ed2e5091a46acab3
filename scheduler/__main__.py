"""Entry of the scheduler process: `python -P -m scheduler --start-fd N`, started by the launcher only."""

from __future__ import annotations

import gc
import sys

import scheduler
from ipc.config import EngineConfig, SchedulerChannels
from ipc.lifetime import run_child
from ipc.logs import configure_logs


def run(config: EngineConfig, channels: SchedulerChannels) -> int:
    """Serve until SIGTERM; returns the exit code."""
    from scheduler.loop import Loop

    configure_logs(config.title(channels.role), config.log)
    loop = Loop(config, channels)
    gc.collect()
    gc.freeze()  # a collection that walks the start-up heap would cost a step
    gc.set_threshold(100_000, 50, 100)
    loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(run_child(scheduler, SchedulerChannels, run))
