"""The set-up scripts without a network: what they install in which order, what a second run does, what they serve."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_RECORDER = '#!/bin/sh\necho "$(basename "$0") $*" >>"$RECORD"\n'


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts in a folder of their own, with a virtual environment that only writes down how it is called."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    (root / ".venv/bin").mkdir(parents=True)
    for name in ("python", "engine-launch", "ruff", "mypy"):
        program = root / ".venv/bin" / name
        program.write_text(_RECORDER)
        program.chmod(0o755)
    return root


def calls(clone: Path, script: str, *flags: str) -> list[str]:
    """Run one script from another folder; what it started, one line each."""
    record = clone / "record"
    record.unlink(missing_ok=True)
    command = [str(clone / "scripts" / script), *flags]
    subprocess.run(command, cwd="/", env={**os.environ, "RECORD": str(record)}, check=True, timeout=60)
    return record.read_text().splitlines()


def test_the_first_start_installs_torch_first_and_the_second_nothing(clone: Path) -> None:
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    *installs, served = [line for line in calls(clone, "serve.sh") if "--version" not in line]
    assert [line.split("-c constraints.txt ")[1] for line in installs] == [pin, "-e .[test]"]
    assert calls(clone, "serve.sh") == [served]
    (clone / "constraints.txt").open("a").write("# changed\n")
    assert len(calls(clone, "serve.sh")) > 1, "a changed lock was not installed"


@pytest.mark.parametrize(
    ("flags", "served"),
    [
        ([], "--model {demo}"),
        (["--port", "9000"], "--model {demo} --port 9000"),
        (["--model", "acme/one", "--port=9000"], "--model acme/one --port=9000"),
        (["--model=acme/one"], "--model=acme/one"),
        (["acme/one", "--depth", "1"], "acme/one --depth 1"),
    ],
)
def test_the_demo_model_is_served_unless_another_is_named(clone: Path, flags: list[str], served: str) -> None:
    assert calls(clone, "serve.sh", *flags)[-1] == "engine-launch " + served.format(demo=clone / "models/demo")


def test_the_test_script_checks_style_and_types_and_passes_flags_on(clone: Path) -> None:
    style, lint, *beside = calls(clone, "test.sh", "-k", "ring")[-4:]
    types, tests = sorted(beside)
    assert (style, lint, types) == ("ruff format --check .", "ruff check .", "mypy ")
    assert tests.startswith("python -m pytest ")
    assert tests.endswith(" -k ring")


def test_every_dependency_is_in_the_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    locked = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]

    def normal(names: list[str]) -> set[str]:
        return {name.partition(">")[0].lower().replace("_", "-") for name in names}

    assert normal(wanted) <= normal(locked)
