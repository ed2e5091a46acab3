"""One step on the device: deltas, inputs, model, sampler, carry-over, output columns.

Called by the launch loop on the compute stream (`Lanes.launch`), and before that for profiling and warm-up. Its Python
work does not grow with the batch, and it never waits for the device.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from executor.graphs import DecodeGraphs
from executor.inputs import (
    PlanHeader,
    StagedPlan,
    StepInputs,
    apply_blocks,
    apply_deltas,
    build_decode_inputs,
    build_inputs,
    grammar_mask,
)
from executor.model import Model
from executor.sampler import Sampled, Sampler
from executor.slot_state import SlotState
from executor.warmup import ALL_STAGES
from ipc.frames import NULL_BLOCK, FrameLimits, Plan, PlanFlag, write_plan
from ipc.results import RESULT_HEADER_BYTES, ResultLayout

_TIMED_CONTEXT: Final = 1024  # tokens of the rows on which ways to run a step are timed


class StepRunner:
    """Runs plans against the slot state it owns. Offsets of its output are those of the result layout, less the header,
    which the host writes."""

    def __init__(self, model: Model, sampler: Sampler, state: SlotState, layout: ResultLayout) -> None:
        self._model, self._sampler, self._state, self._layout = model, sampler, state, layout
        self._graphs: DecodeGraphs | None = None

    def capture(self, limits: FrameLimits, compute: torch.cuda.Stream) -> None:
        """Capture the ladder of decode graphs; from then on decode-only steps replay them."""
        if self._model.decoder is not None:
            self._choose_ways(limits)
        self._graphs = DecodeGraphs(
            self._state,
            max_rows=limits.max_rows,
            max_kv_len=limits.max_seq_len,
            compute=compute,
            forward=self._model.forward,
            sample_greedy=self._sample_greedy,
        )

    def output_bytes(self, header: PlanHeader) -> int:
        """Bytes of this step's output that the host wants."""
        if header.flags & PlanFlag.LOGPROBS:
            return self._layout.nbytes - RESULT_HEADER_BYTES
        assert not header.num_scores, "scores are log-probabilities"
        return 4 * header.num_rows

    def run(self, header: PlanHeader, poison: bool, staged: torch.Tensor, output: torch.Tensor) -> None:
        """Run the plan in `staged` uint8 [plan bytes] and write its result columns to `output` uint8 [result bytes].

        `poison` replaces the first row's logits by NaN.
        """
        plan = StagedPlan(header, staged)
        rows = header.num_rows
        flags = header.flags & ALL_STAGES
        apply_deltas(plan, self._state, self._sampler)
        graph = None
        if self._graphs is not None and rows == header.num_decode:
            graph = self._graphs.replay_model(plan)
            logits, row_slot, kv_len = graph.logits[:rows], graph.inputs.row_slot[:rows], graph.inputs.kv_len[:rows]
        else:
            apply_blocks(plan, self._state)
            inputs = build_inputs(plan, self._state)
            logits, row_slot, kv_len = self._model.forward(inputs), inputs.row_slot, inputs.kv_len
        if poison:
            logits[0].fill_(float("nan"))
        if graph is not None and not flags:
            graph.greedy.replay()
            self._column(output, self._layout.token, rows).copy_(graph.token[:rows])
        else:
            row_sample = plan.column("row_sample", rows)
            sampled = self._sampler.sample(logits[:rows], row_slot, kv_len, row_sample, flags, grammar_mask(plan))
            self._write(output, sampled, 0)
            if header.num_scores:
                scored = self._sampler.score(logits[rows:], plan.column("score_token", header.num_scores))
                self._write(output, scored, rows)

    def run_alone(self, plan: Plan, limits: FrameLimits) -> None:
        """Run one synthetic plan outside the pipeline, on the current stream: for profiling and warm-up."""
        payload = np.zeros(limits.plan_bytes, np.uint8)
        used = write_plan(payload, plan)
        device = self._state.position.device
        output = torch.empty(self._layout.nbytes - RESULT_HEADER_BYTES, dtype=torch.uint8, device=device)
        self.run(PlanHeader.read(payload), False, torch.from_numpy(payload[:used]).to(device), output)
        self._state.position.zero_()

    def _choose_ways(self, limits: FrameLimits) -> None:
        """Time the decoder on rows with a context, spread over pages that nobody owns yet."""
        state, model = self._state, self._model
        assert model.decoder is not None, "nothing to choose"
        context = min(_TIMED_CONTEXT, limits.max_seq_len // 2)
        table = state.block_table
        pages = torch.arange(table.numel(), dtype=torch.int32, device=table.device).remainder_(model.num_blocks)
        table.copy_(pages.view_as(table))

        def forward(rows: int) -> torch.Tensor:
            state.position[:rows].fill_(context)
            slots = torch.arange(rows, dtype=torch.int32, device=table.device)
            return model.forward(build_decode_inputs(slots, torch.ones_like(slots), state, limits.max_seq_len))

        model.decoder.choose_ways(forward, limits.max_rows, context)
        table.fill_(NULL_BLOCK)
        state.position.zero_()

    def _sample_greedy(self, inputs: StepInputs, logits: torch.Tensor) -> torch.Tensor:
        return self._sampler.sample(logits, inputs.row_slot, inputs.kv_len, inputs.row_sample, PlanFlag.NONE).token

    def _column(self, output: torch.Tensor, offset: int, count: int, skip: int = 0) -> torch.Tensor:
        start = offset - RESULT_HEADER_BYTES + 4 * skip
        column: torch.Tensor = output[start : start + 4 * count].view(torch.int32)
        return column

    def _write(self, output: torch.Tensor, sampled: Sampled, first: int) -> None:
        """Fill the output's rows from `first` on."""
        layout, rows = self._layout, len(sampled.token)
        self._column(output, layout.token, rows, first).copy_(sampled.token)
        if sampled.logprob is None:
            return
        assert sampled.rank is not None, "log-probabilities come with ranks"
        assert sampled.top_token is not None, "and with the most probable tokens"
        assert sampled.top_logprob is not None, "and with theirs"
        top, skip = rows * layout.max_logprobs, first * layout.max_logprobs
        self._column(output, layout.logprob, rows, first).view(torch.float32).copy_(sampled.logprob)
        self._column(output, layout.rank, rows, first).copy_(sampled.rank)
        self._column(output, layout.top_token, top, skip).copy_(sampled.top_token.reshape(-1))
        self._column(output, layout.top_logprob, top, skip).view(torch.float32).copy_(sampled.top_logprob.reshape(-1))
