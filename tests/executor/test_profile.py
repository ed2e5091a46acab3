"""ENGINE_PROFILE: a trace of the asked steps, from a real executor; and what is not understood is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from executor.phases import Phases
from executor.profile import Profile, read_profile
from ipc.clock import now_s
from ipc.errors import ConfigError

CPU = torch.device("cpu")


def test_only_the_asked_steps_are_traced(tmp_path: Path) -> None:
    profile = Profile(2, 3, tmp_path / "trace.json", CPU)
    for step in range(1, 8):
        profile.before(step)
        torch.ones(4).cumsum(0)
    calls = [event for event in trace_of(tmp_path) if event.get("name") == "aten::cumsum"]
    assert len(calls) == 3


def test_a_trace_that_the_end_cut_short_is_written(tmp_path: Path) -> None:
    profile = Profile(1, 100, tmp_path / "trace.json", CPU)
    profile.before(1)
    torch.ones(4).cumsum(0)
    profile.finish()
    profile.finish()
    assert any(event.get("name") == "aten::cumsum" for event in trace_of(tmp_path))


def trace_of(folder: Path) -> list[dict[str, object]]:
    events: list[dict[str, object]] = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return events


@pytest.mark.parametrize("text", ["5", "1:2", "0:5:x", "5:0:x", "a:b:c", "1:2:"])
def test_what_is_not_understood_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_PROFILE", text)
    with pytest.raises(ConfigError, match="is not FIRST:COUNT:FILE"):
        read_profile(CPU)


def test_without_the_variable_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_PROFILE", raising=False)
    assert read_profile(CPU) is None


def test_phases_add_up_to_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases(now_s() - 2.5)
    phases.end("import")
    phases.end("KV cache")
    phases.report("demo on cpu")
    header, *rows, last = capsys.readouterr().err.splitlines()
    assert header.split() == ["executor:", "start-up", "seconds", "total"]
    assert [row.split()[1:] for row in rows] == [["import", "2.5", "2.5"], ["KV", "cache", "0.0", "2.5"]]
    assert last == "executor: demo on cpu; ready in 2.5 s"
