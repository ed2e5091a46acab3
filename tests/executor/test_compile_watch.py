"""The count of compilations while serving: each hook adds to it, and taking empties it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from executor.compile_watch import CompileWatch


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for what the watch hooks into: dynamo's callbacks, Triton's listener, CUDA graph capture."""
    starts: list[Any] = []
    handler = SimpleNamespace(register_start_callback=starts.append)
    heard: list[dict[str, Any]] = []
    knobs = SimpleNamespace(compilation=SimpleNamespace(listener=lambda **compiled: heard.append(compiled)))
    captured: list[object] = []
    graph = type("Graph", (), {"capture_begin": lambda self, *args: captured.append(args)})
    monkeypatch.setitem(sys.modules, "torch._dynamo.callback", SimpleNamespace(callback_handler=handler))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=knobs))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    return SimpleNamespace(starts=starts, knobs=knobs.compilation, heard=heard, graph=graph, captured=captured)


def test_each_kind_of_compilation_counts_once(hooks: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    watch = CompileWatch()
    watch.start()
    assert watch.take() == 0
    hooks.knobs.listener(src=SimpleNamespace(name="decode_kernel"), cache_hit=True)
    hooks.starts[0](None)
    hooks.graph().capture_begin("pool")
    assert watch.take() == 3
    assert watch.take() == 0
    assert "Triton kernel decode_kernel was compiled while serving" in capsys.readouterr().err


def test_whoever_listened_before_still_does(hooks: SimpleNamespace) -> None:
    CompileWatch().start()
    hooks.knobs.listener(src=None)
    hooks.graph().capture_begin("pool")
    assert hooks.heard == [{"src": None}]
    assert hooks.captured == [("pool",)]


def test_the_real_dynamo_reports_to_it() -> None:
    import torch._dynamo.callback

    watch = CompileWatch()
    watch.start()
    double = torch.compile(lambda x: x * 2, backend="eager")
    double(torch.ones(3))
    assert watch.take() == 1
    double(torch.ones(3))
    assert watch.take() == 0
