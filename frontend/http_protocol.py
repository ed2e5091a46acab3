"""uvicorn's HTTP/1.1 protocol with what it leaves open: limits on heads and connections, on reading and on writing.

One object a connection, made by uvicorn in a serving frontend. A client that is slow to send, or does not read what it
asked for, loses its connection, and with it its request; all others are served meanwhile. Bodies are limited by the
application, which knows their routes. Must never wait.
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any, Final

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from frontend.jobs import DIRECT
from frontend.openai import error_body
from ipc.lifetime import file_limit

MAX_URL_BYTES: Final = 16 << 10
MAX_HEAD_BYTES: Final = 64 << 10
MAX_HEADERS: Final = 128
HEAD_TIMEOUT_S: Final = 30.0  # from the connection, or a request's first byte, to the end of its headers
BODY_TIMEOUT_S: Final = 120.0  # from there to the end of its body
WRITE_TIMEOUT_S: Final = 60.0  # how long a full send buffer may stay full
RESERVED_FILES: Final = 128  # of those that the process may open: its own, and connections that are being refused

_log: Final = logging.getLogger(__name__)


class _RefusedError(Exception):
    """Leaves httptools as a parser error, which ends the connection."""


class LimitedHttp(HttpToolsProtocol):
    """A connection that cannot be held open by doing nothing, or filled without bound."""

    head_timeout_s = HEAD_TIMEOUT_S
    body_timeout_s = BODY_TIMEOUT_S
    write_timeout_s = WRITE_TIMEOUT_S
    reserved_files = RESERVED_FILES

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0  # received since the head began; what else a read brought counts too
        self._header_bytes = 0  # of the parsed headers
        self._refusal: tuple[int, str] | None = None  # why the request being parsed is not taken
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self.takes_data = False  # the send buffer has room; read for every token, so it is no property

    # -- reading

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.takes_data = True
        count, limit = len(self.connections), file_limit() - self.reserved_files
        if count > limit:
            self._refusal = 503, f"{count} connections are open, the limit is {limit}"
        self._read_within(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._read_within(None)
        self.resume_writing()
        self.takes_data = False
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self.transport.is_closing():
            return
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")
        elif self._reading is None and (self.cycle is None or self.cycle.response_complete):
            self._read_within(self.head_timeout_s)  # empty lines between requests are no request

    def _parse(self, data: bytes) -> None:
        """What offers to upgrade, to HTTP/2 or WebSocket, is read again without the offer, which a server may ignore
        (RFC 9110, 7.8): the parser takes its body for bytes of the other protocol."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                method, version = self.parser.get_method(), self.parser.get_http_version().encode()
                if method == b"CONNECT":
                    raise httptools.HttpParserError from offer
                head = [b"%b %b HTTP/%b\r\n" % (method, self.url, version)]
                head += [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
                data = b"".join((*head, b"\r\n", data[offer.args[0] :]))
                self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        self.scope["state"][DIRECT] = self
        self._read_within(self.head_timeout_s)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if self._refusal is not None:
            raise _RefusedError
        if len(self.url) > MAX_URL_BYTES:
            self._refusal = 414, f"the URL is longer than {MAX_URL_BYTES} bytes"
            raise _RefusedError

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if len(self.headers) >= MAX_HEADERS or self._header_bytes > MAX_HEAD_BYTES:
            self._refusal = 431, f"more than {MAX_HEADERS} headers, or {MAX_HEAD_BYTES} bytes of them"
            raise _RefusedError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # it will be read again
            return
        self._in_head, self._head_bytes = False, 0
        self._read_within(self.body_timeout_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_head = True
        self._read_within(None)
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for a head that it cannot parse, or that is refused above."""
        self._refuse(*(self._refusal or (400, "what was received is not HTTP/1.1")))

    def _read_within(self, seconds: float | None) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._reading = None if seconds is None else self.loop.call_later(seconds, self._read_too_slow, seconds)

    def _read_too_slow(self, seconds: float) -> None:
        if self.flow.read_paused:  # it waits for us
            self._read_within(seconds)
            return
        self._reading = None
        self._refuse(408, f"the request did not arrive within {seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error, unless an answer is under way, and close."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = msgspec.json.encode(
            error_body(message, status, code=HTTPStatus(status).phrase.lower().replace(" ", "_"))
        )
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    # -- writing

    def write_part(self, data: bytes) -> None:
        """Makes it the Sink of a stream, between the head and the end of a response. A closing connection drops it."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def pause_writing(self) -> None:
        super().pause_writing()
        self.takes_data = False
        self._writing = self.loop.call_later(self.write_timeout_s, self._write_too_slow)

    def resume_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        self.takes_data = True
        super().resume_writing()

    def _write_too_slow(self) -> None:
        _log.warning("a client has not read for %g s: its connection is closed", self.write_timeout_s)
        self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """A connection whose last answer is still unread is dropped; closing it would wait for the reader."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()
