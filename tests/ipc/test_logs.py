"""Lines of several processes share one stderr."""

from __future__ import annotations

import io
import os
import sys

import pytest

from ipc.logs import news, write_stderr


def test_news_is_written_at_once_so_that_no_other_process_breaks_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe2(os.O_DIRECT)  # a read returns what one write brought
    with io.TextIOWrapper(os.fdopen(writer, "wb", 0), write_through=True) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        news("executor 1", "there", error=True)
        assert os.read(reader, 100) == b"executor 1: error: there\n"
    os.close(reader)


def test_a_reader_that_lags_or_is_gone_costs_its_text_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with io.TextIOWrapper(os.fdopen(writer, "wb", 0), write_through=True) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        text = bytes(range(256)) * 4096  # a pipe holds a part of it
        write_stderr(text)
        news("executor", "is not told")
        assert text.startswith(os.read(reader, len(text)))
        os.close(reader)
        news("executor", "is not told either")
    with open("/dev/full", "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        news("executor", "does not fit")
