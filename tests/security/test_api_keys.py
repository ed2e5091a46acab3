"""API keys: which routes need one, which keys are good, where they may not appear, and what they keep apart."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

from frontend import flags
from frontend.api_keys import OPEN_PATHS
from frontend.client import AsyncClient
from frontend.digests import collect_digests, digest
from frontend.server import make_app
from frontend.service import Service as HttpService
from ipc.config import HttpConfig
from ipc.errors import ConfigError
from tests.security.conftest import ENVIRONMENT_KEY, FILE_KEY, FLAG_KEY, ORIGIN, Service


def routes() -> list[tuple[str, str]]:
    """(method, path) of everything the application serves."""
    app = make_app(HttpService(AsyncClient("ipc:///nowhere"), HttpConfig()))
    found = [(method, route.path) for route in app.routes for method in getattr(route, "methods", ())]
    assert len(found) > 10
    return sorted((method, path.replace("{name:path}", "tiny")) for method, path in found)


def test_every_route_that_is_not_open_needs_a_key(service: Service) -> None:
    for method, path in [*routes(), ("GET", "/"), ("GET", "/no/such/path"), ("POST", "/health/../v1/models")]:
        if method == "OPTIONS":
            continue
        response = httpx.request(method, service.engine.root + path, timeout=60)
        if path in OPEN_PATHS:
            assert response.status_code == 200, path
            continue
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
        if method != "HEAD":
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


@pytest.mark.parametrize("key", [FILE_KEY, ENVIRONMENT_KEY, FLAG_KEY])
def test_a_key_of_each_source_is_good(service: Service, key: str) -> None:
    with openai.OpenAI(base_url=service.engine.url, api_key=key, max_retries=0) as client:
        assert client.models.list().data[0].id == "tiny"


@pytest.mark.parametrize(
    "header",
    [
        "Bearer",
        "Bearer wrong",
        f"Basic {FILE_KEY}",
        FILE_KEY,
        f"Bearer {FILE_KEY}x",
        f"Bearer {FILE_KEY[:-1]}",
    ],
)
def test_other_headers_are_not(service: Service, header: str) -> None:
    assert httpx.get(service.engine.url + "/models", headers={"authorization": header}, timeout=60).status_code == 401


def test_the_openai_client_gets_its_authentication_error(service: Service) -> None:
    wrong = openai.OpenAI(base_url=service.engine.url, api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_no_process_shows_a_key(service: Service) -> None:
    processes = service.processes()
    assert len(processes) == 4
    for process in processes:
        shown = " ".join(process.cmdline())
        assert not [key for key in (FILE_KEY, ENVIRONMENT_KEY, FLAG_KEY) if key in shown]
        if process.pid != service.engine.process.pid:
            assert ENVIRONMENT_KEY not in "".join(process.environ().values())
    assert "--api-key ***" in " ".join(processes[0].cmdline())


@pytest.mark.parametrize(("origin", "told"), [(ORIGIN, ORIGIN), ("https://evil.example", None)])
def test_a_browser_lets_only_pages_of_listed_origins_call(service: Service, origin: str, told: str | None) -> None:
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    permission = service.http.options("/v1/completions", headers=asked)
    body = {"prompt": "the end", "max_tokens": 40, "stream": True}
    headers = {"origin": origin, "authorization": f"Bearer {FILE_KEY}"}
    stream = service.http.post("/v1/completions", json=body, headers=headers)
    assert stream.text.endswith("data: [DONE]\n\n")
    refused = service.http.get("/v1/models", headers={"origin": origin})
    assert refused.status_code == 401
    assert refused.headers.get("access-control-expose-headers") == (told and "x-request-id")
    for answer in (permission, stream, refused):
        assert answer.headers.get("access-control-allow-origin") == told
    assert permission.is_success == (told is not None)


def cached_tokens(service: Service, key: str, **fields: object) -> int:
    usage = service.good_answer(key, prompt=[7] * 50, **fields)["usage"]
    assert isinstance(usage, dict)
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_prefixes_are_shared_within_a_key_and_a_salt_and_not_beyond(service: Service) -> None:
    assert cached_tokens(service, FILE_KEY) == 0
    assert cached_tokens(service, FILE_KEY) == 48
    assert cached_tokens(service, FLAG_KEY) == 0
    assert cached_tokens(service, FLAG_KEY) == 48
    assert cached_tokens(service, FLAG_KEY, cache_salt="a") == 0
    assert cached_tokens(service, FLAG_KEY, cache_salt="a") == 48
    assert cached_tokens(service, FILE_KEY, cache_salt="a") == 0
    assert cached_tokens(service, FILE_KEY, cache_salt=digest(FLAG_KEY)) == 0


def test_sources_of_keys_that_hold_none_are_refused(tmp_path: Path) -> None:
    for text in ("", "# only a comment\n\n"):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(ConfigError, match="holds no key"):
            collect_digests((), str(tmp_path / "keys"), {})
    with pytest.raises(ConfigError, match="No such file"):
        collect_digests((), str(tmp_path / "missing"), {})
    with pytest.raises(ConfigError, match="--api-key: is empty"):
        flags.parse(["--model", "m", "--api-key", ""])
    assert collect_digests((), None, {"ENGINE_API_KEY": ""}) == ()


def test_options_hold_digests_only() -> None:
    options = flags.parse(["--model", "m", "--api-key", "sk-first", "--api_key=sk-second"])
    assert options.api_key == (digest("sk-first"), digest("sk-second"))
    assert "sk-" not in repr(options)
