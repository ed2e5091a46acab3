"""Several replicas under one launcher, and one that joins from another, without a model: nobody's request fails."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from frontend import flags, launch
from frontend.replica import config_of, environment_of
from ipc.errors import ConfigError
from tests.e2e.engine import read_line, wait_until
from tests.frontend.model_folder import fake_tokens, tiny_model
from tests.frontend.test_supervisor import START_S, STOP_S, Launched, launched
from tests.scheduler.pipeline import tiny_config

FLAGS = ("--data-parallel-size", "2", "--watchdog-timeout", "4", "--enable-debug-endpoints")
SLOW = {"ENGINE_FAKE_STEP_US": "20000"}  # so that requests still run when a busy machine looks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def processes(engine: Launched) -> dict[tuple[str, int], psutil.Process]:
    """(role, number of the replica) -> process, as ps shows them."""
    found = {}
    for child in psutil.Process(engine.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if match := re.search(r"engine-launch: (\w+) of replica (\d+)", " ".join(child.cmdline())):
                found[match[1], int(match[2])] = child
    return found


def running(engine: Launched) -> dict[str, int]:
    """Requests that run in each replica that answers."""
    replicas: dict[str, Any] = httpx.get(f"{engine.root}/debug/invariants", timeout=START_S).json().get("replicas", {})
    return {number: found["running"] for number, found in replicas.items()}


@contextlib.contextmanager
def load(engine: Launched, count: int, max_tokens: int) -> Iterator[None]:
    """So many requests run meanwhile; afterwards each has all its tokens, and no other."""
    asked = [dict(prompt=[1, 8, 9 + i], max_tokens=max_tokens, seed=i, return_token_ids=True) for i in range(count)]
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(engine.complete, **fields) for fields in asked]
        yield
        found = [answer.result() for answer in answers]
        assert [answer.status_code for answer in found] == [200] * count, [answer.text for answer in found]
        for seed, answer in enumerate(found):
            assert answer.json()["choices"][0]["token_ids"] == fake_tokens(3, seed, max_tokens)
            assert answer.json()["usage"]["completion_tokens"] == max_tokens


def serves(engine: Launched, number: int) -> bool:
    """Whether replica `number`, in its present life, has ended some of the requests that came by the end of this."""
    with load(engine, 8, 10):
        pass
    counts = re.findall(rf'request_success_total{{engine="{number}",\S* (\d+)', engine.metrics())
    return any(int(count) for count in counts)


def stop(engine: Launched) -> None:
    engine.process.terminate()
    assert engine.wait() == 0
    assert not any("Traceback" in line for line in engine.stderr)


def test_replicas_share_the_requests_and_every_view_is_of_all_of_them(folder: Path) -> None:
    with launched(folder, *FLAGS, "--frontends", "2", env=SLOW) as engine:
        assert sorted(processes(engine)) == [("executor", 0), ("executor", 1), ("scheduler", 0), ("scheduler", 1)]
        with load(engine, 8, 100):
            wait_until(lambda: sum(running(engine).values()) == 8, START_S, "all run")
            assert min(running(engine).values()) >= 2
            assert httpx.get(f"{engine.root}/load", timeout=60).json() == {"server_load": 8}
            text = engine.metrics()
            traced = httpx.post(f"{engine.root}/debug/trace?seconds=0.2", timeout=60).json()["traceEvents"]
            lanes = {event["args"]["name"] for event in traced if event["name"] == "process_name"}
            assert {"device of replica 0", "scheduler of replica 1", "frontend 1"} <= lanes
            shown = re.findall(r'num_requests_running\{engine="(\d)",model_name="tiny"\} (\d)', text)
            assert sorted(number for number, _ in shown) == ["0", "1"]
        info = httpx.get(f"{engine.root}/server_info", timeout=60).json()
        assert sorted(info["replicas"]) == ["0", "1"]
        assert info["kv_cache_tokens"] == sum(each["kv_cache_tokens"] for each in info["replicas"].values())
        assert engine.invariants()["blocks_free"] == engine.invariants()["blocks_total"]
        stop(engine)


def test_a_killed_replica_is_restarted_and_its_streams_go_on_elsewhere(folder: Path) -> None:
    with launched(folder, *FLAGS, env=SLOW) as engine:
        with load(engine, 8, 250):
            wait_until(lambda: sum(running(engine).values()) == 8, START_S, "all run")
            for role in ("scheduler", "executor"):
                processes(engine)[role, 1].kill()
            wait_until(lambda: running(engine).get("0") == 8, START_S, "the other has all of them")
            assert httpx.get(f"{engine.root}/health", timeout=60).status_code == 200
        wait_until(lambda: any("serving again" in line for line in engine.stderr), START_S, "it is back")
        wait_until(lambda: sorted(running(engine)) == ["0", "1"], START_S, "it answers")
        wait_until(lambda: serves(engine, 1), START_S, "it takes requests")
        assert "replica 1: scheduler restarted" in "\n".join(engine.stderr)
        stop(engine)


def test_new_requests_avoid_a_replica_whose_executor_is_being_replaced(folder: Path) -> None:
    with launched(folder, *FLAGS, env=SLOW) as engine:
        with load(engine, 4, 250):
            wait_until(lambda: sum(running(engine).values()) == 4, START_S, "all run")
            processes(engine)["executor", 1].kill()
            wait_until(lambda: running(engine)["1"] == 0, START_S, "its requests wait")
            assert engine.complete(max_tokens=1).status_code == 200
        stop(engine)


def test_a_replica_that_fails_too_often_is_given_up_and_the_last_one_ends_the_engine(folder: Path) -> None:
    with launched(folder, *FLAGS, "--max-restarts", "0", env=SLOW) as engine:
        with load(engine, 6, 200):
            wait_until(lambda: sum(running(engine).values()) == 6, START_S, "all run")
            processes(engine)["scheduler", 0].kill()
            wait_until(lambda: running(engine) == {"1": 6}, START_S, "the other has all of them")
        assert sorted(processes(engine)) == [("executor", 1), ("scheduler", 1)]
        processes(engine)["executor", 1].kill()
        assert engine.wait() == 1
        assert "replica 0: is given up" in "\n".join(engine.stderr)


def test_a_stopped_scheduler_does_not_hide_the_replicas_that_answer(folder: Path) -> None:
    with launched(folder, *FLAGS, env=SLOW) as engine:
        with load(engine, 6, 200):
            wait_until(lambda: sum(running(engine).values()) == 6, START_S, "all run")
            processes(engine)["scheduler", 1].send_signal(signal.SIGSTOP)
            assert httpx.get(f"{engine.root}/health", timeout=60).status_code == 200
            wait_until(lambda: any("silent for" in line for line in engine.stderr), START_S, "it is noticed")
        stop(engine)


def test_a_replica_joins_under_load_and_leaves_again(folder: Path) -> None:
    """Another launcher's; when it ends, what it ran goes on in the engine that it was a part of."""
    with launched(folder, "--enable-debug-endpoints", env=SLOW) as engine:
        command = [sys.executable, "-P", "-m", "frontend.launch", str(folder), "--fake-executor", "--device", "cpu"]
        command += ["--frontends", "0", "--enable-debug-endpoints", "--join", f"ipc://{engine.directory}/frontend.sock"]
        joined = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **SLOW})
        try:
            with load(engine, 4, 500):
                assert read_line(joined, START_S).startswith("Serving tiny on ipc://")
                wait_until(lambda: sorted(running(engine)) == ["0", "1"], START_S, "it is there")
                with load(engine, 4, 200):
                    wait_until(lambda: running(engine)["1"] >= 2, START_S, "it runs requests")
                    joined.terminate()
                    wait_until(lambda: sorted(running(engine)) == ["0"], START_S, "it has left")
                    assert joined.wait(STOP_S) == 0
        finally:
            joined.kill()
            joined.wait()
        stop(engine)


