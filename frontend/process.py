"""A serving frontend: one client of the engine and one HTTP server, on one uvloop.

Started by the launcher (`python -m frontend --start-fd N`) on a socket that all frontends share, or by hand
(`engine-frontend --connect ENDPOINT`) on its own. Never imports torch. Answers 503 until the scheduler does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from email.utils import formatdate
from functools import partial
from typing import Any, Final

import uvicorn
import uvloop

import frontend
from frontend.api_keys import ApiKeyGuard
from frontend.client import AsyncClient
from frontend.digests import collect_digests
from frontend.http_protocol import LimitedHttp
from frontend.listener import bind_http, url_of
from frontend.server import make_app
from frontend.service import Service
from frontend.tokenizer import Tokenizer
from ipc.auth import has_client_keys
from ipc.clock import now_ns
from ipc.config import EngineConfig, FrontendChannels, HttpConfig
from ipc.doorbell import Doorbell
from ipc.errors import ConfigError, TandemError, UnavailableError
from ipc.fault import read_fault
from ipc.lifetime import check_one_place, fail, raise_file_limit
from ipc.logs import LogConfig, configure_logs
from ipc.trace import Act, Trace, Track, open_trace

_DATE_PERIOD_S: Final = 1.0
_CONNECT_TIMEOUT_S: Final = 3600.0  # of one attempt; they repeat, since a model may load for long
_RETRY_S: Final = (1.0, 2.0, 4.0, 8.0, 15.0)  # pauses after refused attempts
_CLOSE_TIMEOUT_S: Final = 0.5  # under the launcher, which has drained the engine before; what is still open is to end
_PATIENCE_S: Final = 10.0  # of one that was restarted: others serve meanwhile, and it will soon
_KEEP_ALIVE_S: Final = 75
_BACKLOG: Final = 2048
_log: Final = logging.getLogger(__name__)


class _HttpServer(uvicorn.Server):
    """uvicorn that sleeps when idle: its own loop wakes ten times a second and handles signals by itself."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Finish open responses and end; a second call drops them."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._stop.set()

    async def wait_for(self, future: asyncio.Future[None], limit_s: float) -> None:
        """Until `future` is done, the server is told to stop, or the time is up."""
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({future, stopped}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        while not self.should_exit:
            self.server_state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _DATE_PERIOD_S)


@contextlib.asynccontextmanager
async def _attached(service: Service, ready_bell: Doorbell | None) -> AsyncIterator[asyncio.Future[None]]:
    """Connect the client in the background for as long as it takes, and close it at the end. Yields the task."""

    async def attach() -> None:
        for pause_s in itertools.chain(_RETRY_S, itertools.repeat(_RETRY_S[-1])):
            try:
                await service.client.connect(_CONNECT_TIMEOUT_S, wait_ready=True)
                break
            except TandemError as error:
                _log.warning("not connected yet: %s", error)
                service.fault = error.message
                await asyncio.sleep(pause_s)
        service.attach()
        if ready_bell is not None:
            ready_bell.ring()

    task = asyncio.ensure_future(attach())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await service.client.close()


async def serve(
    client: AsyncClient,
    listener: socket.socket,
    config: HttpConfig,
    *,
    close_timeout_s: float,
    patience_s: float = 0.0,
    ready_bell: Doorbell | None = None,
    debug_endpoints: bool = False,
    trace: Trace | None = None,
) -> None:
    """Serve HTTP on `listener` for the scheduler of `client` until SIGTERM (or SIGINT, if not ignored).

    Then no new connection is taken, and open responses have `close_timeout_s` seconds before they end with an error.
    For `patience_s` connections are left to others who listen, or to wait, unless requests can be served before.
    """
    service = Service(client, config)
    app: Any = make_app(service, debug_endpoints=debug_endpoints, trace=trace)
    if config.api_key_digests:
        app = ApiKeyGuard(app, config.api_key_digests, isolate=config.isolate_api_keys, cors=app.cors_config)
    server = _HttpServer(
        uvicorn.Config(
            app,
            http=LimitedHttp,
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
    )
    loop = asyncio.get_running_loop()
    closing: list[asyncio.Task[None]] = []

    async def close_open_responses() -> None:
        await asyncio.sleep(close_timeout_s)
        await client.close(UnavailableError("this frontend is shutting down"))

    def stop() -> None:
        server.stop()
        closing.append(loop.create_task(close_open_responses()))

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop)
    async with _attached(service, ready_bell) as attached:
        await server.wait_for(attached, patience_s)
        gc.collect()
        gc.freeze()
        await server.serve(sockets=[listener])
        for task in closing:
            task.cancel()


def _client(endpoint: str, config: HttpConfig, **options: Any) -> AsyncClient:
    return AsyncClient(
        endpoint,
        name="http",
        request_timeout_s=config.request_timeout_s,
        queue_timeout_s=config.queue_timeout_s,
        **options,
    )


def _run(service: Coroutine[None, None, None], log: LogConfig) -> int:
    configure_logs("frontend", log)
    uvloop.run(service)
    return 0


def run(config: EngineConfig, channels: FrontendChannels) -> int:
    """The process that the launcher starts; returns its exit code."""
    fault, trace = read_fault("frontend", channels.life), open_trace(channels.trace)
    on_frame = fault.strike if fault.kind else None
    keys = config.auth_keys if has_client_keys(config.auth_keys) else None
    client = _client(channels.directory, config.http, on_frame=on_frame, auth_keys=keys)
    if trace is not None:
        client.watch_fan_out(partial(_record_fan_out, trace, Track.FRONTEND + channels.index))
    return _run(
        serve(
            client,
            socket.socket(fileno=channels.listen_fd),
            config.http,
            close_timeout_s=_CLOSE_TIMEOUT_S,
            patience_s=_PATIENCE_S if channels.life else 0.0,  # while the engine starts, everybody is told so
            ready_bell=Doorbell(channels.ready_bell),
            debug_endpoints=config.debug_endpoints,
            trace=trace,
        ),
        config.log,
    )


def _record_fan_out(trace: Trace, track: int, start_ns: int, rows: int) -> None:
    trace.span(track, Act.FAN_OUT, start_ns, now_ns(), 0, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `engine-frontend`: one more HTTP server for a scheduler that runs already."""
    from frontend import flag_groups, flags

    argv = sys.argv[1:] if argv is None else argv
    flags.hide_api_keys("engine-frontend", argv)
    parser = flag_groups.FlagParser(prog="engine-frontend", description="Serve HTTP for a running scheduler.")
    parser.add_argument("--connect", required=True, metavar="ENDPOINT", help="the scheduler's, such as ipc:///tmp/…")
    parser.add_argument("--auth-keys", metavar="DIR", help="key folder of this client, for a tcp endpoint")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the engine's model folder, if this host has it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    flag_groups.http_flags(parser)
    flag_groups.log_flags(parser)
    try:
        options = parser.parse_args(argv)
        digests = collect_digests(options.api_key, options.api_key_file, os.environ)
        check_one_place(frontend)
        raise_file_limit()
        tokenizer = None if options.tokenizer is None else Tokenizer.load(options.tokenizer)
        config = flags.http_config(options, digests)
        log = LogConfig(level=options.log_level, json=options.log_format == "json")
        client = _client(options.connect, config, tokenizer=tokenizer, auth_keys=options.auth_keys)
        listener = bind_http(options.host, options.port, None)
    except ConfigError as error:
        return fail("engine-frontend", error)
    print(f"Frontend on {url_of(listener)}", flush=True)
    return _run(serve(client, listener, config, close_timeout_s=config.shutdown_timeout_s), log)
