"""One step on the device: deltas, inputs, model, sampler, carry-over, output columns.

Called by the launch loop on the compute stream (`Lanes.launch`), and before that for profiling and warm-up. Its Python
work does not grow with the batch, and it never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from executor.graphs import StepGraphs
from executor.inputs import (
    PlanHeader,
    StagedPlan,
    StepInputs,
    apply_slots,
    apply_tables,
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

if TYPE_CHECKING:
    from executor.unpack_kernel import Unpack

_STAGES: Final = int(ALL_STAGES)
_TIMED_CONTEXT: Final = 1024  # tokens of the rows on which ways to run a step are timed


class StepRunner:
    """Runs plans against the slot state it owns. Offsets of its output are those of the result layout, less the header,
    which the host writes."""

    def __init__(
        self, model: Model, sampler: Sampler, state: SlotState, limits: FrameLimits, layout: ResultLayout
    ) -> None:
        self._model, self._sampler, self._state, self._limits, self._layout = model, sampler, state, limits, layout
        self._unpack: Unpack | None = None
        if state.position.device.type == "cuda":
            from executor.unpack_kernel import Unpack  # Triton is not there on a machine without CUDA

            self._unpack = Unpack(state, sampler.tables.params, limits)
        self._graphs: StepGraphs | None = None

    def capture(self, compute: torch.cuda.Stream) -> None:
        """Capture both ladders of graphs; from then on steps that fit replay them. On CUDA only."""
        assert self._unpack is not None, "no CUDA"
        self._graphs = StepGraphs(
            self._unpack,
            self._limits,
            parameters=self._model.num_parameters,
            full_steps=not self._model.has_flash,  # FlashAttention saves more than a graph
            compute=compute,
            forward=self._model.forward,
            sample_greedy=self._sampler.sample_greedy,
        )

    def output_bytes(self, header: PlanHeader) -> int:
        """Bytes of this step's output that the host wants."""
        if header.has_logprobs:
            return self._layout.nbytes - RESULT_HEADER_BYTES
        assert not header.num_scores, "scores are log-probabilities"
        return 4 * header.num_rows

    def run(self, header: PlanHeader, poison: bool, staged: torch.Tensor, output: torch.Tensor) -> None:
        """Run the plan in `staged` uint8 [plan bytes] and write its result columns to `output` uint8 [result bytes].

        `poison` replaces the first row's logits by NaN. A greedy step that fits a graph is one launch and one replay.
        """
        plan = StagedPlan(header, staged)
        rows = header.num_rows
        stages = header.flags & _STAGES
        apply_tables(plan, self._sampler)
        # At 0 a graph chooses nothing and leaves us its logits.
        token_address = 0 if stages or poison else output.data_ptr() + self._layout.token - RESULT_HEADER_BYTES
        graph = self._graphs.replay(plan, token_address) if self._graphs is not None else None
        if graph is None:
            inputs = self._build_inputs(plan)
            logits = self._model.forward(inputs)
        elif token_address:
            return
        else:
            inputs, logits = graph.inputs, graph.logits
        if poison:
            logits[0].fill_(float("nan"))
        row_sample = plan.column("row_sample", rows)
        row_slot, kv_len = inputs.row_slot[:rows], inputs.kv_len[:rows]
        flags = PlanFlag(stages)
        sampled = self._sampler.sample(logits[:rows], row_slot, kv_len, row_sample, flags, grammar_mask(plan))
        self._write(output, sampled, 0)
        if header.num_scores:
            scored = self._sampler.score(logits[rows:], plan.column("score_token", header.num_scores))
            self._write(output, scored, rows)

    def _build_inputs(self, plan: StagedPlan) -> StepInputs:
        if self._unpack is not None:
            return self._unpack.eager(plan)
        apply_slots(plan, self._state, self._sampler)
        return build_inputs(plan, self._state)

    def run_alone(self, plan: Plan) -> None:
        """Run one synthetic plan outside the pipeline, on the current stream: for profiling and warm-up."""
        staged = self._stage(plan)
        output = torch.empty(self._layout.nbytes - RESULT_HEADER_BYTES, dtype=torch.uint8, device=staged.staged.device)
        self.run(staged.header, False, staged.staged, output)
        self._state.position.zero_()

    def compile_ahead(self, plans: Iterable[Plan]) -> None:
        """`Model.compile_ahead` for synthetic plans."""

        def steps() -> Iterator[StepInputs]:
            for plan in plans:
                yield self._build_inputs(self._stage(plan))
                self._state.position.zero_()

        self._model.compile_ahead(steps())

    def _stage(self, plan: Plan) -> StagedPlan:
        payload = np.zeros(self._limits.plan_bytes, np.uint8)
        used = write_plan(payload, plan)
        return StagedPlan(PlanHeader.read(payload), torch.from_numpy(payload[:used]).to(self._state.position.device))

    def choose_ways(self) -> None:
        """Time a fused decoder on rows with a context, spread over pages that nobody owns yet."""
        state, model, limits = self._state, self._model, self._limits
        if model.decoder is None:
            return
        context = min(_TIMED_CONTEXT, limits.max_seq_len // 2)
        table = state.block_table
        pages = torch.arange(table.numel(), dtype=torch.int32, device=table.device).remainder_(model.num_blocks)
        table.copy_(pages.view_as(table))

        def forward(rows: int) -> torch.Tensor:
            state.position[:rows].fill_(context)
            slots = torch.arange(rows, dtype=torch.int32, device=table.device)
            return model.forward(build_decode_inputs(slots, state))

        model.decoder.choose_ways(forward, limits.max_rows, context)
        table.fill_(NULL_BLOCK)
        state.position.zero_()

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
