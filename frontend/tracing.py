"""The launcher's side of the step trace: its memory while the engine lives, and its file afterwards.

Called by `engine-launch` only. See ipc/trace.py for what is recorded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ipc.errors import ConfigError
from ipc.logs import news
from ipc.trace import Trace, create_trace


@contextlib.contextmanager
def step_trace(file: str | None, *, on_demand: bool, replicas: int) -> Iterator[int]:
    """The trace's memory as an fd, -1 if nobody wants one. `file` is written when the engine has stopped.

    Raises ConfigError at once if the file cannot be written.
    """
    if file is None and not on_demand:
        yield -1
        return
    target = None if file is None else _open(file)
    memory = create_trace(recording=target is not None, replicas=replicas)
    try:
        yield memory
    finally:
        if target is not None:
            with os.fdopen(target, "wb") as stream:
                stream.write(Trace(memory).chrome())
            news("engine-launch", f"trace written to {file}")
        os.close(memory)


def _open(file: str) -> int:
    try:
        return os.open(Path(file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}", param="--trace") from error
