"""A scheduler played by a benchmark: it takes whatever frontends send, and sends tokens when it is told to.

Used by bench_frontend.py, which plays it in the process that also plays the HTTP clients: so both share one clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import zmq

from frontend.model_files import read_card
from ipc.schema import (
    PROTOCOL_VERSION,
    Admit,
    FinishReason,
    GetStats,
    Heartbeat,
    Hello,
    Message,
    Stats,
    Tokens,
    Welcome,
    decode_frontend,
    encode,
)
from ipc.sockets import EndpointDirectory, bind_router

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
# `engine-frontend`, noting the time after each write of events; the last argument is the file for them.
ENGINE_FRONTEND = """
import sys, time
from array import array
from frontend.http_protocol import LimitedHttp
from frontend.process import main

file, stamps, write = sys.argv.pop(), array("q"), LimitedHttp.write_part

def write_part(self, data):
    write(self, data)
    stamps.append(time.monotonic_ns())

LimitedHttp.write_part = write_part
code = main()
open(file, "wb").write(stamps.tobytes())
raise SystemExit(code)
"""


class PlayedScheduler:
    """Answers frontends as a scheduler would; `tick` sends one token to every open sequence."""

    def __init__(self, endpoint: str) -> None:
        card = read_card(DEMO, name="demo", max_model_len=None, max_logprobs=20)
        self._welcome = Welcome(PROTOCOL_VERSION, True, card, 0, 1 << 20, 16)
        empty = {"int": 0, "bool": False, "bytes": b"", "dict[str, int]": {}, "list[PeerStats]": []}
        self._stats = Stats(**{name: empty[kind] for name, kind in Stats.__annotations__.items()})
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = bind_router(self._context, endpoint)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._drain)
        self.open: dict[bytes, list[int]] = {}  # by frontend
        self.admitted_ns: list[int] = []
        self.written_ns = np.empty(0, np.int64)  # each write of events by a frontend, once they have ended

    def _send(self, identity: bytes, message: Message) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it has left meanwhile
            self._socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)
        self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        while True:
            try:
                identity, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = decode_frontend(payload)
            if isinstance(message, Admit):
                self.admitted_ns.append(time.monotonic_ns())
                self.open[identity].append(message.request_id)
            elif isinstance(message, Hello):
                self.open[identity] = []
                self._send(identity, self._welcome)
            elif isinstance(message, Heartbeat | GetStats):
                self._send(identity, self._stats)

    def tick(self, finish: FinishReason = FinishReason.RUNNING) -> int:
        """One frame to each frontend; returns when it was sent."""
        sent_ns = time.monotonic_ns()
        for identity, ids in self.open.items():
            if ids:
                rows = len(ids)
                token, state = np.full(rows, 300, np.int32), np.full(rows, finish, np.uint8)
                self._send(identity, Tokens(np.array(ids, np.int64).tobytes(), token.tobytes(), state.tobytes()))
        if finish is not FinishReason.RUNNING:
            self.open = {identity: [] for identity in self.open}
        return sent_ns

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close(0)
        self._context.term()


@contextlib.asynccontextmanager
async def played(frontends: int) -> AsyncIterator[tuple[PlayedScheduler, list[int], list[psutil.Process]]]:
    """(scheduler, port of each frontend, processes of the frontends)."""
    directory = EndpointDirectory()
    scheduler = PlayedScheduler(directory.frontend)
    command = [sys.executable, "-P", "-c", ENGINE_FRONTEND, "--connect", directory.frontend, "--port", "0"]
    files = [Path(f"{directory.frontend.removeprefix('ipc://')}-{number}") for number in range(frontends)]
    children = [subprocess.Popen([*command, str(file)], stdout=subprocess.PIPE, text=True) for file in files]
    try:
        ports = []
        for child in children:
            assert child.stdout is not None
            line = await asyncio.to_thread(child.stdout.readline)
            ports.append(int(re.search(r"http://[^:]+:(\d+)", line).group(1)))  # type: ignore[union-attr]
        for port in ports:
            await until_ready(port)
        yield scheduler, ports, [psutil.Process(child.pid) for child in children]
    finally:
        for child in children:
            child.terminate()
        for child in children:
            await asyncio.to_thread(child.wait, 60)
        scheduler.written_ns = np.sort(np.concatenate([np.fromfile(file, np.int64) for file in files]))
        for file in files:
            file.unlink()
        scheduler.close()
        directory.close()


async def until_ready(port: int) -> None:
    for _ in range(600):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        if answer.startswith(b"HTTP/1.1 200"):
            return
        await asyncio.sleep(0.1)
    raise SystemExit("the frontend did not get ready")
