"""The smallest scheduler that can drive an executor process: it spawns it, writes plans by hand, reads results.

Plans are sent up to `depth` ahead of their results and never wait for a token, as the real scheduler's are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import zmq

from executor.warmup import synthetic_plan
from ipc.config import RING_SLOTS, EngineConfig, ExecutorChannels, write_start
from ipc.control import ExecutorHello, decode_control
from ipc.doorbell import Doorbell
from ipc.frames import Param, Plan, PlanFlag, write_plan
from ipc.results import Result, read_result
from ipc.ring import RingReader, RingWriter, create_ring
from ipc.sockets import bind_router

READY_S = 120.0
STEP_S = 60.0


class ExecutorDiedError(Exception):
    """The process ended while something was awaited of it."""


class ExecutorProcess:
    """One executor with real rings, bells and control socket."""

    def __init__(self, config: EngineConfig, folder: Path, module: str = "executor", env: dict[str, str] | None = None):
        self.config, self._folder, self._module = config, folder, module
        limits, layout = config.limits, config.result_layout
        self._plan_fd = create_ring(RING_SLOTS, limits.plan_bytes)
        self._result_fd = create_ring(RING_SLOTS, layout.nbytes)
        self.plans, self.results = RingWriter(self._plan_fd), RingReader(self._result_fd)
        self.plan_bell, self.result_bell = Doorbell.create(), Doorbell.create()
        self._context = zmq.Context()
        self._endpoint = f"ipc://{folder}/control.sock"
        self.control = bind_router(self._context, self._endpoint)
        self.seq = 0
        self.start(env)

    def start(self, env: dict[str, str] | None = None, epoch: int = 1, module: str | None = None) -> None:
        """Start a life of the executor on the same rings."""
        self.epoch = epoch
        alive, self.parent_end = os.pipe()
        fds = (self._plan_fd, self._result_fd, self.plan_bell.fd, self.result_bell.fd, alive)
        channels = ExecutorChannels(
            epoch=epoch,
            plan_ring=self._plan_fd,
            plan_bell=self.plan_bell.fd,
            result_ring=self._result_fd,
            result_bell=self.result_bell.fd,
            control=self._endpoint,
            parent_pipe=alive,
        )
        start = write_start(self.config, channels)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module or self._module, "--start-fd", str(start)],
            pass_fds=(*fds, start),
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(start)
        os.close(alive)

    def wait_ready(self) -> ExecutorHello:
        exit_fd = os.pidfd_open(self.process.pid)
        poller = zmq.Poller()
        poller.register(self.control, zmq.POLLIN)
        poller.register(exit_fd, zmq.POLLIN)
        ready = dict(poller.poll(READY_S * 1000))
        os.close(exit_fd)
        if self.control not in ready:
            raise ExecutorDiedError(self.stop())
        hello = decode_control(self.control.recv_multipart()[1])
        assert isinstance(hello, ExecutorHello)
        return hello

    def send(self, plan: Plan, epoch: int | None = None) -> int:
        self.seq = self.plans.head + 1
        plan = replace(plan, seq=self.seq, epoch=self.epoch if epoch is None else epoch)
        write_plan(self.plans.begin(self.seq), plan)
        self.plans.publish(self.seq)
        self.plan_bell.ring()
        return self.seq

    def send_stale(self) -> int:
        """Publish a plan of the epoch before, as a scheduler that has not heard of the new one would."""
        return self.send(synthetic_plan([1], 1, PlanFlag.NONE), self.epoch - 1)

    def receive(self) -> Result:
        """The next result, copied out of the ring."""
        exit_fd = os.pidfd_open(self.process.pid)
        while (payload := self.results.poll()) is None:
            ready = self.result_bell.wait(exit_fd, timeout_s=STEP_S)
            if not ready or exit_fd in ready:
                raise ExecutorDiedError(self.stop())
        os.close(exit_fd)
        result = read_result(payload.copy(), self.config.result_layout)
        self.results.ack(self.results.next)
        self.results.advance()
        return result

    def stop(self) -> str:
        """SIGTERM; returns what it wrote to stderr."""
        self.process.terminate()
        return self.process.communicate(timeout=30)[1]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=30)
        self.control.close()
        self._context.term()
        for fd in (self._plan_fd, self._result_fd, self.plan_bell.fd, self.result_bell.fd, self.parent_end):
            os.close(fd)


@dataclass
class Sequence:
    """One request as the driver sees it."""

    slot: int
    prompt: list[int]
    max_tokens: int
    params: dict[Param, int] = field(default_factory=dict)
    computed: int = 0
    planned: int = 0  # tokens asked for
    output: list[int] = field(default_factory=list)
    results: list[tuple[Result, int]] = field(default_factory=list)  # (step, row) of each token


class Driver:
    """Runs sequences to their max_tokens with chunked prefill; all of them fit at once."""

    def __init__(self, config: EngineConfig, executor: ExecutorProcess, chunk: int) -> None:
        self._config, self._executor, self._chunk = config, executor, chunk
        self._next_block = 1
        self._blocks: dict[int, int] = {}  # slot -> blocks given
        self.results: list[Result] = []

    def run(self, sequences: Iterable[Sequence], flags: PlanFlag = PlanFlag.NONE) -> None:
        todo = list(sequences)
        inflight: deque[list[tuple[int, Sequence]]] = deque()
        while inflight or any(sequence.planned < sequence.max_tokens for sequence in todo):
            active = [sequence for sequence in todo if sequence.planned < sequence.max_tokens]
            if active and len(inflight) < self._config.pipeline_depth:
                inflight.append(self._plan(active, flags))
                continue
            result = self._executor.receive()
            self.results.append(result)
            for row, sequence in inflight.popleft():
                sequence.output.append(int(result.token[row]))
                sequence.results.append((result, row))

    def _plan(self, active: list[Sequence], flags: PlanFlag) -> list[tuple[int, Sequence]]:
        decode = [sequence for sequence in active if sequence.computed >= len(sequence.prompt)]
        prefill = [sequence for sequence in active if sequence.computed < len(sequence.prompt)]
        admits = [sequence for sequence in prefill if sequence.computed == 0]
        chunks = [sequence.prompt[sequence.computed :][: self._chunk] for sequence in prefill]
        rows = [*decode, *prefill]
        plan = synthetic_plan([1] * len(decode) + [len(chunk) for chunk in chunks], len(decode), flags)
        plan.row_slot = np.array([sequence.slot for sequence in rows], np.int32)
        plan.prefill_token = np.array([token for chunk in chunks for token in chunk], np.int32)
        deltas: list[tuple[int, int, int]] = []
        sampled: list[tuple[int, Sequence]] = []
        for row, sequence in enumerate(rows):
            sequence.computed += int(plan.row_query_len[row])
            deltas += self._grow(sequence)
            if sequence.computed >= len(sequence.prompt):
                sequence.planned += 1
                sampled.append((row, sequence))
            else:
                plan.row_sample[row] = 0
        plan.block_slot, plan.block_index, plan.block_id = np.array(deltas, np.int32).reshape(-1, 3).T.copy()
        plan.admit_slot = np.array([sequence.slot for sequence in admits], np.int32)
        plan.admit_params = np.array([_params(sequence) for sequence in admits], np.int32).reshape(-1, Param.COUNT)
        self._executor.send(plan)
        return sampled

    def _grow(self, sequence: Sequence) -> list[tuple[int, int, int]]:
        """Block deltas (slot, index, block) so that `computed` tokens fit."""
        deltas = []
        while self._blocks.get(sequence.slot, 0) * self._config.block_size < sequence.computed:
            index = self._blocks.get(sequence.slot, 0)
            deltas.append((sequence.slot, index, self._next_block))
            self._blocks[sequence.slot] = index + 1
            self._next_block += 1
        return deltas


def _params(sequence: Sequence) -> list[int]:
    row = [0] * Param.COUNT
    for param, value in {**_NEUTRAL, **sequence.params}.items():
        row[param] = value
    return row


def float_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


_NEUTRAL: Final = {Param.TOP_P: float_bits(1.0), Param.REPETITION: float_bits(1.0)}
