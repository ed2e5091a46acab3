"""What engines measured: kept for the next start, and settled between those that start at the same time."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from executor.measured import cache_path, read_choices, settle_choices


def test_who_measures_first_decides_for_all(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "kind.json"
    assert settle_choices(path, {}, {"a": 1, "b": 2}) == {"a": 1, "b": 2}
    assert settle_choices(path, {}, {"a": 9, "c": 3}) == {"a": 1, "c": 3}
    assert read_choices(path) == {"a": 1, "b": 2, "c": 3}


def test_what_was_seen_and_refused_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "kind.json"
    settle_choices(path, {}, {"a": "of another version", "b": 2})
    assert settle_choices(path, read_choices(path), {"a": 1}) == {"a": 1}
    assert read_choices(path) == {"a": 1, "b": 2}


def test_engines_that_start_together_lose_nothing_and_choose_alike(tmp_path: Path) -> None:
    path, together = tmp_path / "kind.json", Barrier(8)

    def start(engine: int) -> object:
        seen = read_choices(path)
        together.wait(60)
        return settle_choices(path, seen, {"shared": engine, f"own {engine}": engine})["shared"]

    with ThreadPoolExecutor(8) as pool:
        shared = set(pool.map(start, range(8)))
    assert len(shared) == 1
    assert read_choices(path) == {"shared": shared.pop()} | {f"own {engine}": engine for engine in range(8)}


def test_a_broken_file_is_replaced_and_a_folder_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "kind.json"
    path.write_text("{")
    assert settle_choices(path, read_choices(path), {"a": 1}) == {"a": 1}
    assert read_choices(path) == {"a": 1}
    assert settle_choices(path / "below a file" / "kind.json", {}, {"a": 1}) == {"a": 1}


def test_other_kernels_have_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3"))
    kernels = SimpleNamespace(__file__=str(tmp_path / "kernels.py"))
    names = []
    for source in ("one", "other", "one"):
        (tmp_path / "kernels.py").write_text(source)
        names.append(cache_path("kind", torch.device("cpu"), kernels).name)  # type: ignore[arg-type]
    assert names[0] == names[2] != names[1]
