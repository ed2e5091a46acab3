"""Two replicas of a real model: one is killed whole under load, and no stream is lost or differs by a byte."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import shutil
from pathlib import Path

import httpx
import psutil

from tests.e2e.engine import DEMO_MODEL, Engine, running_engine, wait_until

WAIT_S = 120.0
FLAGS = ("--device", "cpu", "--dtype", "float32", "--data-parallel-size", "2", "--enable-debug-endpoints")


def body(index: int) -> dict[str, object]:
    """Half of them greedy, half seeded; half with log-probabilities."""
    sampling = {"temperature": 0} if index % 2 else {"temperature": 0.8, "seed": index, "frequency_penalty": 0.3}
    logprobs = {"logprobs": 2} if index % 4 < 2 else {}
    fields = {"prompt": f"def test_{index}(self):", "max_tokens": 150, "ignore_eos": True, "stream": True}
    return {**fields, "return_token_ids": True, **sampling, **logprobs}


def stream(engine: Engine, index: int) -> list[dict[str, object]]:
    """What the choices of a stream's events say, in order; it must end as a stream should."""
    found = []
    with httpx.stream("POST", f"{engine.url}/completions", json=body(index), timeout=WAIT_S) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]", lines[-3:]
    for line in lines[:-1]:
        event = json.loads(line.removeprefix("data: "))
        found += event["choices"]
    return found


def joined(choices: list[dict[str, object]]) -> tuple[object, ...]:
    """Where events are cut depends on when tokens came; what they add up to does not."""
    text = "".join(str(choice["text"]) for choice in choices)
    ids = [token for choice in choices for token in choice.get("token_ids") or ()]  # type: ignore[attr-defined]
    logprobs = [
        (token, round(value, 3))
        for choice in choices
        if choice.get("logprobs")
        for token, value in zip(
            choice["logprobs"]["tokens"],
            choice["logprobs"]["token_logprobs"],
            strict=True,  # type: ignore[index]
        )
    ]
    return text.encode(), ids, logprobs, choices[-1]["finish_reason"]


def replica(engine: Engine, number: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(engine.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if re.search(rf"engine-launch: \w+ of replica {number}", " ".join(child.cmdline())):
                found.append(child)
    return found


def invariants(engine: Engine) -> dict[str, dict[str, int]]:
    answer = httpx.get(f"{engine.root}/debug/invariants", timeout=WAIT_S)
    assert answer.status_code in (200, 503), answer.text
    return answer.json().get("replicas", {}) if answer.is_success else {}


def busy(engine: Engine) -> int:
    """Replicas that run a quarter of the streams at least."""
    return sum(found["running"] >= 3 for found in invariants(engine).values())


def test_one_of_two_replicas_is_killed_under_load_and_no_byte_is_lost() -> None:
    with running_engine(*FLAGS) as engine:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            streams = [pool.submit(stream, engine, index) for index in range(12)]
            wait_until(lambda: busy(engine) == 2, WAIT_S, "both run streams")
            killed = replica(engine, 1)
            assert len(killed) == 2
            for process in killed:
                process.kill()
            wait_until(lambda: list(invariants(engine)) == ["0"], WAIT_S, "it is gone")
            assert httpx.get(f"{engine.root}/health", timeout=WAIT_S).status_code == 200
            lost = [joined(each.result()) for each in streams]
            wait_until(lambda: len(invariants(engine)) == 2, WAIT_S, "it is back")
            calm = [joined(each) for each in pool.map(lambda index: stream(engine, index), range(12))]
        assert [len(ids) for _, ids, *_ in lost] == [150] * 12  # type: ignore[arg-type]
        assert lost == calm
        assert {process.pid for process in replica(engine, 1)}.isdisjoint(process.pid for process in killed)
        for found in invariants(engine).values():
            assert (found["requests"], found["blocks_free"]) == (0, found["blocks_total"])


def test_weights_that_are_gone_for_a_while_cost_a_replica_and_no_stream(tmp_path: Path) -> None:
    """What a start would refuse, a restart tries again: the other replica serves."""
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "demo")
    with running_engine(*FLAGS, "--max-restarts", "1", model=folder) as engine:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(stream, engine, index) for index in range(4)]
            wait_until(lambda: len(invariants(engine)) == 2, WAIT_S, "both are there")
            (folder / "model.safetensors").rename(tmp_path / "away")
            for process in replica(engine, 1):
                if "executor" in " ".join(process.cmdline()):
                    process.kill()
            assert [len(joined(each.result())[1]) for each in streams] == [150] * 4  # type: ignore[arg-type]
        wait_until(lambda: not replica(engine, 1), WAIT_S, "it is given up")
        assert httpx.get(f"{engine.root}/health", timeout=WAIT_S).status_code == 200
