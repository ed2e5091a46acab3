"""A replica whose ranks are on two nodes, here two launchers on one machine, with the fake executor."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from frontend import flags
from frontend.node import Session
from frontend.plumbing import Elsewhere
from ipc.auth import load_client_keys, make_client_keys, make_server_keys
from ipc.config import EngineConfig
from ipc.control import NodeHello, PlanFrame, decode_relay
from ipc.errors import ConfigError, ProtocolError
from ipc.schema import PROTOCOL_VERSION, Heartbeat, ModelCard, Rejected, encode
from ipc.sockets import connect_dealer, new_identity
from tests.e2e.engine import read_line, wait_until
from tests.frontend.model_folder import tiny_model
from tests.frontend.test_supervisor import START_S, STOP_S, Launched, launched

REQUEST = dict(max_tokens=100, return_token_ids=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of keys: of the engine, of a node, and of a client that is none."""
    folder = tmp_path_factory.mktemp("keys")
    make_server_keys(folder / "engine")
    for name in ("replica", "frontend"):
        make_client_keys(folder / "engine", name, folder / name)
    return folder


@dataclass
class Nodes:
    """The first node's launcher, and that of the other one."""

    first: Launched
    folder: Path
    keys: Path
    flags: list[str]
    endpoint: str
    other: subprocess.Popen[str] | None = None
    lines: list[str] = field(default_factory=list)  # what the other one says

    def start_other(self) -> None:
        port = self.endpoint.rpartition(":")[2]
        command = [sys.executable, "-P", "-m", "frontend.launch", str(self.folder), "--fake-executor", *self.flags]
        command += ["--node-rank", "1", "--master-port", port, "--auth-keys", str(self.keys / "replica")]
        self.other = other = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **STEPS})
        threading.Thread(target=lambda: self.lines.extend(other.stderr or ()), daemon=True).start()

    def ranks(self) -> dict[int, psutil.Process]:
        """Of the other node."""
        assert self.other is not None
        found = {}
        for child in psutil.Process(self.other.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if match := re.search(r"engine-launch: executor (\d+)$", " ".join(child.cmdline()).rstrip("\0 ")):
                    found[int(match[1])] = child
        return found

    def replace_other(self) -> None:
        assert self.other is not None
        self.other.kill()
        self.other.wait()
        self.start_other()

    def complete(self) -> Any:
        return self.first.complete(**REQUEST).json()["choices"][0]["token_ids"]


STEPS = {"ENGINE_FAKE_STEP_US": "10000"}


@pytest.fixture
def nodes(folder: Path, keys: Path) -> Iterator[Nodes]:
    """The first of two nodes; the other one is yet to come."""
    common = ["--device", "cpu", "--tensor-parallel-size", "4", "--nnodes", "2", "--master-addr", "127.0.0.1"]
    own = ["--master-port", "0", "--auth-keys", str(keys / "engine"), "--enable-debug-endpoints"]
    with launched(folder, *common, *own, env=STEPS, ready=False) as first:
        found = re.fullmatch(r"Awaiting 1 nodes at (tcp://127\.0\.0\.1:\d+)\n", read_line(first.process, START_S))
        assert found
        nodes = Nodes(first, folder, keys, common, found[1])
        try:
            yield nodes
        finally:
            if nodes.other is not None:
                nodes.other.kill()
                nodes.other.wait()


def test_what_ends_on_either_node_is_replaced_on_both(nodes: Nodes) -> None:
    nodes.start_other()
    nodes.first.wait_ready()
    calm = nodes.complete()
    assert len(calm) == 100
    relay = nodes.first.roles()["relay"]
    faults: list[Callable[[], None]] = [
        lambda: nodes.first.roles()["relay"].kill(),
        lambda: nodes.first.roles()["scheduler"].kill(),
        nodes.replace_other,
    ]
    for fault in faults:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(nodes.complete)
            wait_until(lambda: nodes.first.invariants()["running"] == 1, START_S, "it runs")
            fault()
            assert answer.result() == calm, "no token is lost or changed"
    assert sorted(nodes.ranks()) == [2, 3]
    log = "\n".join(nodes.first.stderr)
    assert "executor restarted, epoch 3" in log
    assert "restart 2 of 3" in log
    assert "restart 3 of 3" not in log, "two lives of the ranks have ended; the scheduler's end left them alone"
    assert not relay.is_running()

    assert nodes.other is not None
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(nodes.complete)
        wait_until(lambda: nodes.first.invariants()["running"] == 1, START_S, "it runs")
        nodes.other.terminate()  # as in a group of pods that are told to go together
        nodes.first.process.terminate()
        assert answer.result() == calm, "it drains"
    assert nodes.first.wait() == 0
    assert nodes.other.wait(STOP_S) == 0
    wait_until(lambda: "it has stopped" in "".join(nodes.lines), STOP_S, "the other one has ended for that")


def test_only_keys_of_replicas_are_given_plans(nodes: Nodes) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def connect(name: str, *messages: bytes) -> zmq.Socket[bytes]:
        dealer = connect_dealer(context, nodes.endpoint, new_identity(), load_client_keys(nodes.keys / name))
        for message in messages:
            dealer.send(message)
        return dealer

    hello = encode(NodeHello(PROTOCOL_VERSION, 1))
    stranger = connect("frontend", hello, hello)
    wrong = connect("replica", b"\xff", encode(Heartbeat(0)), encode(NodeHello(PROTOCOL_VERSION, 2)))
    refusals = [decode_relay(wrong.recv()) for _ in range(2) if wrong.poll(START_S * 1e3)]
    assert [type(refusal) for refusal in refusals] == [Rejected, Rejected]
    assert [refusal.message for refusal in refusals] == ["Heartbeat before NodeHello", "node 2 of 2"]
    nodes.start_other()
    nodes.first.wait_ready()
    assert nodes.complete()
    assert not stranger.poll(0), "it was told nothing"
    context.destroy(linger=0)


def test_a_plan_out_of_turn_is_not_shown() -> None:
    card = ModelCard("tiny", "", 64, 100, (2,), 1)
    config = EngineConfig(card=card, ranks=4, nodes=2, max_num_batched_tokens=64, max_num_seqs=4)
    config = msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    session = Session(config, Elsewhere(node=1, head=41, store="127.0.0.1:1"), context)
    channels, _ = session.lines.executor(epoch=7, place=1)
    assert (channels.rank, channels.place, channels.epoch, channels.rendezvous) == (3, 1, 7, -1)
    session.take(PlanFrame(42, b"plan"))
    assert (session.plans.head, session.plans.acked) == (42, 41)
    for frame in (PlanFrame(42, b"plan"), PlanFrame(44, b"plan"), PlanFrame(43, b"x" * (session.plans.slot_bytes + 1))):
        with pytest.raises(ProtocolError, match="expected number 43"):
            session.take(frame)
    for seq in range(43, 46):
        session.take(PlanFrame(seq, b"plan"))
    with pytest.raises(ProtocolError, match="slot 46 is 5 ahead"):
        session.take(PlanFrame(46, b"plan"))
    session.close()
    context.destroy()


def test_flags_that_contradict_several_nodes_are_refused() -> None:
    two = ["m", "--tensor-parallel-size", "4", "--nnodes", "2"]
    for argv, reason in (
        (["m", "--tensor-parallel-size", "3", "--nnodes", "2"], "--nnodes: 2 nodes cannot share 3 ranks evenly"),
        (["m", "--node-rank", "1"], "--node-rank: needs --nnodes of at least 2"),
        (two, "--nnodes: needs --master-addr"),
        ([*two, "--master-addr", "h"], "--nnodes: needs --auth-keys"),
        ([*two, "--master-addr", "h", "--auth-keys", "k", "--node-rank", "2"], "--node-rank: must be below --nnodes 2"),
        ([*two, "--data-parallel-size", "2"], "--data-parallel-size: 2 with --nnodes 2"),
    ):
        with pytest.raises(ConfigError, match=re.escape(reason)):
            flags.parse(argv)
