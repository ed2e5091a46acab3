"""Result frames: what the executor sends the scheduler once a step through shared memory, in the order of the plan.

A header of int64 words, written by the executor's host side, and columns at fixed offsets, which a device may write.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipc.errors import ProtocolError
from ipc.frames import Bytes, Float32, Int32, aligned


class ResultWord(IntEnum):
    """int64 words of a result's header, written by the executor's host side."""

    SEQ = 0
    EPOCH = 1
    NUM_ROWS = 2  # and scores
    HAS_LOGPROBS = 3
    DEVICE_NS = 4  # compute stream, first to last kernel of the step (CUDA events)
    GAP_NS = 5  # compute stream idle between the previous step and this one
    LAUNCH_NS = 6  # host time of the launch thread for this step
    HIDDEN = 7  # 1: this step was queued before the device ran dry
    COMPILATIONS = 8  # kernels compiled and graphs captured since the result before; 0 while all is well


RESULT_HEADER_BYTES: Final = 128
_HEADER: Final = struct.Struct(f"={len(ResultWord)}q")
MAX_COUNTED: Final = 1 << 56  # of a result's times, 2 years in ns: they are summed in 64 bits


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """Byte offsets of a result's columns. Fixed, so the device writes the same layout and one copy brings it home."""

    max_results: int  # rows and scores of a step
    max_logprobs: int

    @property
    def token(self) -> int:
        return RESULT_HEADER_BYTES

    @property
    def logprob(self) -> int:
        """Log-probability of the sampled or scored token, float32 [max_results]."""
        return self.token + aligned(4 * self.max_results)

    @property
    def rank(self) -> int:
        """Rank of that token among all, 1 = most probable, int32 [max_results]."""
        return self.logprob + aligned(4 * self.max_results)

    @property
    def top_token(self) -> int:
        """int32 [max_results, max_logprobs], most probable first."""
        return self.rank + aligned(4 * self.max_results)

    @property
    def top_logprob(self) -> int:
        """float32 [max_results, max_logprobs]."""
        return self.top_token + aligned(4 * self.max_results * self.max_logprobs)

    @property
    def nbytes(self) -> int:
        return self.top_logprob + aligned(4 * self.max_results * self.max_logprobs)


@dataclass(slots=True)
class Result:
    """One step's outcome, as read from a ring slot. Rows are in the order of the plan, and then its scores; the token
    of a score is the one the plan named."""

    seq: int
    epoch: int
    device_ns: int
    gap_ns: int
    launch_ns: int
    hidden: bool
    token: Int32  # [rows + scores]; so are the others
    logprob: Float32 | None  # [rows]; None unless the plan asked for logprobs
    rank: Int32 | None  # [rows]
    top_token: Int32 | None  # [rows, max_logprobs]
    top_logprob: Float32 | None  # [rows, max_logprobs]
    compilations: int = 0


def write_result_header(
    payload: Bytes,
    *,
    seq: int,
    epoch: int,
    num_rows: int,
    has_logprobs: bool,
    device_ns: int = 0,
    gap_ns: int = 0,
    launch_ns: int = 0,
    hidden: bool = False,
    compilations: int = 0,
) -> None:
    _HEADER.pack_into(
        payload.data, 0, seq, epoch, num_rows, has_logprobs, device_ns, gap_ns, launch_ns, hidden, compilations
    )


def read_result(payload: Bytes, layout: ResultLayout) -> Result:
    """Views into a result slot (no copy): valid until the slot is acknowledged.

    Raises ProtocolError for a header that no step has.
    """
    words = _HEADER.unpack_from(payload.data)
    rows, has_logprobs = words[ResultWord.NUM_ROWS], bool(words[ResultWord.HAS_LOGPROBS])
    if not 0 <= rows <= layout.max_results:
        raise ProtocolError(f"result of {rows} rows and scores, the ring was made for {layout.max_results}")
    for name in (ResultWord.DEVICE_NS, ResultWord.GAP_NS, ResultWord.LAUNCH_NS, ResultWord.COMPILATIONS):
        if abs(words[name]) > MAX_COUNTED:
            raise ProtocolError(f"result with {name.name} {words[name]}, at most {MAX_COUNTED}")

    def column(offset: int, dtype: type, width: int = 1) -> Any:
        values: npt.NDArray[Any] = payload[offset : offset + 4 * rows * width].view(dtype)
        return values.reshape(rows, width) if width > 1 else values

    top = layout.max_logprobs if has_logprobs else 0
    return Result(
        seq=words[ResultWord.SEQ],
        epoch=words[ResultWord.EPOCH],
        device_ns=words[ResultWord.DEVICE_NS],
        gap_ns=words[ResultWord.GAP_NS],
        launch_ns=words[ResultWord.LAUNCH_NS],
        hidden=bool(words[ResultWord.HIDDEN]),
        token=column(layout.token, np.int32),
        logprob=column(layout.logprob, np.float32) if has_logprobs else None,
        rank=column(layout.rank, np.int32) if has_logprobs else None,
        top_token=column(layout.top_token, np.int32, top).reshape(rows, top) if has_logprobs else None,
        top_logprob=column(layout.top_logprob, np.float32, top).reshape(rows, top) if has_logprobs else None,
        compilations=words[ResultWord.COMPILATIONS],
    )
