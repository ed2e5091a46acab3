"""The launcher's life with real processes and the fake executor: start, restart, drain, stop, and nothing left."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.engine import wait_until
from tests.frontend.model_folder import fake_tokens, tiny_model

START_S, STOP_S = 120.0, 60.0


class Launched:
    """One `engine-launch --fake-executor` and what it prints."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.ready_line = ""
        self.stderr: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr.append(line.rstrip("\n"))

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_S)
        assert readable, f"nothing printed: {self.stderr}"
        self.ready_line = self.process.stdout.readline()
        assert self.ready_line.startswith("Serving tiny on http://"), (self.ready_line, self.stderr)

    @property
    def root(self) -> str:
        found = re.search(r"(http://\S+)/v1", self.ready_line)
        assert found
        return found[1]

    @property
    def directory(self) -> Path:
        found = re.search(r"ipc://(\S+)/frontend.sock", self.ready_line)
        assert found
        return Path(found[1])

    def roles(self) -> dict[str, psutil.Process]:
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if match := re.search(r"engine-launch: (\w+)", " ".join(child.cmdline())):
                    found[match[1]] = child
        return found

    def wait(self) -> int:
        code = self.process.wait(STOP_S)
        self._reader.join(STOP_S)
        return code

    def health(self) -> int:
        return httpx.get(f"{self.root}/health", timeout=START_S).status_code

    def metrics(self) -> str:
        return httpx.get(f"{self.root}/metrics", timeout=START_S).text

    def invariants(self) -> dict[str, int]:
        """What adds up in the scheduler; it must, at any time. Nothing while the scheduler is away."""
        found = httpx.get(f"{self.root}/debug/invariants", timeout=START_S)
        assert found.status_code in (200, 503), found.text
        numbers: dict[str, int] = found.json() if found.is_success else {"running": -1}
        return numbers

    def complete(self, **fields: object) -> httpx.Response:
        body = {"prompt": "the end", "seed": 0, "max_tokens": 4, **fields}
        return httpx.post(f"{self.root}/v1/completions", json=body, timeout=START_S)


@contextlib.contextmanager
def launched(
    folder: Path,
    *flags: str,
    env: dict[str, str] | None = None,
    ready: bool = True,
    preexec: Callable[[], None] | None = None,
) -> Iterator[Launched]:
    command = [sys.executable, "-P", "-m", "frontend.launch", str(folder), "--fake-executor", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        start_new_session=True,
        preexec_fn=preexec,
    )
    engine = Launched(process)
    children: list[psutil.Process] = []
    try:
        if ready:
            engine.wait_ready()
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        yield engine
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def is_replaced(engine: Launched, role: str, old: psutil.Process) -> bool:
    found = engine.roles().get(role)
    return found is not None and found.pid != old.pid


