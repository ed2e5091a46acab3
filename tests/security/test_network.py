"""A frontend and two replicas on three hosts, as network namespaces joined by a bridge, over tcp with CURVE.

A link is cut and heals: what the lost replica ran goes on at the other one, and it is used again afterwards. A replica
whose ranks are on two hosts waits for the link, and goes on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ipc.auth import make_client_keys, make_server_keys
from tests.e2e.engine import read_line, wait_until
from tests.frontend.model_folder import tiny_model

START_S = 120.0
NET = "10.213.57"
PREFIX = f"tdm{os.getpid() % 10_000}"
# Run in the frontend's host, which alone reaches its port. Reads a JSON body, or nothing for a GET; prints the answer.
ASK = """
import sys, urllib.request
body = sys.stdin.buffer.read() or None
request = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=100).read())
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)


@dataclass
class Host:
    """A network namespace with one interface and one address."""

    name: str
    address: str
    port: str  # its end in the bridge

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)

    def link(self, state: str) -> None:
        """Pull the cable out, "down", or plug it in, "up"."""
        ip("link", "set", self.port, state)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Three of them behind one switch."""
    bridge, made = f"{PREFIX}b", list[Host]()
    try:
        ip("link", "add", bridge, "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    try:
        ip("link", "set", bridge, "up")
        for number in range(3):
            host = Host(f"{PREFIX}n{number}", f"{NET}.{number + 1}", f"{PREFIX}p{number}")
            made.append(host)
            ip("netns", "add", host.name)
            ip("link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("link", "set", host.port, "master", bridge, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
        yield made
    finally:
        for host in made:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", host.name)
        ip("link", "del", bridge)


def launch(host: Host, model: Path, keys: Path, *flags: str, remote: str = "0") -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "frontend.launch", str(model), "--fake-executor", "--device", "cpu"]
    command += ["--frontend-endpoint", f"tcp://{host.address}:{remote}", "--auth-keys", str(keys), *flags]
    environment = {**os.environ, "ENGINE_FAKE_STEP_US": "20000"}
    return host.popen(*command, stdout=subprocess.PIPE, env=environment)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    engine = folder / "engine"
    make_server_keys(engine)
    for name in ("frontend", "replica"):
        make_client_keys(engine, name, folder / name)
    for secret in ("client.key_secret", "client.key"):  # a replica is a server to frontends, a client of the directory
        (folder / "replica" / secret).rename(engine / secret)
    return {"engine": engine, "frontend": folder / "frontend"}


class Cluster:
    """The frontend's host with the directory, and what can be asked of it."""

    def __init__(self, host: Host, url: str) -> None:
        self.host, self.url = host, url

    def ask(self, path: str, body: str = "") -> str:
        asking = self.host.popen(
            sys.executable, "-c", ASK, self.url + path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        answer, errors = asking.communicate(body, START_S)
        assert asking.returncode == 0, errors
        return answer

    def running(self) -> list[int]:
        """Requests that run in each replica that answers."""
        text = self.ask("/metrics")
        return [int(float(value)) for value in re.findall(r"num_requests_running\{.*?\} (\S+)", text)]

    def complete(self, count: int, max_tokens: int) -> list[str]:
        """Token ids of so many requests at once; each must succeed."""

        def one(seed: int) -> str:
            body = '{"prompt":[1,8,%d],"max_tokens":%d,"seed":%d,"return_token_ids":true}'
            answer = self.ask("/v1/completions", body % (9 + seed, max_tokens, seed))
            found = re.search(r'"token_ids":(\[[^]]*\])', answer)
            assert found and found[1].count(",") == max_tokens - 1, answer
            return found[1]

        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))


@pytest.fixture(scope="module")
def cluster(hosts: list[Host], keys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Host 0: directory and frontend; hosts 1 and 2: a replica each."""
    model = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    first, *others = hosts
    with contextlib.ExitStack() as stack:

        def keep(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process

        place = f"tcp://{first.address}:5757"
        keep(launch(first, model, keys["engine"], "--data-parallel-size", "0", "--frontends", "0", remote="5757"))
        for host in others:
            joins = keep(launch(host, model, keys["engine"], "--frontends", "0", "--join", place))
            assert read_line(joins, START_S).startswith("Serving tiny on tcp://")
        command = ["-P", "-c", "from frontend.process import main; raise SystemExit(main())", "--connect", place]
        command += ["--auth-keys", str(keys["frontend"]), "--port", "0"]
        frontend = keep(first.popen(sys.executable, *command, stdout=subprocess.PIPE))
        found = re.search(r"http://\S+(?=/v1)", read_line(frontend, START_S))
        assert found
        yield Cluster(first, found[0])


@pytest.fixture(scope="module")
def pair(hosts: list[Host], keys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An engine of its own on host 1: one replica, whose ranks are on hosts 1 and 2."""
    model = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    first, other = hosts[1:]
    two = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", first.address, "--port", "0"]
    with contextlib.ExitStack() as stack:
        launcher = launch(first, model, keys["engine"], *two)
        node = launch(other, model, keys["engine"], *two, "--node-rank", "1")
        for process in (node, launcher):  # the launcher ends first: its node would wait for it
            stack.callback(process.wait)
            stack.callback(process.terminate)
        assert read_line(launcher, START_S) == f"Awaiting 1 nodes at tcp://{first.address}:29501\n"
        found = re.search(r"http://\S+(?=/v1)", read_line(launcher, START_S))
        assert found
        yield Cluster(first, found[0])


def is_ready(cluster: Cluster, replicas: int) -> bool:
    with contextlib.suppress(AssertionError):
        return len(cluster.running()) == replicas
    return False


@pytest.mark.slow
def test_a_cut_link_costs_no_stream_and_a_healed_one_is_used_again(
    cluster: Cluster, pair: Cluster, hosts: list[Host]
) -> None:
    wait_until(lambda: is_ready(cluster, 2), START_S, "both replicas are there")
    calm, calm_pair = cluster.complete(8, 200), pair.complete(2, 200)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked, asked_pair = pool.submit(cluster.complete, 8, 200), pool.submit(pair.complete, 2, 200)
        wait_until(lambda: min(cluster.running()) >= 2, START_S, "both run some of them")
        wait_until(lambda: pair.running() == [2], START_S, "they run on both hosts")
        hosts[2].link("down")
        assert asked.result() == calm, "no stream is lost or changed"
        wait_until(lambda: is_ready(cluster, 1), START_S, "the other one is alone")
        wait_until(lambda: pair.running() == [0], START_S, "the ranks on the other host are missed")
        cluster.complete(4, 10)
        hosts[2].link("up")
        assert asked_pair.result() == calm_pair, "they waited for the link and went on"
    wait_until(lambda: is_ready(cluster, 2), START_S, "it is back")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cluster.complete, 8, 200)
        wait_until(lambda: min(cluster.running()) >= 2, START_S, "both run some of them again")
        assert asked.result() == calm
