"""Faults on demand, for tests of recovery: ENGINE_FAULT=ROLE:step=N:KIND in the environment of the launcher.

ROLE is scheduler, executor or frontend; each process asks for its own fault and strikes it once a step: the executor at
each plan, the scheduler at each result, a frontend at each frame of tokens. KIND is raise, exit, hang or, in the
executor, nan (the logits of a row) or corrupt (the frame of a result). `:epoch=E` limits the fault to the life number E
of the process, counted from 0; without it, every life fails at its N-th step. `executor:token=T:KIND` strikes whenever
a prompt holds token T instead: a request that crashes whoever runs it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ipc.errors import ConfigError

_VARIABLE: Final = "ENGINE_FAULT"
_ROLES: Final = ("scheduler", "executor", "frontend")
_KINDS: Final = ("raise", "exit", "hang", "nan", "corrupt")
_NONE: Final = -1


@dataclass(frozen=True, slots=True)
class Fault:
    """At step `step` of this life, counted from 1, or at a prompt with `token`, `kind` happens. By default never."""

    step: int = _NONE
    token: int = _NONE
    kind: str = ""

    def strike(self, step: int, prompt: npt.NDArray[np.int32] | None = None) -> str:
        """Raise, exit or hang if it is time to; returns "nan" or "corrupt" if the caller must see to it, else "".

        `prompt` [n]: the prompt tokens of this step.
        """
        if step != self.step and (prompt is None or self.token not in prompt):
            return ""
        if self.kind == "raise":
            raise RuntimeError(f"{_VARIABLE}: raised at step {step}")
        if self.kind == "exit":
            os._exit(1)
        if self.kind == "hang":
            threading.Event().wait()
        return self.kind


NO_FAULT: Final = Fault()


def read_fault(role: str, life: int) -> Fault:
    """The fault that this life of this process is asked for; raises ConfigError if the variable is not understood."""
    text = os.environ.get(_VARIABLE, "")
    if not text:
        return NO_FAULT
    asked_role, *fields = text.split(":")
    if asked_role != role and asked_role in _ROLES:
        return NO_FAULT
    kinds = [field for field in fields if field in _KINDS]
    numbers = dict(field.split("=", 1) for field in fields if "=" in field)
    if (
        asked_role not in _ROLES
        or len(kinds) != 1
        or len(fields) != 1 + len(numbers)
        or not set(numbers) <= {"step", "token", "epoch"}
    ):
        raise ConfigError(f"{text!r} is not ROLE:step=N[:epoch=E]:{'|'.join(_KINDS)}", param=_VARIABLE)
    if not all(number.isdecimal() for number in numbers.values()):
        raise ConfigError(f"{text!r}: step, token and epoch are numbers", param=_VARIABLE)
    if int(numbers.get("epoch", life)) != life:
        return NO_FAULT
    return Fault(int(numbers.get("step", _NONE)), int(numbers.get("token", _NONE)), kinds[0])
