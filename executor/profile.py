"""A trace of some steps, on demand: ENGINE_PROFILE=FIRST:COUNT:FILE, steps of this executor life counted from 1.

Called by the executor's loop before each step, if asked for at all. FILE is a Chrome trace, which
`scripts/trace_report.py` reads. Starting and ending the trace stops the pipeline for seconds, and a traced step is
slower on the host: what it shows is the device within steps and between them, not the engine's speed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import torch

from ipc.errors import ConfigError
from ipc.logs import news

_VARIABLE: Final = "ENGINE_PROFILE"


class Profile:
    """Steps [first, first + count) of this life, traced on `device` into `path`."""

    def __init__(self, first: int, count: int, path: Path, device: torch.device) -> None:
        self._first, self._count, self._path, self._device = first, count, path, device
        self._trace: Any = None

    def before(self, step: int) -> None:
        """Step number `step` is about to be launched."""
        if step == self._first:
            cuda = self._device.type == "cuda"
            activity = torch.profiler.ProfilerActivity
            self._trace = torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU])
            self._trace.start()
        elif step == self._first + self._count:
            self.finish()

    def finish(self) -> None:
        """Write what was traced, if anything was."""
        if self._trace is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._trace.stop()
        self._trace.export_chrome_trace(str(self._path))
        self._trace = None
        news("executor", f"{self._count} steps from {self._first} on traced to {self._path}")


def read_profile(device: torch.device) -> Profile | None:
    """What the variable asks for; raises ConfigError if it is not understood."""
    text = os.environ.get(_VARIABLE, "")
    if not text:
        return None
    first, _, rest = text.partition(":")
    count, _, path = rest.partition(":")
    if not (first.isdecimal() and count.isdecimal() and path and int(first) and int(count)):
        raise ConfigError(f"{text!r} is not FIRST:COUNT:FILE with counts of at least 1", param=_VARIABLE)
    return Profile(int(first), int(count), Path(path), device)
