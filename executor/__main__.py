"""Entry of an executor rank: `python -P -m executor --start-fd N`, started by the launcher."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

import executor
import ipc
from ipc.clock import now_s
from ipc.config import EngineConfig, ExecutorChannels, read_start
from ipc.errors import ConfigError
from ipc.lifetime import enter_process, fail
from ipc.logs import configure_news


def main() -> int:
    parser = argparse.ArgumentParser(prog="executor")
    parser.add_argument("--start-fd", type=int, required=True, help="memory file with the configuration and channels")
    started_s = now_s()
    config, channels = read_start(parser.parse_args().start_fd, EngineConfig, ExecutorChannels)
    # OpenMP threads that spin while idle starve the other processes of a small machine; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    configure_news(config.log)
    try:
        enter_process(config.title(channels.role), channels.parent_pipe, ipc, executor)
        # Only now: importing torch takes seconds, and the parent may die in them.
        from executor.process import run

        return run(config, channels, started_s)
    except ConfigError as error:
        return fail(channels.role, error)
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a hung device must not hold up the exit in CUDA's own teardown
