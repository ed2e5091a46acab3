"""The executor process: loads the model, sizes the KV cache, captures graphs, then turns plans into results.

Owns the launch loop. It waits for nothing but the next plan; results leave on the retire thread of `Lanes`. It knows
slots, positions and tokens, and must never learn of requests. A fault of a step ends the process: the launcher and the
scheduler know how to go on without losing a token.
"""

from __future__ import annotations

import gc
import signal
import sys
import traceback
from functools import partial
from typing import Any

import torch

from executor.compilation import stop_compiling
from executor.compile_watch import CompileWatch
from executor.inputs import PlanHeader
from executor.lanes import Lanes, StepTimes, open_streams
from executor.model import choose_num_blocks, compile_model, load_model, optimize_model
from executor.phases import Phases
from executor.profile import read_profile
from executor.ranks import open_ranks
from executor.sampler import Sampler
from executor.slot_state import SlotState
from executor.step import StepRunner
from executor.warmup import full_step_plan, warmup_plans
from executor.wire import Wire
from ipc.clock import now_ns, now_s
from ipc.config import EngineConfig, ExecutorChannels
from ipc.errors import ConfigError
from ipc.fault import read_fault
from ipc.frames import Bytes, PlanFlag, PlanWord, read_plan
from ipc.results import RESULT_HEADER_BYTES, write_result_header
from ipc.trace import Act, Track, open_trace


