"""--request-timeout and --queue-timeout as HTTP clients see them: an error, never what looks like a whole answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.engine import wait_until
from tests.frontend.model_folder import tiny_model
from tests.frontend.test_supervisor import START_S, STOP_S, Launched, launched

LONG = {"prompt": "the end", "seed": 0, "max_tokens": 2000, "ignore_eos": True}  # 40 s of steps
SLOW_STEPS = {"ENGINE_FAKE_STEP_US": "20000"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def events(text: str) -> list[dict[str, Any]]:
    assert "[DONE]" not in text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def is_at_rest(engine: Launched) -> bool:
    found = engine.invariants()
    return (found["requests"], found["blocks_free"]) == (0, found["blocks_total"])


def test_a_request_that_takes_too_long_ends_with_an_error(folder: Path) -> None:
    with launched(folder, "--request-timeout", "0.5", "--enable-debug-endpoints", env=SLOW_STEPS) as engine:
        whole = engine.complete(**LONG)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        assert "did not finish within 0.5 s" in whole.json()["error"]["message"]
        for path, body in (
            ("completions", LONG),
            ("chat/completions", {**LONG, "prompt": None, "messages": [{"role": "user", "content": "the end"}]}),
        ):
            answer = httpx.post(f"{engine.root}/v1/{path}", json={**body, "stream": True}, timeout=START_S)
            assert answer.status_code == 200, "the first tokens came in time"
            *tokens, last = events(answer.text)
            assert tokens
            assert not any(choice["finish_reason"] for event in tokens for choice in event["choices"])
            assert (set(last), last["error"]["code"]) == ({"error"}, "timeout")
        assert engine.complete(max_tokens=2).json()["choices"][0]["finish_reason"] == "length"
        wait_until(lambda: is_at_rest(engine), STOP_S, "what it held is free")


def test_a_request_that_waits_too_long_to_run_ends_with_an_error(folder: Path) -> None:
    flags = ["--queue-timeout", "0.3", "--max-num-seqs", "1", "--enable-debug-endpoints"]
    with launched(folder, *flags, env=SLOW_STEPS) as engine:
        body = {**LONG, "stream": True}
        with httpx.stream("POST", f"{engine.root}/v1/completions", json=body, timeout=START_S) as running:
            lines = running.iter_lines()
            next(lines)  # it has the only slot, and is not bound by the limit any more
            whole = engine.complete(max_tokens=1)
            assert (whole.status_code, whole.json()["error"]["code"]) == (504, "queue_timeout")
            assert "waited in the queue for 0.3 s" in whole.json()["error"]["message"]
            streamed = engine.complete(max_tokens=1, stream=True)
            error = streamed.json() if streamed.status_code == 504 else events(streamed.text)[-1]
            assert error["error"]["code"] == "queue_timeout"
            assert '"finish_reason":"' not in streamed.text
            assert engine.invariants()["running"] == 1
        wait_until(lambda: is_at_rest(engine), STOP_S, "what it held is free")
        assert engine.complete(max_tokens=2).status_code == 200
