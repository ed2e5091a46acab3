"""A short run of scripts/chaos.py: processes are killed and stopped under load, and every stream is as it should be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 400  # a run takes about 40 s on two idle cores


@pytest.mark.slow
def test_streams_survive_whatever_is_killed() -> None:
    command = [sys.executable, "scripts/chaos.py", "--seconds", "12", "--seed", "116"]
    small = ["--streams", "24", "--cases", "8", "--max-tokens", "48"]
    done = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "seed 116: 0 wrong" in done.stdout
