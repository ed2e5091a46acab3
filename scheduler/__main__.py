"""Entry of the scheduler process: `python -P -m scheduler --start-fd N`, started by the launcher only."""

from __future__ import annotations

import argparse
import gc
import sys

import ipc
import scheduler
from ipc.config import EngineConfig, SchedulerChannels, read_start
from ipc.errors import ConfigError
from ipc.lifetime import enter_process, fail
from ipc.logs import configure_logs


def run(config: EngineConfig, channels: SchedulerChannels) -> int:
    """Serve until SIGTERM; returns the exit code."""
    from scheduler.loop import Loop

    configure_logs(config.title("scheduler"), config.log)
    loop = Loop(config, channels)
    gc.collect()
    gc.freeze()  # a collection that walks the start-up heap would cost a step
    gc.set_threshold(100_000, 50, 100)
    loop.run()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scheduler")
    parser.add_argument("--start-fd", type=int, required=True)
    config, channels = read_start(parser.parse_args().start_fd, EngineConfig, SchedulerChannels)
    enter_process(config.title("scheduler"), channels.parent_pipe, ipc, scheduler)
    try:
        return run(config, channels)
    except ConfigError as error:
        return fail("scheduler", error)


if __name__ == "__main__":
    sys.exit(main())
