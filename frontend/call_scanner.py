"""Reads the JSON object of one tool call as it is written, and gives its arguments out as they come.

Used by the parsers in tools.py. It follows strings and brackets only: arguments pass through as the model wrote them,
valid or not, because the caller of the API is who can tell the model.
"""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import Final

_BLANK: Final = " \n\r\t"


class _At(Enum):
    START = auto()  # before {
    KEY = auto()  # before a key, or }
    COLON = auto()
    VALUE = auto()  # before a value
    INSIDE = auto()  # in a value
    NEXT = auto()  # after a value: , or }


class CallScanner:
    """One object with a "name" and arguments, which stand under one of `argument_keys`.

    With `needs_arguments` an object without them is no call; else it is a call with `{}`.
    """

    def __init__(self, *argument_keys: str, needs_arguments: bool = False) -> None:
        self.name: str | None = None
        self.announced = False  # the name is known and the arguments have begun: from here on it is a call
        self.done = False
        self.failed = False
        self._argument_keys = argument_keys
        self._needs_arguments = needs_arguments
        self._at = _At.START
        self._read: list[str] = []  # everything, until it is announced
        self._key: str | None = None  # None while the key itself is read
        self._value: list[str] = []  # of the key or value being read
        self._depth = 0
        self._in_string = self._escaped = False
        self._early = ""  # arguments that came before the name
        self._arguments: list[str] = []  # not taken yet
        self._streams = False  # the value being read goes out as it comes
        self._has_arguments = self._just_announced = False

    @property
    def unannounced(self) -> str:
        """All that was used, if it never became a call."""
        return "" if self.announced else "".join(self._read)

    def take_announcement(self) -> bool:
        """True once: the call has begun and has a name."""
        just, self._just_announced = self._just_announced, False
        return just

    def take_arguments(self) -> str:
        """The arguments' text since the last call."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def push(self, text: str) -> int:
        """Read on; returns how many characters were used. It stops behind the object, or before what makes it fail."""
        for i, char in enumerate(text):
            self._take(char)
            if self.failed:
                return i
            if not self.announced:
                self._read.append(char)
            if self.done:
                return i + 1
        return len(text)

    def _take(self, char: str) -> None:
        at = self._at
        if at is _At.INSIDE:
            self._take_value(char)
        elif char in _BLANK:
            return
        elif at is _At.START and char == "{":
            self._at = _At.KEY
        elif at is _At.KEY and char == '"':
            self._key = None
            self._begin(char)
        elif at is _At.COLON and char == ":":
            self._at = _At.VALUE
        elif at is _At.VALUE and char not in ",}]":
            self._begin(char)
        elif at is _At.NEXT and char == ",":
            self._at = _At.KEY
        elif at in (_At.NEXT, _At.KEY) and char == "}":
            self._finish()
        else:
            self.failed = True

    def _begin(self, char: str) -> None:
        """The first character of a key or a value."""
        self._at = _At.INSIDE
        self._value = []
        self._depth = 0
        self._streams = False
        if self._key in self._argument_keys and not self._has_arguments:
            self._has_arguments = True
            # Arguments as a JSON text in a string are decoded at its end; those before the name wait for it.
            self._streams = char != '"' and self.name is not None
            if self._streams:
                self._announce()
        self._take_value(char)

    def _take_value(self, char: str) -> None:
        if self._in_string:
            self._put(char)
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                if not self._depth:
                    self._end_value()
        elif char == '"':
            self._put(char)
            self._in_string = True
        elif char in "{[":
            self._put(char)
            self._depth += 1
        elif char in "}]" and self._depth:
            self._put(char)
            self._depth -= 1
            if not self._depth:
                self._end_value()
        elif not self._depth and (char in _BLANK or char in ",}"):  # behind a number or a word
            self._end_value()
            self._take(char)
        else:
            self._put(char)

    def _put(self, char: str) -> None:
        (self._arguments if self._streams else self._value).append(char)

    def _end_value(self) -> None:
        text = "".join(self._value)
        if self._key is None:
            self._key, self._at = str(_decoded(text)), _At.COLON
            return
        self._at = _At.NEXT
        if self._key == "name" and self.name is None:
            name = _decoded(text)
            if not isinstance(name, str) or not name:
                self.failed = True
                return
            self.name = name
        elif self._key in self._argument_keys and not self._streams:
            decoded = _decoded(text) if text.startswith('"') else None
            self._early = self._early or (decoded if isinstance(decoded, str) else text)
        if self._early and self.name is not None and not self.announced:
            self._announce()
            self._arguments.append(self._early)

    def _announce(self) -> None:
        self.announced = self._just_announced = True
        self._read.clear()

    def _finish(self) -> None:
        if self.name is None or (self._needs_arguments and not self._has_arguments):
            self.failed = True
            return
        if not self.announced:
            self._announce()
            self._arguments.append("{}")
        self.done = True


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
