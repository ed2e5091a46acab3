"""Which folder may import which, that no serving process carries torch, that nothing can unpickle, and which clocks."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"ipc", "scheduler", "executor", "frontend"}
HEAVY = {"torch", "transformers", "triton"}
MAY_IMPORT = {
    "ipc": set(),
    "scheduler": {"ipc"},
    "executor": {"ipc"} | HEAVY,
    "frontend": {"ipc", "transformers"},
}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "recv_pyobj", "send_pyobj", "SharedMemory", "os.system", "yaml.load"}
FORBIDDEN_FLAGS = {"allow_pickle", "shell"}
WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "time.ctime"}


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no source in {folder}"
    return found


def imported(path: Path) -> Iterator[str]:
    """Top-level names of every import in a file, lazy ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("folder", sorted(OURS))
def test_folders_import_only_what_they_may(folder: str) -> None:
    for path in sources(folder):
        strangers = set(imported(path)) & (OURS | HEAVY) - MAY_IMPORT[folder] - {folder}
        assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"


def calls(tree: ast.AST) -> Iterator[str]:
    """What is called in a file: `f`, `method`, and `module.f`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # A method named eval is torch's switch to inference, so only the dotted name of it counts.
            if node.func.attr not in ("eval", "exec", "load"):
                yield node.func.attr
            if isinstance(node.func.value, ast.Name):
                yield f"{node.func.value.id}.{node.func.attr}"


@pytest.mark.parametrize("folder", sorted(OURS))
def test_nothing_that_runs_foreign_bytes_is_used(folder: str) -> None:
    for path in sources(folder):
        where = path.relative_to(ROOT)
        assert not set(imported(path)) & FORBIDDEN_MODULES, where
        tree = ast.parse(path.read_text())
        assert not set(calls(tree)) & FORBIDDEN_CALLS, where
        assert not set(flags(tree)) & FORBIDDEN_FLAGS, where


def flags(tree: ast.AST) -> Iterator[str]:
    """Names of keyword arguments that are not literally False."""
    for node in ast.walk(tree):
        is_off = isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is False
        if isinstance(node, ast.keyword) and node.arg and not is_off:
            yield node.arg


@pytest.mark.parametrize("code", ["eval('1')", "exec('')", "torch.load(f)", "socket.recv_pyobj()", "x.SharedMemory()"])
def test_the_search_for_foreign_bytes_finds_them(code: str) -> None:
    assert set(calls(ast.parse(code))) & FORBIDDEN_CALLS


@pytest.mark.parametrize("code", ["numpy.load(f, allow_pickle=True)", "subprocess.run(x, shell=shell)"])
def test_the_search_for_dangerous_flags_finds_them(code: str) -> None:
    assert set(flags(ast.parse(code))) & FORBIDDEN_FLAGS
    assert not set(flags(ast.parse("numpy.load(f, allow_pickle=False)"))) & FORBIDDEN_FLAGS


def wall_clocks(tree: ast.AST) -> list[str]:
    """Calls that read the wall clock, other than `int(time.time())`: a date for people, no part of a time limit."""
    dates = [
        node.args[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "int" and node.args
    ]
    return [
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node not in dates and (name := ast.unparse(node.func)) in WALL_CLOCKS
    ]


@pytest.mark.parametrize("folder", sorted(OURS))
def test_time_is_measured_by_the_monotonic_clock(folder: str) -> None:
    for path in sources(folder):
        assert not wall_clocks(ast.parse(path.read_text())), path.relative_to(ROOT)
        assert "from time import time" not in path.read_text(), path.relative_to(ROOT)


def test_the_search_for_wall_clocks_finds_them() -> None:
    assert wall_clocks(ast.parse("deadline = time.time() + 5")) == ["time.time"]
    assert wall_clocks(ast.parse("created = int(time.time())")) == []


def modules_after(code: str) -> set[str]:
    """Top-level modules a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import scheduler.loop, scheduler.__main__", HEAVY | {"litestar"}),
        ("import executor.fake", HEAVY | {"litestar"}),
        ("import frontend.process, frontend.server", {"torch", "triton", "scheduler", "executor"}),
        ("import frontend.launch", {"torch", "triton", "litestar", "scheduler", "executor"}),
    ],
)
def test_processes_stay_light(code: str, absent: set[str]) -> None:
    assert not modules_after(code) & absent


def test_a_frontend_with_its_tokenizer_has_no_torch(tmp_path: Path) -> None:
    from tests.frontend.tokenizers_for_tests import save_byte_level

    save_byte_level(tmp_path)
    code = f"import frontend.process\nfrom frontend import Tokenizer\nTokenizer.load({str(tmp_path)!r}).encode('a')"
    assert "torch" not in modules_after(code)
