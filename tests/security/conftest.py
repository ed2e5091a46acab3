"""One engine for all HTTP tests of this folder: fake executor, three API keys, tenants apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.engine import Engine, running_engine
from tests.frontend.model_folder import tiny_model

FILE_KEY, ENVIRONMENT_KEY, FLAG_KEY = "sk-from-a-file-1", "sk-from-the-environment-2", "sk-from-a-flag-3"
SECRET_PROMPT = "my-secret-prompt"
FORGED = "FORGED LINE"
ORIGIN = "https://page.example"
WAIT_S = 60.0


@dataclass
class Service:
    """A protected engine, and a client with a good key."""

    engine: Engine
    http: httpx.Client

    def pids(self) -> dict[str, int]:
        return {role: process.pid for role, process in self.engine.children().items()}

    def good_answer(self, key: str = FILE_KEY, **fields: object) -> dict[str, object]:
        body = {"prompt": "the end", "max_tokens": 4, "seed": 0, **fields}
        headers = {"authorization": f"Bearer {key}"}
        response = self.http.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
        answer: dict[str, object] = response.json()
        return answer

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(self.engine.process.pid), *self.engine.children().values()]


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Ends with what holds for all tests that used it: nothing secret, and no line of a client's making, in the log."""
    folder = tmp_path_factory.mktemp("service")
    keys, log = folder / "api-keys", folder / "log"
    keys.write_text(f"# tenants\n{FILE_KEY}\n\n")
    flags = ["--fake-executor", "--device", "cpu", "--api-key-file", str(keys), "--api-key", FLAG_KEY]
    flags += ["--isolate-api-keys", "--allowed-origins", f"https://other.example, {ORIGIN}"]
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(log.open("w"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ENGINE_API_KEY", ENVIRONMENT_KEY)
            engine = stack.enter_context(running_engine(*flags, model=tiny_model(folder / "tiny"), stderr=stderr))
        yield Service(engine, stack.enter_context(httpx.Client(base_url=engine.root, timeout=WAIT_S)))
    _check_log(log)


def _check_log(log: Path) -> None:
    text = log.read_text(errors="replace")
    for secret in (FILE_KEY, ENVIRONMENT_KEY, FLAG_KEY, SECRET_PROMPT):
        assert secret not in text
    assert not [line for line in text.splitlines() if line.startswith(FORGED)]


@pytest.fixture
def unharmed(service: Service) -> Iterator[None]:
    """After the test the same processes answer as before, with nothing left running and no more memory than is fair."""
    pids, answer = service.pids(), service.good_answer()["choices"]
    before = memory_mib(service)
    yield
    assert service.good_answer()["choices"] == answer
    assert service.pids() == pids
    assert memory_mib(service) < before + 200
    metrics = service.http.get("/metrics").text
    assert 'engine:num_requests_running{engine="0",model_name="tiny"} 0.0' in metrics


def memory_mib(service: Service) -> float:
    """Resident memory of all processes of the engine."""
    return sum(process.memory_info().rss for process in service.processes()) / (1 << 20)
