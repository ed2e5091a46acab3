"""What processes write to stderr: logs and news, one line an event, as text or as a JSON object.

Configured once at the start of a process. News is what its operator is to be told at any log level: that it serves, why
it ends. Messages must never hold prompts or keys.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import select
import sys
from typing import Final

import msgspec

_CHATTY: Final = ("uvicorn", "httpx", "asyncio")  # they tell at info what only their authors want to know
_MAX_CHARS: Final = 4000
_TIME: Final = "%m-%d %H:%M:%S"
_PATIENCE_S: Final = 0.1  # for a reader of stderr that lags


def write_stderr(text: bytes) -> None:
    """Write what the reader takes; the rest is lost, and so is all if a terminal is gone or a disk full.

    An engine must neither wait for whoever reads its log nor end with them.
    """
    with contextlib.suppress(OSError, ValueError):
        try:
            fd = sys.stderr.fileno()
        except io.UnsupportedOperation:  # in a notebook, or under a test
            sys.stderr.write(text.decode(errors="replace"))
            return
        while text and select.select([], [fd], [], _PATIENCE_S)[1]:
            text = text[os.write(fd, text[: select.PIPE_BUF]) :]


class LogConfig(msgspec.Struct, frozen=True, kw_only=True):
    level: str = "info"
    json: bool = False


class _Text(logging.Formatter):
    """`(scheduler pid=12) INFO 11-23 08:25:01 [loop.py:120] message`

    Names, paths and errors in a message may come from a client: it can forge no line, and not fill the log.
    """

    def __init__(self, role: str) -> None:
        super().__init__(
            f"({role} pid={os.getpid()}) %(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s", _TIME
        )

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = escape(record.message[:_MAX_CHARS])
        return super().formatMessage(record)


def escape(text: str) -> str:
    """`text` without line breaks, terminal sequences and other characters that do not print."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class _Json(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": record.created,
            "level": record.levelname.lower(),
            "process": self._role,
            "pid": record.process,
            "where": f"{record.filename}:{record.lineno}",
            "message": record.getMessage()[:_MAX_CHARS],
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


_news_log: Final = logging.getLogger("news")


class _NewsHandler(logging.Handler):
    """`role: text`, or the JSON object of a log line; the role is the logger's last name."""

    as_json = False

    def emit(self, record: logging.LogRecord) -> None:
        role, text = record.name.rpartition(".")[2], record.getMessage()
        if self.as_json:
            line = _Json(role).format(record)
        else:
            line = f"{role}: {'error: ' if record.levelno >= logging.ERROR else ''}{text}"
        write_stderr(f"{line}\n".encode(errors="replace"))


_news_handler: Final = _NewsHandler()
_news_log.addHandler(_news_handler)
_news_log.propagate = False
_news_log.setLevel(logging.INFO)


def news(role: str, text: str, *, error: bool = False) -> None:
    """Tell the operator, whatever the log level."""
    _news_log.getChild(role).log(logging.ERROR if error else logging.INFO, "%s", text, stacklevel=2)


def configure_news(config: LogConfig) -> None:
    """As text or as JSON; text until it is called."""
    _news_handler.as_json = config.json


def configure_logs(role: str, config: LogConfig) -> None:
    """Send this process's log to stderr, and its news in the same form."""
    configure_news(config)
    handler = logging.StreamHandler()
    handler.setFormatter(_Json(role) if config.json else _Text(role))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    for library in _CHATTY:
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.root.level))