def run(config: EngineConfig, channels: ExecutorChannels, started_s: float | None = None) -> int:
    """Serve plans until SIGTERM; returns the exit code. Raises ConfigError or ModelError before it is ready.

    `started_s` is when the process began, for the table of start-up phases.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the loop has its own way to stop
    wire = Wire(channels)
    with torch.inference_mode():
        phases = Phases(now_s() if started_s is None else started_s)
        phases.end("import")
        executor = Executor(config, channels, wire, phases)
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)  # a step makes next to no cycles, and collecting them is a stall
        wire.hello(executor.num_blocks)
        if wire.publishes:
            phases.report(executor.description)
        return executor.serve()


class Executor:
    """Everything between the two rings: the step runner, the lanes, and the loop that connects them."""

    def __init__(self, config: EngineConfig, channels: ExecutorChannels, wire: Wire, phases: Phases) -> None:
        self._wire = wire
        self._limits, self._layout = config.limits, config.result_layout
        self._fault = read_fault("executor", channels.epoch)
        self._trace = open_trace(channels.trace, config.replica or 0)
        self._error: BaseException | None = None
        self._device = open_device(config, channels.place)
        self._ranks = open_ranks(config, channels, self._device)
        self._profile = read_profile(self._device) if channels.rank == 0 else None
        self._watch = CompileWatch()
        self._streams = open_streams(self._device)
        # The host's end of a step's two copies, by ring slot: made once, as making a tensor costs more than the copy.
        self._host = {id(slot): torch.from_numpy(slot) for slot in wire.plans.payloads}
        self._host |= {id(slot): torch.from_numpy(slot[RESULT_HEADER_BYTES:]) for slot in wire.result_slots}
        # Memory freed on one stream is not reused on another, so the start happens where the steps will.
        self._streams.use(self._streams.compute)
        self._runner = self._load(config, phases)
        if self._device.type == "cuda":
            self._warm_up(config, phases)
        if config.compile:
            stop_compiling()
        self._lanes = Lanes(
            self._streams,
            self._device,
            depth=config.max_depth,
            in_bytes=self._limits.plan_bytes,
            out_bytes=self._layout.nbytes - RESULT_HEADER_BYTES,
            on_done=self._publish,
            on_error=self._fail,
            timed=self._trace is not None,
        )

    def _load(self, config: EngineConfig, phases: Phases) -> StepRunner:
        """Weights, sampler, slot state and KV cache; sets `num_blocks` and `description`."""
        model = load_model(config, sys.stderr.isatty(), self._device, self._ranks)
        state = SlotState(self._limits, self._device)
        sampler = Sampler(state.last_token, model.vocab_size, self._limits.max_logprobs, self._device)
        runner = StepRunner(model, sampler, state, self._limits, self._layout)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # weights may have arrived on other streams
        phases.end("weights")
        if config.compile:
            optimize_model(model) if self._device.type == "cuda" else compile_model(model)
            phases.end("optimize")
        if self._device.type == "cuda":
            model.run_products(config.result_layout.max_results, self._limits.max_tokens)
            phases.end("products")
        full_step = full_step_plan(self._limits)
        self.num_blocks = choose_num_blocks(config, model, lambda: runner.run_alone(full_step))
        if self._ranks is not None:
            self.num_blocks = self._ranks.least(self.num_blocks)
        model.allocate_kv(self.num_blocks)
        phases.end("KV cache")
        kv_tokens = (self.num_blocks - 1) * config.block_size
        made = f"{config.card.name} on {self._device}, {model.dtype}, {model.backend} attention, {kv_tokens} KV tokens"
        self.description = ", ".join((made, *model.notes))
        return runner

    def _warm_up(self, config: EngineConfig, phases: Phases) -> None:
        """Compile, capture and pin everything, so that serving does none of it."""
        if not config.enforce_eager:
            self._runner.choose_ways()
        # The largest step comes first: torch keeps its memory, and later ones find theirs in it.
        plans = [full_step_plan(self._limits), *warmup_plans(self._limits)]
        self._runner.compile_ahead(plan for plan in plans if plan.flags == PlanFlag.NONE)
        for plan in plans:  # before there are graphs, which would replay most of them
            self._runner.run_alone(plan)
        for ring in (self._wire.plans, self._wire.results):
            pin(ring.memory)
        torch.cuda.synchronize(self._device)
        phases.end("warm-up")
        if not config.enforce_eager:
            self._runner.capture(self._streams.compute)
            torch.cuda.synchronize(self._device)
            phases.end("CUDA graphs")

    def serve(self) -> int:
        """Launch plans until asked to stop; returns the exit code."""
        self._wire.stop_on_sigterm()
        self._watch.start()
        step = 0
        while (payload := self._wire.next_plan()) is not None:
            since_ns = now_ns()
            step += 1
            struck = self._fault.strike(step, read_plan(payload).prefill_token if self._fault.kind else None)
            self._wire.corrupt_next |= struck == "corrupt"
            if self._profile is not None:
                self._profile.before(step)
            try:
                self._launch(payload, struck == "nan", since_ns)
            except RuntimeError:
                if self._ranks is None or not self._wire.is_stopping:
                    raise
                break  # another rank has stopped already, and a step cannot end without it
        if self._error is not None:
            traceback.print_exception(self._error)
            return 1
        if self._profile is not None:
            self._profile.finish()
        return 0

    def _launch(self, payload: Bytes, poison: bool, since_ns: int) -> None:
        header = PlanHeader.read(payload)
        result_seq, result = self._wire.begin_result()
        # What a rank that does not publish computes stays on its device: its memory here is not pinned.
        output_bytes = self._runner.output_bytes(header) if self._wire.publishes else 0
        self._lanes.launch(
            self._host[id(payload)],
            self._host[id(result)],
            partial(self._runner.run, header, poison),
            (header, result_seq, result),
            in_bytes=header.words[PlanWord.TOTAL_BYTES],
            out_bytes=output_bytes,
            since_ns=since_ns,
            waited=self._wire.waited,
        )
        if self._trace is not None:
            seq, rows = header.words[PlanWord.SEQ], header.num_rows
            self._trace.span(Track.LAUNCH, Act.LAUNCH, since_ns, now_ns(), seq, rows)

    def _publish(self, tag: tuple[PlanHeader, int, Bytes], times: StepTimes) -> None:
        """On the retire thread: the tokens are in the ring slot; add the header and show it."""
        seen_ns = now_ns()
        header, result_seq, result = tag
        plan_seq = header.words[PlanWord.SEQ]
        write_result_header(
            result,
            seq=plan_seq,
            epoch=header.words[PlanWord.EPOCH],
            num_rows=header.num_rows + header.num_scores,
            has_logprobs=header.has_logprobs,
            device_ns=times.device_ns,
            gap_ns=times.gap_ns,
            launch_ns=times.launch_ns,
            hidden=times.hidden,
            compilations=self._watch.take(),
        )
        self._wire.publish(result_seq, plan_seq)
        if self._trace is not None and times.spans is not None:
            rows = header.num_rows
            self._trace.span(Track.RETIRE, Act.PUBLISH, seen_ns, now_ns(), plan_seq, rows)
            self._trace.span(Track.H2D, Act.COPY_IN, *times.spans.h2d, plan_seq, rows)
            self._trace.span(Track.COMPUTE, Act.COMPUTE, *times.spans.compute, plan_seq, rows)
            self._trace.span(Track.D2H, Act.COPY_OUT, *times.spans.d2h, plan_seq, rows)

    def _fail(self, error: BaseException) -> None:
        """On the retire thread: the device failed; the launch thread must not sleep on."""
        self._error = error
        self._wire.stop()


def open_device(config: EngineConfig, place: int) -> torch.device:
    """The device of the rank at this place of its node, made current. Raises ConfigError if there is none."""
    if config.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available", param="--device")
    if place >= torch.cuda.device_count():
        raise ConfigError(f"rank {place} here has no device: {torch.cuda.device_count()} visible", param="--device")
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    return device


def pin(memory: Bytes) -> None:
    """Register shared memory with CUDA, so that ring slots are the pinned host buffers of the lanes."""
    cuda: Any = torch.cuda
    code = int(cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    if code != 0:
        raise RuntimeError(f"cudaHostRegister of {memory.nbytes} bytes failed with CUDA error {code}")
