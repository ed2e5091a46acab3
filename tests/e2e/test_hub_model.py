"""`engine-launch --model ORG/NAME`: a hub id, here from the hub's cache, with sharded weights in their own dtype."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

from tests.e2e.engine import DEMO_MODEL, running_engine
from tests.e2e.equality import greedy
from tests.e2e.reference import reference_model

SNAPSHOT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache after a download of acme/demo, and no network."""
    repository = tmp_path / "models--acme--demo"
    folder = repository / "snapshots" / SNAPSHOT
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    reference_model().save_pretrained(folder, max_shard_size="8MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SNAPSHOT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_id_with_sharded_weights() -> None:
    case = greedy()[20]
    with running_engine("--device", "cpu", model="acme/demo") as engine:
        assert [model["id"] for model in httpx.get(f"{engine.url}/models", timeout=60).json()["data"]] == ["acme/demo"]
        body = {"prompt": case.prompt, "max_tokens": case.max_tokens, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{engine.url}/completions", json=body, timeout=60).json()
    assert tuple(answer["choices"][0]["token_ids"]) == case.output
