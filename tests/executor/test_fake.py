"""The fake executor: same wire as the real one, predictable tokens, no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from executor.fake import DEFAULT_NUM_BLOCKS
from executor.warmup import synthetic_plan
from ipc.config import EngineConfig
from ipc.frames import INVALID_TOKEN, Param, PlanFlag
from ipc.schema import ModelCard
from tests.executor.driver import Driver, ExecutorDiedError, ExecutorProcess, Sequence

EOS = (3, 7)


def make_config(**options: object) -> EngineConfig:
    card = ModelCard("fake", "", 64, 50, EOS, 2)
    return EngineConfig(card=card, max_num_seqs=8, max_num_batched_tokens=64, block_size=4, **options)  # type: ignore[arg-type]


def expected_token(seed: int, position: int) -> int:
    ids = [token for token in range(50) if token not in EOS]
    return ids[(seed + position) % len(ids)]


def test_tokens_depend_on_seed_and_position_only(tmp_path: Path) -> None:
    executor = ExecutorProcess(make_config(), tmp_path, "executor.fake")
    try:
        hello = executor.wait_ready()
        assert (hello.epoch, hello.pid, hello.num_blocks) == (1, executor.process.pid, DEFAULT_NUM_BLOCKS)
        seeds = [0, 41, -5]
        sequences = [Sequence(i, [1] * (3 + 5 * i), 9, {Param.SEED_LOW: seeds[i]}) for i in range(3)]
        driver = Driver(executor.config, executor, chunk=4)
        driver.run(sequences, PlanFlag.LOGPROBS)
        for i, sequence in enumerate(sequences):
            assert sequence.output == [expected_token(seeds[i], len(sequence.prompt) + n) for n in range(9)]
        assert all(result.logprob is not None and not result.logprob.any() for result in driver.results)
        assert [result.seq for result in driver.results] == list(range(1, len(driver.results) + 1))
        executor.stop()
        assert executor.process.returncode == 0
    finally:
        executor.close()


def test_a_step_takes_as_long_as_asked(tmp_path: Path) -> None:
    executor = ExecutorProcess(make_config(), tmp_path, "executor.fake", {"ENGINE_FAKE_STEP_US": "2000"})
    try:
        executor.wait_ready()
        driver = Driver(executor.config, executor, chunk=64)
        driver.run([Sequence(0, [1], 5)])
        assert all(result.device_ns >= 2_000_000 for result in driver.results)
        assert any(result.hidden for result in driver.results)
    finally:
        executor.close()


@pytest.mark.parametrize("kind", ["raise", "exit"])
def test_it_dies_when_asked_and_a_new_life_goes_on(tmp_path: Path, kind: str) -> None:
    fault = {"ENGINE_FAULT": f"executor:step=3:epoch=1:{kind}"}
    executor = ExecutorProcess(make_config(), tmp_path, "executor.fake", fault)
    try:
        executor.wait_ready()
        sequence = Sequence(0, [1, 2], 6)
        with pytest.raises(ExecutorDiedError):
            Driver(executor.config, executor, chunk=64).run([sequence])
        assert executor.process.returncode == 1
        assert len(sequence.output) == 2
        executor.start(fault, epoch=2)
        assert executor.wait_ready().epoch == 2
        executor.plans.restart()
        again = Sequence(0, [1, 2], 6)
        Driver(executor.config, executor, chunk=64).run([again])
        assert again.output == [expected_token(0, 2 + n) for n in range(6)]
    finally:
        executor.close()


def test_nan_is_reported_for_the_first_row_of_one_step(tmp_path: Path) -> None:
    executor = ExecutorProcess(make_config(), tmp_path, "executor.fake", {"ENGINE_FAULT": "executor:step=2:nan"})
    try:
        executor.wait_ready()
        sequences = [Sequence(0, [1], 3), Sequence(1, [1], 3)]
        Driver(executor.config, executor, chunk=64).run(sequences)
        assert [token == INVALID_TOKEN for token in sequences[0].output] == [False, True, False]
        assert INVALID_TOKEN not in sequences[1].output
    finally:
        executor.close()


def test_a_fault_that_is_not_understood_is_a_config_error(tmp_path: Path) -> None:
    executor = ExecutorProcess(make_config(), tmp_path, "executor.fake", {"ENGINE_FAULT": "executor:step=x:raise"})
    try:
        with pytest.raises(ExecutorDiedError, match="ENGINE_FAULT"):
            executor.wait_ready()
        assert executor.process.returncode == 2
    finally:
        executor.close()


def test_it_never_imports_torch() -> None:
    code = "import sys, executor.fake; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60).returncode == 0


def test_sigterm_is_heeded_while_plans_keep_coming(tmp_path: Path) -> None:
    executor = ExecutorProcess(make_config(), tmp_path, "executor.fake", {"ENGINE_FAKE_STEP_US": "1000"})
    try:
        executor.wait_ready()
        plan = synthetic_plan([1], 1, PlanFlag.NONE)
        for _ in range(3):
            executor.send(plan)
        executor.process.terminate()
        with pytest.raises(ExecutorDiedError):
            while True:
                executor.receive()
                executor.send(plan)
        assert executor.process.returncode == 0
    finally:
        executor.close()
