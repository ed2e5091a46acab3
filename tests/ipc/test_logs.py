"""Lines of several processes share one stderr."""

from __future__ import annotations

import io
import os
import sys

import pytest

from ipc.logs import news


def test_news_is_written_at_once_so_that_no_other_process_breaks_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe2(os.O_DIRECT)  # a read returns what one write brought
    with io.TextIOWrapper(os.fdopen(writer, "wb", 0), write_through=True) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        news("executor 1", "there", error=True)
        assert os.read(reader, 100) == b"executor 1: error: there\n"
    os.close(reader)
