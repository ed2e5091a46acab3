"""What the scheduler remembers of a plan until its result comes back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)
class PlanRecord:
    """A snapshot, never written to: the result is applied to the slots whose owners are still those of the plan."""

    seq: int
    slots: npt.NDArray[np.int32]  # [rows]
    generation: npt.NDArray[np.int64]  # [rows], of each slot when it was planned
    sample: npt.NDArray[np.bool_]  # [rows], False for a chunk that ends inside the prompt
    wants_logprobs: bool
    continues: bool  # work was waiting since the step before
    # [scores]
    score_slot: npt.NDArray[np.int32]
    score_generation: npt.NDArray[np.int64]