def test_a_joined_replica_is_dropped_with_its_launcher_and_finishes_what_it_has_at_sigterm(
    folder: Path,
) -> None:
    with launched(folder, "--data-parallel-size", "0", "--enable-debug-endpoints", env=SLOW, ready=False) as engine:
        wait_until(partial(directory_of, engine), START_S, "the directory")
        command = [sys.executable, "-P", "-m", "frontend.launch", str(folder), "--fake-executor", "--device", "cpu"]
        command += ["--frontends", "0", "--enable-debug-endpoints", "--join", directory_of(engine)]
        slow = {**os.environ, **SLOW}
        joined = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=slow) for _ in range(2)]
        try:
            engine.wait_ready()
            wait_until(lambda: len(running(engine)) == 2, START_S, "both are there")
            with load(engine, 4, 100):
                joined[0].kill()
            wait_until(lambda: len(running(engine)) == 1, START_S, "it is dropped")
            with load(engine, 4, 200):
                wait_until(lambda: list(running(engine).values()) == [4], START_S, "the other one has all of them")
                engine.process.terminate()
                wait_until(lambda: engine.complete().status_code == 503, START_S, "new requests are refused")
            assert engine.wait() == 0
            assert joined[1].poll() is None, "it may join another engine"
        finally:
            for each in joined:
                each.kill()
                each.wait()


def directory_of(engine: Launched) -> str:
    """The endpoint of an engine that has not printed it yet: it waits for replicas."""
    for connection in psutil.Process(engine.process.pid).net_connections("unix"):
        if str(connection.laddr).endswith("/frontend.sock"):
            return f"ipc://{connection.laddr}"
    return ""


def test_every_rank_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cuda_devices", lambda: 6)
    sizes = ["--tensor-parallel-size", "2", "--data-parallel-size", "4", "--device", "cuda"]
    with pytest.raises(ConfigError, match="4 replicas of 2 ranks need 8 GPUs, the NVIDIA driver shows 6") as refused:
        launch.prepare(flags.parse([str(tmp_path), *sizes]))
    assert refused.value.param == "--data-parallel-size"

    config = msgspec.structs.replace(tiny_config(), device="cuda", ranks=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shown = [environment_of(number, 3, config, 6)["CUDA_VISIBLE_DEVICES"] for number in range(3)]
    assert shown == ["0,1", "2,3", "4,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-abc,1")
    assert [environment_of(n, 2, config, 4)["CUDA_VISIBLE_DEVICES"] for n in range(2)] == ["7,5", "GPU-abc,1"]
    assert environment_of(0, 1, config, 4) == {}


def test_replicas_have_ports_of_their_own() -> None:
    config = msgspec.structs.replace(tiny_config(), frontend_endpoint="tcp://[::1]:5757")
    assert [config_of(n, 2, config).frontend_endpoint for n in range(2)] == ["tcp://[::1]:5758", "tcp://[::1]:5759"]
    free = msgspec.structs.replace(config, frontend_endpoint="tcp://10.0.0.1:0")
    assert config_of(1, 2, free).frontend_endpoint == "tcp://10.0.0.1:0"
    assert config_of(0, 1, tiny_config()).frontend_endpoint == ""
