"""The engine as a tenant of its machine: what it occupies, what it leaves behind, what it does when part of it dies."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from frontend import AsyncClient
from frontend.request import Completion
from ipc.errors import UnavailableError
from tests.e2e.engine import DEMO_MODEL, Engine, running_engine, wait_until

WAIT_S = 60.0
FLAGS = ("--device", "cpu", "--dtype", "float32")
IDLE_WINDOW_S = 6.0
IDLE_CPU_SHARE = 0.5 / 60  # of one core, for each process
MIN_MARGIN = 1e-3  # nats; float32 logits of different batch shapes differ by about 1e-5
PROMPTS = tuple(f"Return the {word}" for word in ("list", "name", "file", "value", "first", "number", "string", "path"))
LONG: dict[str, Any] = {"max_tokens": 400, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all temporary files of an engine that starts now will be."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One engine for the tests in which it survives."""
    with running_engine(*FLAGS) as engine:
        yield engine


def everyone(engine: Engine) -> list[psutil.Process]:
    """The launcher and all that it started."""
    launcher = psutil.Process(engine.process.pid)
    return [launcher, *launcher.children(recursive=True)]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def listeners(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """TCP addresses on which the processes accept connections."""
    return {
        connection.laddr
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def shared_files(processes: list[psutil.Process]) -> set[str]:
    """Files under /dev/shm that the processes map or hold open and that still have a name there."""
    names: set[str] = set()
    for process in processes:
        proc = Path(f"/proc/{process.pid}")
        names |= set(re.findall(r"/dev/shm/.*", (proc / "maps").read_text()))
        names |= {os.readlink(fd) for fd in (proc / "fd").iterdir()}
    return {name for name in names if name.startswith("/dev/shm/") and not name.endswith(" (deleted)")}


def cpu_time_s(process: psutil.Process) -> float:
    """CPU time of all threads so far, to the nanosecond: Linux's per-process clock, see clock_getcpuclockid(3)."""
    return time.clock_gettime(~process.pid << 3 | 2)


def titles(processes: list[psutil.Process]) -> list[str]:
    """What `ps` shows, sorted."""
    pids = ",".join(str(process.pid) for process in processes)
    shown = subprocess.run(["ps", "-o", "args=", "-p", pids], capture_output=True, text=True, check=True)
    return sorted(line.strip() for line in shown.stdout.splitlines())


def complete(engine: Engine, **fields: object) -> httpx.Response:
    body = {"prompt": "Return the", "max_tokens": 8, "temperature": 0, **fields}
    return httpx.post(f"{engine.url}/completions", json=body, timeout=WAIT_S)


@contextmanager
def endless_stream(engine: Engine, max_tokens: int) -> Iterator[Iterator[str]]:
    """The lines of a stream that no end of sequence ends."""
    body = {"prompt": "Return the", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{engine.url}/completions", json=body, timeout=WAIT_S) as response:
        assert response.status_code == 200
        yield response.iter_lines()


def ours(folder: Path) -> list[Path]:
    """What the engine made in a folder for temporary files; torch keeps a cache beside it."""
    return list(folder.glob("*tandem*"))


def test_what_it_occupies_and_that_nothing_is_left(folder: Path) -> None:
    """Three kinds of process, one TCP port on the loopback, no named shared memory, no CPU while idle."""
    shared_memory = set(os.listdir("/dev/shm"))
    with running_engine(*FLAGS) as engine:
        processes = everyone(engine)
        assert titles(processes[1:]) == [
            "engine-launch: executor",
            "engine-launch: frontend",
            "engine-launch: scheduler",
        ]

        port = int(engine.root.rpartition(":")[2])
        assert listeners(processes) == {("127.0.0.1", port)}
        assert shared_files(processes) == set()
        (directory,) = ours(folder)
        assert directory.stat().st_mode & 0o777 == 0o700
        assert engine.endpoint == f"ipc://{directory}/frontend.sock"

        with httpx.Client(base_url=engine.root, timeout=WAIT_S) as http:  # keeps its connection open
            assert complete(engine, n=8, max_tokens=64).status_code == 200
            assert http.get("/health").status_code == 200
            before = {process: cpu_time_s(process) for process in processes}
            time.sleep(IDLE_WINDOW_S)
            used_s = {" ".join(process.cmdline()): cpu_time_s(process) - before[process] for process in processes}
        assert max(used_s.values()) < IDLE_WINDOW_S * IDLE_CPU_SHARE, used_s

    assert all(map(is_gone, processes))
    assert ours(folder) == []
    wait_until(lambda: set(os.listdir("/dev/shm")) <= shared_memory, WAIT_S, "/dev/shm is as before")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_sigterm_finishes_what_is_open_and_leaves_nothing(folder: Path) -> None:
    with running_engine(*FLAGS) as engine:
        processes = everyone(engine)
        with endless_stream(engine, max_tokens=600) as lines:
            next(lines)
            engine.process.send_signal(signal.SIGTERM)
            wait_until(
                lambda: httpx.get(f"{engine.root}/health", timeout=WAIT_S).status_code == 503,
                WAIT_S,
                "it says it drains",
            )
            assert complete(engine).status_code == 503
            rest = [line for line in lines if line]
        assert '"finish_reason":"length"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert engine.process.wait(WAIT_S) == 0
    assert all(map(is_gone, processes))
    assert ours(folder) == []


def test_a_killed_launcher_takes_everything_along(folder: Path) -> None:
    with running_engine(*FLAGS, exit_code=-signal.SIGKILL) as engine:
        children = everyone(engine)[1:]
        assert len(children) == 3
        with endless_stream(engine, max_tokens=4000) as lines:
            next(lines)
            engine.process.kill()
            wait_until(lambda: all(map(is_gone, children)), WAIT_S, "all children are gone")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{engine.root}/health", timeout=WAIT_S)


def test_a_terminal_shows_the_progress_of_loading_and_ctrl_c_ends_it() -> None:
    terminal, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-P", "-m", "frontend.launch", "--model", str(DEMO_MODEL), "--port", "0", *FLAGS]
    process = subprocess.Popen(command, preexec_fn=lambda: os.login_tty(theirs))
    os.close(theirs)
    shown = b""
    try:
        while b"Serving demo on http://127.0.0.1:" not in shown:
            assert select.select([terminal], [], [], 3 * WAIT_S)[0], shown
            shown += os.read(terminal, 4096)
        assert re.search(rb"Loading weights: +100%", shown), shown
        os.write(terminal, b"\x03")
        wait_until(lambda: process.poll() is not None, WAIT_S, "it ends")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


async def undisturbed(client: AsyncClient, prompt: str) -> Completion:
    return await client.generate(prompt, logprobs=2, **LONG)


def is_clear(answer: Completion) -> bool:
    """Rounding cannot change any of the tokens: each led the second best by more than MIN_MARGIN."""
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    return all(entry.top[0][2] - entry.top[1][2] > MIN_MARGIN for entry in logprobs)


async def streamed(client: AsyncClient, prompt: str, tokens: list[int]) -> str:
    """The text of a stream, whose tokens go to `tokens` as they come."""
    text = ""
    async with aclosing(client.stream(prompt, timeout_s=WAIT_S, **LONG)) as chunks:
        async for chunk in chunks:
            tokens.extend(chunk.token_ids)
            text += chunk.text
    return text


async def epoch_of(client: AsyncClient) -> int:
    """-1 while the scheduler is away."""
    try:
        return (await client.stats()).epoch
    except UnavailableError:
        return -1


async def streams_with_a_kill(engine: Engine, role: str) -> None:
    async with AsyncClient(engine.endpoint) as client:
        expected = await asyncio.gather(*(undisturbed(client, prompt) for prompt in PROMPTS))
        epoch = await epoch_of(client)
        tokens: list[list[int]] = [[] for _ in PROMPTS]
        streams = [asyncio.ensure_future(streamed(client, *asked)) for asked in zip(PROMPTS, tokens, strict=True)]
        while min(map(len, tokens)) < 50:
            await asyncio.sleep(0.001)
        assert not any(stream.done() for stream in streams), "a stream ended before the process did"
        engine.children()[role].kill()
        while await epoch_of(client) <= epoch:
            await asyncio.sleep(0.02)
        texts = await asyncio.gather(*streams)
        stats = await client.stats()
    clear = [index for index, answer in enumerate(expected) if is_clear(answer)]
    assert len(clear) >= 3, "too few prompts whose every token is clear"
    for index in clear:
        assert tuple(tokens[index]) == expected[index].token_ids
        assert texts[index] == expected[index].text
    assert [len(one) for one in tokens] == [LONG["max_tokens"]] * len(PROMPTS)
    assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)


@pytest.mark.parametrize("role", ["executor", "scheduler"])
def test_streams_go_on_with_the_same_tokens_when_a_process_is_killed(engine: Engine, role: str) -> None:
    asyncio.run(asyncio.wait_for(streams_with_a_kill(engine, role), 3 * WAIT_S))
    assert complete(engine).status_code == 200


def test_a_killed_frontend_comes_back_on_the_same_port(engine: Engine) -> None:
    first = complete(engine).json()["choices"][0]["text"]
    before = engine.children()
    before["frontend"].kill()
    wait_until(lambda: is_gone(before["frontend"]), WAIT_S, "the frontend is gone")
    # The launcher holds the port, so a connection made now waits for the next frontend.
    wait_until(lambda: httpx.get(f"{engine.root}/ready", timeout=WAIT_S).status_code == 200, WAIT_S, "it serves again")
    assert complete(engine).json()["choices"][0]["text"] == first
    after = engine.children()
    assert after["frontend"].pid != before["frontend"].pid
    assert (after["scheduler"].pid, after["executor"].pid) == (before["scheduler"].pid, before["executor"].pid)
