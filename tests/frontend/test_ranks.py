"""Several executor ranks under one launcher, without a model: they start, stop, die and recover as one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.e2e.engine import wait_until
from tests.frontend.model_folder import fake_tokens, tiny_model
from tests.frontend.test_supervisor import START_S, Launched, launched

RANKS = 3
FLAGS = ("--tensor-parallel-size", str(RANKS), "--enable-debug-endpoints")
REQUEST = dict(prompt=[1, 8, 9], max_tokens=250, return_token_ids=True)
EXPECTED = fake_tokens(3, seed=0, count=250)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def ranks_of(engine: Launched) -> dict[int, psutil.Process]:
    """The executor's processes, as ps shows them."""
    found = {}
    for child in psutil.Process(engine.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if match := re.search(r"engine-launch: executor ?(\d*)$", " ".join(child.cmdline()).rstrip("\0 ")):
                found[int(match[1] or 0)] = child
    return found


@pytest.mark.parametrize("fault", ["kill the last", "kill the first", "stop the last"])
def test_a_rank_that_ends_or_hangs_is_replaced_with_all_others(folder: Path, fault: str) -> None:
    watchdog = ["--watchdog-timeout", "4"] if "stop" in fault else []
    with launched(folder, *FLAGS, *watchdog, env={"ENGINE_FAKE_STEP_US": "10000"}) as engine:
        before = ranks_of(engine)
        assert sorted(before) == list(range(RANKS))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(engine.complete, **REQUEST)
            wait_until(lambda: engine.invariants()["running"] == 1, START_S, "it runs")
            hit = before[0 if "first" in fault else RANKS - 1]
            hit.send_signal(signal.SIGSTOP if "stop" in fault else signal.SIGKILL)
            assert answer.result().json()["choices"][0]["token_ids"] == EXPECTED
        after = ranks_of(engine)
        assert sorted(after) == list(range(RANKS))
        assert not {process.pid for process in before.values()} & {process.pid for process in after.values()}
        log = "\n".join(engine.stderr)
        assert "restart 1 of 3" in log
        assert "restart 2 of 3" not in log, "one death of all ranks counts once"
        if "stop" in fault:
            assert len(re.findall(r"no step finished for \d\.\d s; ending executor", log)) == RANKS
        engine.process.terminate()
        assert engine.wait() == 0


def test_a_restarted_scheduler_goes_on_with_the_same_ranks(folder: Path) -> None:
    with launched(folder, *FLAGS, env={"ENGINE_FAKE_STEP_US": "10000"}) as engine:
        before = {rank: process.pid for rank, process in ranks_of(engine).items()}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(engine.complete, **REQUEST)
            wait_until(lambda: engine.invariants()["running"] == 1, START_S, "it runs")
            engine.roles()["scheduler"].kill()
            assert answer.result().json()["choices"][0]["token_ids"] == EXPECTED
        assert {rank: process.pid for rank, process in ranks_of(engine).items()} == before
        engine.process.terminate()
        assert engine.wait() == 0
        assert not any(psutil.pid_exists(pid) for pid in before.values())


def test_a_fault_of_the_user_in_every_rank_ends_the_start(folder: Path) -> None:
    with launched(folder, *FLAGS, env={"ENGINE_FAULT": "executor:bogus"}, ready=False) as engine:
        assert engine.wait() == 2
        said = r"executor( \d)?: error: ENGINE_FAULT: "
        assert [line for line in engine.stderr if not re.match(said, line)] == []


def test_more_ranks_than_gpus_are_refused_with_both_numbers(tmp_path: Path) -> None:
    from frontend import flags, launch
    from ipc.errors import ConfigError

    options = flags.parse([str(tmp_path), "--tensor-parallel-size", "3", "--device", "cuda"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "cuda_devices", lambda: 2)
        with pytest.raises(ConfigError, match="3 ranks need 3 GPUs, the NVIDIA driver shows 2") as refused:
            launch.prepare(options)
    assert refused.value.param == "--tensor-parallel-size"
