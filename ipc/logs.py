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
_TIME: Final = "%m-%d %H:%M:%S"


class LogConfig(msgspec.Struct, frozen=True, kw_only=True):
    level: str = "info"
    json: bool = False


class _Text(logging.Formatter):
    """`(scheduler pid=12) INFO 11-23 08:25:01 [loop.py:120] message`; a line break in a message is no new event."""

    def __init__(self, role: str) -> None:
        super().__init__(
            f"({role} pid={os.getpid()}) %(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s", _TIME
        )

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


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
            "message": record.getMessage(),
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
