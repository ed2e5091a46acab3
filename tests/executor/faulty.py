"""An executor whose device fails in one step, as `python -m tests.executor.faulty`: TANDEM_TEST_FAULT is oom or assert.

The step of the third plan asks for more memory than there is, or reads beyond a tensor, which on CUDA is an assertion
of the device that the host learns of later and after which nothing works any more.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

import executor
from executor.__main__ import run
from executor.step import StepRunner
from ipc.config import ExecutorChannels
from ipc.frames import PlanWord
from ipc.lifetime import run_child

_FAILS_AT = 3
_run: Any = StepRunner.run


def _faulty_run(self: StepRunner, header: Any, poison: bool, staged: torch.Tensor, output: torch.Tensor) -> None:
    if header.words[PlanWord.SEQ] == _FAILS_AT:
        if os.environ["TANDEM_TEST_FAULT"] == "oom":
            torch.empty(1 << 50, dtype=torch.uint8, device=staged.device)
        torch.zeros(1, device=staged.device)[torch.full((1,), 7, device=staged.device)]
    _run(self, header, poison, staged, output)


if __name__ == "__main__":
    StepRunner.run = _faulty_run  # type: ignore[method-assign]
    code = run_child(executor, ExecutorChannels, run)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
