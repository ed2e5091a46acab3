"""The OpenAPI document: it names every route, and a fuzzer that believes it finds nothing to complain of."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from frontend.client import AsyncClient
from frontend.openapi import make_document
from frontend.server import make_app
from frontend.service import Service
from ipc.config import HttpConfig
from tests.e2e.engine import Engine, running_engine
from tests.frontend.model_folder import tiny_model

CONFIG = Path(__file__).resolve().parents[1] / "schemathesis.toml"
FUZZER = "from schemathesis.cli import schemathesis; schemathesis()"
LIMIT_S = 240


@pytest.fixture(scope="module", params=[1, 3], ids=["one frontend", "three frontends"])
def frontends(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def engine(frontends: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Small, so that the longest answer is short."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    flags = ("--fake-executor", "--device", "cpu", "--max-model-len", "64", "--frontends", str(frontends))
    with running_engine(*flags, model=folder) as engine:
        yield engine


def test_the_document_names_every_route_and_no_other() -> None:
    app = make_app(Service(AsyncClient("ipc:///nowhere"), HttpConfig()))
    routes = {route.path.replace("{name:path}", "{name}") for route in app.routes}
    assert routes == set(make_document()["paths"])


def test_the_bounds_are_those_that_are_checked() -> None:
    schemas = make_document()["components"]["schemas"]
    assert schemas["CompletionRequest"]["properties"]["temperature"]["anyOf"][0]["maximum"] == 100
    assert schemas["ChatRequest"]["properties"]["top_p"]["anyOf"][0]["exclusiveMinimum"] == 0
    assert schemas["ChatRequest"]["required"] == ["messages"]


def test_schemathesis_finds_nothing_and_the_engine_serves_on(engine: Engine, frontends: int, tmp_path: Path) -> None:
    """All checks: no 5xx, documented statuses, types and bodies only; wrong types refused; other methods 405."""
    found = subprocess.run(
        [
            *(sys.executable, "-P", "-c", FUZZER, "--config-file", str(CONFIG)),
            *("run", f"{engine.root}/openapi.json", "--checks", "all", "--max-examples", "10", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    answer = httpx.post(f"{engine.root}/v1/completions", json={"prompt": "the end", "max_tokens": 3}, timeout=60)
    assert answer.status_code == 200
    assert httpx.get(f"{engine.root}/load", timeout=60).json() == {"server_load": 0}
    info = httpx.get(f"{engine.root}/server_info", timeout=60).json()
    assert (info["model"], info["max_model_len"], info["frontends"], info["draining"]) == ("tiny", 64, frontends, False)
