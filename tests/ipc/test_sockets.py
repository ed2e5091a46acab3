"""The endpoint directory: private, removed on close, and removed by the next engine if its owner was killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ipc.sockets import EndpointDirectory

_OWNER = """
import signal, sys
from ipc.sockets import EndpointDirectory
print(EndpointDirectory().path, flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def own_tempdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_it_is_private_and_goes_with_its_owner(tmp_path: Path) -> None:
    directory = EndpointDirectory()
    assert stat.S_IMODE(os.stat(directory.path).st_mode) == 0o700
    assert directory.path.parent == tmp_path
    directory.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_owner_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", _OWNER]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        (left / "frontend.sock").touch()
        neighbour = EndpointDirectory()
        unrelated = tmp_path / "tandem-ipc-notes"
        unrelated.mkdir()
        (unrelated / "notes.txt").touch()
        assert left.exists(), "a living owner's directory was removed"
        owner.send_signal(signal.SIGKILL)
    mine = EndpointDirectory()
    assert not left.exists()
    assert neighbour.path.exists()
    assert (unrelated / "notes.txt").exists(), "a file of the user was removed"
    neighbour.close()
    mine.close()
