"""An executor without a model or a device, for benches and tests of everything around it.

Entry `python -P -m executor.fake --start-fd N`; speaks the same rings as the real one and must never import torch. The
token at position p of a slot is the ((seed + p) mod n)-th of the n ids that do not end a sequence, so a reader can
predict every stream; a row with a grammar takes its token in the same way from those that its mask allows.
ENGINE_FAKE_STEP_US makes a step take that long.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Final

import numpy as np

import executor
from executor.wire import Wire
from ipc.clock import now_ns
from ipc.config import EngineConfig, ExecutorChannels
from ipc.fault import read_fault
from ipc.frames import INVALID_TOKEN, Bytes, Int32, Int64, Param, Plan, PlanFlag, read_plan
from ipc.lifetime import run_child
from ipc.results import RESULT_HEADER_BYTES, write_result_header
from ipc.trace import Act, Track, open_trace

DEFAULT_NUM_BLOCKS: Final = 65536


class FakeModel:
    """Positions and seeds by slot, and the rule that makes tokens of them."""

    def __init__(self, config: EngineConfig) -> None:
        self._position = np.zeros(config.max_num_seqs, np.int64)
        self._seed = np.zeros(config.max_num_seqs, np.int64)
        ids = np.arange(config.card.vocab_size, dtype=np.int32)
        self._tokens: Int32 = ids[~np.isin(ids, config.card.eos_token_ids)]

    def step(self, plan: Plan) -> Int32:
        """Advance the rows of `plan`; the token of each, int32 [rows]."""
        self._position[plan.admit_slot] = plan.admit_params[:, Param.COMPUTED]
        self._seed[plan.admit_slot] = plan.admit_params[:, Param.SEED_LOW]
        self._position[plan.row_slot] += plan.row_query_len
        index: Int64 = self._seed[plan.row_slot] + self._position[plan.row_slot]
        tokens: Int32 = self._tokens[index % len(self._tokens)]
        masks = plan.grammar_word.reshape(len(plan.grammar_row), -1) if len(plan.grammar_row) else ()
        for row, words in zip(plan.grammar_row.tolist(), masks, strict=True):
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            tokens[row] = allowed[index[row] % len(allowed)]
        return tokens


def run(config: EngineConfig, channels: ExecutorChannels) -> int:
    """Serve plans until SIGTERM; returns the exit code."""
    wire = Wire(channels)
    wire.stop_on_sigterm()
    model, fault = FakeModel(config), read_fault("executor", channels.epoch)
    layout, trace = config.result_layout, open_trace(channels.trace, config.replica or 0)
    step_ns = 1000 * int(os.environ.get("ENGINE_FAKE_STEP_US", "0"))
    wire.hello(config.num_blocks or DEFAULT_NUM_BLOCKS)
    step, previous_end_ns = 0, 0
    while (payload := wire.next_plan()) is not None:
        step += 1
        start_ns = now_ns()
        plan = read_plan(payload)
        struck = fault.strike(step, plan.prefill_token)
        wire.corrupt_next |= struck == "corrupt"
        result_seq, result = wire.begin_result()
        tokens = np.concatenate((model.step(plan), plan.score_token))
        if struck == "nan":
            tokens[0] = INVALID_TOKEN
        result[layout.token : layout.token + tokens.nbytes].view(np.int32)[:] = tokens
        has_logprobs = bool(plan.flags & PlanFlag.LOGPROBS)
        if has_logprobs:
            _write_logprobs(result, layout.logprob, layout.nbytes)
        launch_ns = now_ns() - start_ns
        if step_ns:
            time.sleep(max(0, step_ns - launch_ns) * 1e-9)
        end_ns = now_ns()
        write_result_header(
            result,
            seq=plan.seq,
            epoch=plan.epoch,
            num_rows=plan.num_rows + len(plan.score_token),
            has_logprobs=has_logprobs,
            device_ns=end_ns - start_ns if step_ns else 0,
            gap_ns=start_ns - previous_end_ns if previous_end_ns else 0,
            launch_ns=launch_ns,
            hidden=not wire.waited,
        )
        previous_end_ns = end_ns
        wire.publish(result_seq, plan.seq)
        if trace is not None:
            trace.span(Track.LAUNCH, Act.LAUNCH, start_ns, start_ns + launch_ns, plan.seq, plan.num_rows)
            trace.span(Track.COMPUTE, Act.COMPUTE, start_ns, end_ns, plan.seq, plan.num_rows)
    return 0


def _write_logprobs(result: Bytes, start: int, end: int) -> None:
    """Every log-probability is 0, every rank 0, every alternative token 0."""
    assert start >= RESULT_HEADER_BYTES, "columns follow the header"
    result[start:end] = 0


if __name__ == "__main__":
    sys.exit(run_child(executor, ExecutorChannels, run))