def listening_ports(process: psutil.Process) -> set[int]:
    everyone = [process, *process.children(recursive=True)]
    return {
        connection.laddr.port
        for one in everyone
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_three_kinds_of_process_one_port_and_nothing_left(folder: Path) -> None:
    with launched(folder) as engine:
        assert engine.complete().status_code == 200
        children = engine.roles()
        assert sorted(children) == ["executor", "frontend", "scheduler"]
        assert listening_ports(psutil.Process(engine.process.pid)) == {int(engine.root.rpartition(":")[2])}
        assert engine.directory.stat().st_mode & 0o777 == 0o700
        engine.process.terminate()
        assert engine.wait() == 0
        assert not any(child.is_running() for child in children.values())
        assert not engine.directory.exists()
        with pytest.raises(httpx.ConnectError):
            engine.health()


def test_several_frontends_share_the_port(folder: Path) -> None:
    with launched(folder, "--frontends", "2") as engine:
        children = psutil.Process(engine.process.pid).children()
        assert len(children) == 4
        assert engine.complete().status_code == 200
        assert "engine:frontends" in (text := engine.metrics())
        assert 'engine:frontends{engine="0",model_name="tiny"} 2.0' in text
        engine.process.terminate()
        assert engine.wait() == 0


def test_ctrl_c_reaches_the_launcher_alone_and_ends_in_order(folder: Path) -> None:
    with launched(folder) as engine:
        os.killpg(engine.process.pid, signal.SIGINT)
        assert engine.wait() == 0
        assert not any("Traceback" in line for line in engine.stderr)


def test_sigterm_lets_open_requests_finish_and_refuses_new_ones(folder: Path) -> None:
    with launched(folder, env={"ENGINE_FAKE_STEP_US": "20000"}) as engine:
        body = {"prompt": "the end", "max_tokens": 100, "seed": 0, "stream": True}
        with httpx.stream("POST", f"{engine.root}/v1/completions", json=body, timeout=START_S) as response:
            lines = response.iter_lines()
            next(lines)
            engine.process.terminate()
            wait_until(lambda: engine.health() == 503, STOP_S, "health says 503")
            assert engine.complete().status_code == 503
            text = "\n".join(lines)
        assert text.rstrip().endswith("data: [DONE]")
        assert '"finish_reason":"length"' in text
        assert engine.wait() == 0


@pytest.mark.parametrize("how", ["second signal", "shutdown timeout"])
def test_a_shutdown_that_ends_requests_tells_their_clients(folder: Path, how: str) -> None:
    flags = ["--shutdown-timeout", "0.3"] if how == "shutdown timeout" else []
    with launched(folder, *flags, env={"ENGINE_FAKE_STEP_US": "20000"}) as engine:
        body = {"prompt": "the end", "max_tokens": 2000, "seed": 0, "stream": True}
        with httpx.stream("POST", f"{engine.root}/v1/completions", json=body, timeout=START_S) as response:
            lines = response.iter_lines()
            next(lines)
            engine.process.terminate()
            if how == "second signal":
                wait_until(lambda: any("draining" in line for line in engine.stderr), STOP_S, "draining")
                engine.process.terminate()
            text = "\n".join(lines)
            assert '"error":{' in text
            assert '"finish_reason":"' not in text
            assert "[DONE]" not in text
        assert engine.wait() == 0


def test_a_signal_while_starting_ends_at_once(folder: Path) -> None:
    with launched(folder, ready=False) as engine:
        wait_until(lambda: psutil.Process(engine.process.pid).children(), START_S, "a child")
        engine.process.terminate()
        assert engine.wait() == 0


@pytest.mark.parametrize("kind", ["exit", "corrupt"])
def test_a_killed_executor_is_replaced_and_streams_go_on(folder: Path, kind: str) -> None:
    """So is one whose result is garbage, and the scheduler that reads it stays."""
    env = {"ENGINE_FAULT": f"executor:step=20:epoch=0:{kind}", "ENGINE_FAKE_STEP_US": "1000"}
    with launched(folder, env=env) as engine:
        scheduler = engine.roles()["scheduler"]
        answer = engine.complete(max_tokens=60, return_token_ids=True).json()
        assert answer["choices"][0]["token_ids"] == fake_tokens(answer["usage"]["prompt_tokens"], seed=0, count=60)
        assert answer["usage"]["completion_tokens"] == 60
        wait_until(lambda: any("serving again" in line for line in engine.stderr), STOP_S, "a log line")
        assert engine.roles()["scheduler"].pid == scheduler.pid
        engine.process.terminate()
        assert engine.wait() == 0
        log = "\n".join(engine.stderr)
        assert "restart 1 of 3" in log
        assert bool(re.search(r"ending executor \(pid \d+\): result of -\d+ rows", log)) == (kind == "corrupt")


def test_a_killed_frontend_is_replaced(folder: Path) -> None:
    with launched(folder) as engine:
        first = engine.roles()["frontend"]
        first.kill()
        first.wait(STOP_S)
        assert engine.complete().status_code == 200, "the next one took connections before it could serve"
        wait_until(
            lambda: "frontend" in (roles := engine.roles()) and roles["frontend"].pid != first.pid, STOP_S, "another"
        )
        wait_until(lambda: engine.health() == 200, STOP_S, "health")
        assert engine.complete().status_code == 200
        engine.process.terminate()
        assert engine.wait() == 0


def test_a_killed_scheduler_is_replaced_and_streams_go_on_with_the_same_executor(folder: Path) -> None:
    """Killed twice under load; each stream is what it would have been, with its own numbers."""
    with launched(folder, "--enable-debug-endpoints", env={"ENGINE_FAKE_STEP_US": "10000"}) as engine:
        asked = [dict(max_tokens=150 + i, min_tokens=100, seed=i, return_token_ids=True) for i in range(8)]
        before = engine.roles()
        with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
            answers = [pool.submit(engine.complete, **fields) for fields in asked]
            for _ in range(2):
                wait_until(lambda: engine.invariants()["running"] == len(asked), START_S, "all run")
                killed = engine.roles()["scheduler"]
                killed.kill()
                wait_until(partial(is_replaced, engine, "scheduler", killed), START_S, "another scheduler")
            answers = [answer.result().json() for answer in answers]
        for fields, answer in zip(asked, answers, strict=True):
            expected = fake_tokens(answer["usage"]["prompt_tokens"], fields["seed"], fields["max_tokens"])
            assert answer["choices"][0]["token_ids"] == expected
            assert answer["usage"]["completion_tokens"] == fields["max_tokens"]
        assert engine.roles()["executor"].pid == before["executor"].pid
        assert engine.roles()["frontend"].pid == before["frontend"].pid
        found = engine.invariants()
        assert (found["requests"], found["blocks_free"], found["plans_in_flight"]) == (0, found["blocks_total"], 0)
        engine.process.terminate()
        assert engine.wait() == 0
        log = "\n".join(engine.stderr)
        assert re.search(r"scheduler restarted, epoch 2: serving again after \d+\.\d\d s", log)
        assert not any("Traceback" in line for line in engine.stderr)


def test_scheduler_and_executor_die_at_once(folder: Path) -> None:
    with launched(folder, env={"ENGINE_FAKE_STEP_US": "10000"}) as engine:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(engine.complete, max_tokens=200, return_token_ids=True)
            wait_until(
                lambda: 'num_requests_running{engine="0",model_name="tiny"} 1' in engine.metrics(), START_S, "it runs"
            )
            for role in ("executor", "scheduler"):
                engine.roles()[role].kill()
            found = answer.result().json()
        assert found["choices"][0]["token_ids"] == fake_tokens(found["usage"]["prompt_tokens"], seed=0, count=200)
        engine.process.terminate()
        assert engine.wait() == 0


def test_a_stopped_scheduler_is_noticed_dumped_and_replaced(folder: Path) -> None:
    with launched(folder, "--watchdog-timeout", "2", env={"ENGINE_FAKE_STEP_US": "10000"}) as engine:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(engine.complete, max_tokens=200)
            engine.roles()["scheduler"].suspend()
            assert answer.result().json()["usage"]["completion_tokens"] == 200
        log = "\n".join(engine.stderr)
        assert re.search(r"silent for 3\.0 s; ending scheduler \(pid \d+\), its stacks:", log)
        assert "most recent call first" in log
        assert "was ended by SIGUSR2" in log, "it went on after it had shown its stacks"
        engine.process.terminate()
        assert engine.wait() == 0


def test_a_request_that_crashes_the_executor_fails_alone(folder: Path) -> None:
    """The executor dies of every prompt that holds token 2; two lives are enough to know which request it is."""
    env = {"ENGINE_FAULT": "executor:token=2:exit", "ENGINE_FAKE_STEP_US": "5000"}
    with launched(folder, "--max-restarts", "2", env=env) as engine:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            others = [pool.submit(engine.complete, prompt=[1, 8, 9 + i], max_tokens=150) for i in range(3)]
            wait_until(
                lambda: 'num_requests_running{engine="0",model_name="tiny"} 3' in engine.metrics(), START_S, "they run"
            )
            bad = engine.complete(prompt=[1, 2, 8], max_tokens=150)
            assert (bad.status_code, bad.json()["error"]["code"]) == (500, "request_crashed_executor")
            assert [each.result().json()["usage"]["completion_tokens"] for each in others] == [150] * 3
        assert "restart 2 of 2" in "\n".join(engine.stderr)
        engine.process.terminate()
        assert engine.wait() == 0


@pytest.mark.parametrize(
    ("fault", "streams"), [("scheduler:step=20:epoch=0:raise", "go on"), ("frontend:step=20:epoch=0:raise", "fail")]
)
def test_an_exception_in_any_process_is_survived_or_declared(folder: Path, fault: str, streams: str) -> None:
    with launched(folder, env={"ENGINE_FAULT": fault, "ENGINE_FAKE_STEP_US": "2000"}) as engine:
        body = {"prompt": "the end", "max_tokens": 100, "seed": 0, "stream": True}
        text = httpx.post(f"{engine.root}/v1/completions", json=body, timeout=START_S).text
        assert ('"finish_reason":"length"' in text, "[DONE]" in text) == (streams == "go on",) * 2
        assert ('"error":{' in text) == (streams == "fail")
        wait_until(lambda: engine.complete().status_code == 200, START_S, "it serves")
        engine.process.terminate()
        assert engine.wait() == 0


def test_a_killed_launcher_takes_everything_along(folder: Path) -> None:
    with launched(folder) as engine:
        children = list(engine.roles().values())
        engine.process.kill()
        gone, alive = psutil.wait_procs(children, timeout=STOP_S)
        assert not alive
        assert len(gone) == 3


def test_restarts_are_limited_and_the_first_traceback_comes_last(folder: Path) -> None:
    env = {"ENGINE_FAULT": "executor:step=3:raise"}
    with launched(folder, "--max-restarts", "1", env=env) as engine:
        with contextlib.suppress(httpx.HTTPError):
            assert engine.complete(max_tokens=50).status_code >= 500
        assert engine.wait() == 1
        log = "\n".join(engine.stderr)
        assert "executor failed 2 times, the first time with:" in log
        assert engine.stderr[-1] == "RuntimeError: ENGINE_FAULT: raised at step 3"


@pytest.mark.parametrize("role", ["executor", "scheduler", "frontend"])
def test_a_fault_of_the_user_in_a_child_is_one_line_and_code_2(folder: Path, role: str) -> None:
    with launched(folder, env={"ENGINE_FAULT": f"{role}:bogus"}, ready=False) as engine:
        assert engine.wait() == 2
        assert len(engine.stderr) == 1
        assert engine.stderr[0].startswith(f"{role}: error: ENGINE_FAULT: ")


def test_a_hung_executor_is_noticed_dumped_and_replaced(folder: Path) -> None:
    env = {"ENGINE_FAULT": "executor:step=5:epoch=0:hang"}
    with launched(folder, "--watchdog-timeout", "4", env=env) as engine:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(engine.complete, max_tokens=30)
            wait_until(lambda: engine.health() == 503, START_S, "health says that steps do not end")
            assert answer.result().status_code == 200
        wait_until(lambda: engine.health() == 200, START_S, "health says that they do")
        log = "\n".join(engine.stderr)
        assert re.search(r"no step finished for \d\.\d s; ending executor", log)
        assert "most recent call first" in log
        assert "executor (pid" in log
        engine.process.terminate()
        assert engine.wait() == 0


def test_one_more_frontend_joins_and_leaves(folder: Path) -> None:
    with launched(folder, env={"ENGINE_FAKE_STEP_US": "1000"}) as engine:
        endpoint = f"ipc://{engine.directory}/frontend.sock"
        command = [sys.executable, "-P", "-c", "import sys; from frontend.process import main; sys.exit(main())"]
        joined = subprocess.Popen(
            [*command, "--connect", endpoint, "--port", "0"], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            assert joined.stdout is not None
            assert select.select([joined.stdout], [], [], START_S)[0]
            found = re.search(r"http://\S+/v1", joined.stdout.readline())
            assert found
            wait_until(
                lambda: httpx.get(found[0].replace("/v1", "/ready"), timeout=START_S).is_success, START_S, "it serves"
            )
            body = {"prompt": "the end", "seed": 0, "max_tokens": 4}
            mine = httpx.post(f"{found[0]}/completions", json=body, timeout=START_S).json()
            assert mine["choices"] == engine.complete().json()["choices"]
            joined.terminate()
            assert joined.wait(STOP_S) == 0
        finally:
            joined.kill()
            joined.wait()
        assert engine.complete().status_code == 200


def test_few_files_and_one_core_are_enough(folder: Path) -> None:
    """More connections than the frontend may open files: some wait, some are refused, nobody dies of it."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    with launched(folder, preexec=limit) as engine, contextlib.ExitStack() as stack:
        before = {role: child.pid for role, child in engine.roles().items()}
        host, port = engine.root.removeprefix("http://").split(":")
        address = (host, int(port))
        idle = [stack.enter_context(socket.create_connection(address, START_S)) for _ in range(140)]
        refused = engine.complete()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
        idle += [stack.enter_context(socket.create_connection(address, START_S)) for _ in range(160)]
        with contextlib.suppress(httpx.HTTPError):
            engine.complete()
        for connection in idle:
            connection.close()
        wait_until(lambda: engine.complete().status_code == 200, START_S, "it serves")
        assert {role: child.pid for role, child in engine.roles().items()} == before
        engine.process.terminate()
        assert engine.wait() == 0


def test_ctrl_c_on_a_terminal(folder: Path) -> None:
    """The children's stderr is a terminal too, so that progress bars show; Ctrl-C stops everything in order."""
    terminal, theirs = os.openpty()
    command = [sys.executable, "-P", "-m", "frontend.launch", str(folder), "--fake-executor", "--device", "cpu"]
    process = subprocess.Popen([*command, "--port", "0"], preexec_fn=lambda: os.login_tty(theirs))
    os.close(theirs)
    shown = b""
    try:
        for expected, keys in ((b"Serving tiny", b"\x03"), (b"draining", b"")):
            while expected not in shown:
                assert select.select([terminal], [], [], START_S)[0], shown
                shown += os.read(terminal, 4096)
            os.write(terminal, keys)
        assert process.wait(STOP_S) == 0
        assert b"Traceback" not in shown
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
