"""A process's first calls: die with the parent, be debuggable when stuck, come from one place, have room for files.

And its last word: the exit code, and for a fault of the user one line.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import resource
import select
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final

import setproctitle

from ipc.config import ChannelsT, EngineConfig, read_start
from ipc.errors import ConfigError
from ipc.logs import configure_news, news

_PR_SET_PDEATHSIG: Final = 1
_ENOUGH_FILES: Final = 1 << 16  # some programs walk through all numbers below the limit, so it is not made endless


def run_child(package: ModuleType, channels: type[ChannelsT], run: Callable[[EngineConfig, ChannelsT], int]) -> int:
    """The life of a child of the launcher, which starts it as `python -P -m PACKAGE --start-fd N`; the exit code.

    2 means a fault of the user, told in one line, that would come again.
    """
    parser = argparse.ArgumentParser(prog=package.__name__)
    parser.add_argument("--start-fd", type=int, required=True, help="memory file with the configuration and channels")
    config, inherited = read_start(parser.parse_args().start_fd, channels)
    configure_news(config.log)
    try:
        enter_process(config.title(inherited.role), inherited.parent_pipe, package)
        return run(config, inherited)
    except ConfigError as error:
        return fail(inherited.role, error)
    except Exception:
        traceback.print_exc()
        return 1


def enter_process(role: str, parent_pipe: int, package: ModuleType) -> None:
    """Arm everything a child of the launcher needs; call before anything slow, the model above all.

    The launcher owns the signals: a child ignores SIGINT, and SIGTERM keeps its meaning for the child's own handler.
    SIGUSR1 dumps all stacks to stderr; SIGUSR2 does that and ends the process before it runs another line.
    Raises ConfigError if `package` comes from another folder than ipc.
    """
    setproctitle.setproctitle(f"engine-launch: {role}")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=True)  # on to what the signal does by default
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    check_one_place(package)
    die_with_parent(parent_pipe)


def die_with_parent(parent_pipe: int) -> None:
    """Exit when the launcher does: PDEATHSIG for the common case, the pipe for a launcher thread that came and went."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or parent_is_gone(parent_pipe):
        os._exit(1)

    def watch() -> None:
        select.select([parent_pipe], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def parent_is_gone(parent_pipe: int) -> bool:
    return bool(select.select([parent_pipe], [], [], 0)[0])


def raise_file_limit() -> int:
    """Let this process, and its children, open as many files as the system allows; returns their number.

    A connection is a file, and the usual limit of 1024 is made for programs that have few.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if file_limit() < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return file_limit()


def file_limit() -> int:
    """How many files this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _ENOUGH_FILES if soft == resource.RLIM_INFINITY else soft


def check_one_place(package: ModuleType) -> None:
    """The four packages have common names; another `scheduler` on the path must not be half of this program."""
    home = Path(__file__).resolve().parent.parent
    found = Path(package.__file__ or "").resolve().parent.parent
    if found != home:
        raise ConfigError(f"package {package.__name__!r} comes from {found}, but ipc from {home}; fix sys.path")


def fail(role: str, error: BaseException) -> int:
    """Report a fault of the user as one line naming the flag; returns the exit code 2."""
    flag = getattr(error, "param", None)
    reason = " ".join(str(error).split())  # those of libraries have several lines
    news(role, f"{flag + ': ' if flag else ''}{reason}", error=True)
    return 2
