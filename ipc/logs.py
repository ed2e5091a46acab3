"""How a process logs: one line an event to stderr, as text with the process in front, or as a JSON object.

Called once at the start of a process. Messages must never hold prompts or keys.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Final

import msgspec

_CHATTY: Final = ("uvicorn", "httpx", "asyncio")  # they tell at info what only their authors want to know
_MAX_CHARS: Final = 4000
_TIME: Final = "%m-%d %H:%M:%S"


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


def configure_logs(role: str, config: LogConfig) -> None:
    """Send this process's log to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json(role) if config.json else _Text(role))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    for library in _CHATTY:
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.root.level))
