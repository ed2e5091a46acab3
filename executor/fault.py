"""Faults on demand, for tests of recovery: ENGINE_FAULT=executor:step=N:KIND with KIND raise, exit, hang or nan.

Called by the executor's loop once a step. `:epoch=E` limits the fault to one executor life; without it, every life
fails at its N-th step.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Final

from ipc.errors import ConfigError

_VARIABLE: Final = "ENGINE_FAULT"
_KINDS: Final = ("raise", "exit", "hang", "nan")


@dataclass(frozen=True, slots=True)
class Fault:
    """At step `step` of this life, counted from 1, `kind` happens; step 0 never comes."""

    step: int = 0
    kind: str = ""

    def strike(self, step: int) -> bool:
        """Raise, exit or hang if it is time to; returns True if the logits of the first row must become NaN."""
        if step != self.step:
            return False
        if self.kind == "raise":
            raise RuntimeError(f"{_VARIABLE}: raised at step {step}")
        if self.kind == "exit":
            os._exit(1)
        if self.kind == "hang":
            threading.Event().wait()
        return True


def read_fault(epoch: int) -> Fault:
    """The fault this life of the executor is asked for; raises ConfigError if the variable is not understood."""
    text = os.environ.get(_VARIABLE, "")
    role, *fields = text.split(":")
    if role != "executor":
        return Fault()
    kinds = [field for field in fields if field in _KINDS]
    numbers = dict(field.split("=", 1) for field in fields if "=" in field)
    if len(kinds) != 1 or len(fields) != 1 + len(numbers) or not set(numbers) <= {"step", "epoch"}:
        raise ConfigError(f"{text!r} is not executor:step=N[:epoch=E]:{'|'.join(_KINDS)}", param=_VARIABLE)
    if not all(number.isdecimal() for number in numbers.values()):
        raise ConfigError(f"{text!r}: step and epoch are numbers", param=_VARIABLE)
    if int(numbers.get("epoch", epoch)) != epoch:
        return Fault()
    return Fault(int(numbers.get("step", 1)), kinds[0])
