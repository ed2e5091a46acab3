"""The tcp endpoint: a client with a listed key is served, anybody else gets nothing and harms nobody."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from frontend import flags
from frontend.client import AsyncClient, Client
from ipc.auth import ClientKeys, Gatekeeper, KeyPair, load_client_keys, load_server_keys, make_client_keys
from ipc.errors import ConfigError
from ipc.schema import PROTOCOL_VERSION, Hello, encode
from ipc.sockets import bind_router, connect_dealer, new_identity
from tests.e2e.engine import Engine, read_line, running_engine, wait_until
from tests.frontend.model_folder import tiny_model

WAIT_S = 30.0
ROOT = Path(__file__).resolve().parents[2]
REFUSED = {
    zmq.Event.HANDSHAKE_FAILED_AUTH,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
    zmq.Event.DISCONNECTED,
}


def make_keys(*argv: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_keys.py"), *argv], check=True, timeout=WAIT_S)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `engine` and `alice`."""
    folder = tmp_path_factory.mktemp("keys")
    make_keys(str(folder / "engine"))
    make_keys(str(folder / "engine"), "--client", "alice")
    return folder


@pytest.fixture(scope="module")
def engine(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    options = ["--fake-executor", "--device", "cpu", "--frontends", "0"]
    remote = ["--frontend-endpoint", "tcp://127.0.0.1:0", "--auth-keys", str(keys / "engine")]
    with running_engine(*options, *remote, model=folder) as engine:
        yield engine


def refusal_of(endpoint: str, own: KeyPair | None, server: bytes) -> None:
    """Say Hello with these keys; returns once ZMQ reports the refusal, and fails if anything was answered."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        if own is not None:
            socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = own.public, own.secret, server
        monitor = socket.get_monitor_socket()
        socket.connect(endpoint)
        socket.send(encode(Hello(PROTOCOL_VERSION, "frontend", "intruder", 1)))
        while monitor.poll(WAIT_S * 1e3):
            event = recv_monitor_message(monitor)["event"]
            assert event != zmq.Event.HANDSHAKE_SUCCEEDED
            if event in REFUSED:
                assert not socket.poll(0)
                socket.disable_monitor()
                return
        raise AssertionError("neither let in nor refused")


def new_pair() -> KeyPair:
    return KeyPair(*zmq.curve_keypair())


def test_secret_keys_are_private_files(keys: Path) -> None:
    for secret in (keys / "engine" / "server.key_secret", keys / "alice" / "client.key_secret"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert {path.name for path in (keys / "alice").iterdir()} == {"client.key", "client.key_secret", "server.key"}


def test_a_frontend_with_a_listed_key_serves_http(engine: Engine, keys: Path) -> None:
    assert re.fullmatch(r"tcp://127\.0\.0\.1:[1-9]\d*", engine.tcp)
    command = [sys.executable, "-P", "-c", "from frontend.process import main; main()", "--connect", engine.tcp]
    command += ["--auth-keys", str(keys / "alice"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            found = re.search(r"http://\S+/v1", read_line(process, WAIT_S))
            assert found
            url = found.group().removesuffix("/v1")
            wait_until(lambda: httpx.get(url + "/ready", timeout=WAIT_S).status_code == 200, WAIT_S, "ready over tcp")
            body = {"prompt": "the end", "max_tokens": 6, "seed": 0}
            answer = httpx.post(url + "/v1/completions", json=body, timeout=WAIT_S).json()
            assert answer["usage"]["completion_tokens"] == 6
        finally:
            process.terminate()


def test_everybody_else_gets_nothing_and_the_service_goes_on(engine: Engine, keys: Path) -> None:
    alice = load_client_keys(keys / "alice")
    with Client(engine.tcp, auth_keys=keys / "alice") as client:
        refusal_of(engine.tcp, None, b"")  # plain tcp
        refusal_of(engine.tcp, new_pair(), alice.server)  # knows the engine's key, is not listed
        refusal_of(engine.tcp, alice.own, zmq.curve_keypair()[0])  # is listed, does not know the engine's key
        refusal_of(engine.tcp, KeyPair(alice.own.public, zmq.curve_keypair()[1]), alice.server)  # a stolen public key
        assert len(client.generate([1, 2, 3], max_tokens=5).token_ids) == 5
        stats = client.stats()
    assert (stats.frontends, stats.dropped_messages) == (1, 0)


@pytest.fixture
def gate(keys: Path, tmp_path: Path) -> Iterator[tuple[Gatekeeper, zmq.Socket[bytes], str]]:
    """A gatekeeper with a folder of its own, turned by hand, and the ROUTER it guards."""
    folder = shutil.copytree(keys / "engine", tmp_path / "engine")
    context = zmq.Context()
    router = bind_router(context, f"ipc://{tmp_path}/socket")
    keeper = Gatekeeper(context, folder)
    yield keeper, router, keeper.bind(router, "tcp://127.0.0.1:0")
    context.destroy(linger=0)


def hears(gate: tuple[Gatekeeper, zmq.Socket[bytes], str], keys: ClientKeys | None, endpoint: str) -> bool:
    """Whether a Hello with these keys arrives; otherwise its sender was refused."""
    keeper, router, _ = gate
    with zmq.Context() as context:
        socket = connect_dealer(context, endpoint, new_identity(), keys)
        monitor = socket.get_monitor_socket()
        socket.send(b"hello")
        try:
            for _ in range(int(WAIT_S * 100)):
                keeper.answer()
                if router.poll(5):
                    return router.recv_multipart()[1] == b"hello"
                if monitor.poll(5) and recv_monitor_message(monitor)["event"] in REFUSED:
                    return False
        finally:
            socket.disable_monitor()
            socket.close()
    raise AssertionError("neither let in nor refused")


def test_clients_are_listed_and_unlisted_while_the_engine_runs(
    gate: tuple[Gatekeeper, zmq.Socket[bytes], str], tmp_path: Path
) -> None:
    server, endpoint = tmp_path / "engine", gate[2]
    make_client_keys(server, "bob", tmp_path / "bob")
    bob = load_client_keys(tmp_path / "bob")
    assert hears(gate, bob, endpoint)
    (server / "clients" / "bob.key").rename(tmp_path / "bob.key")
    assert not hears(gate, bob, endpoint)
    (server / "clients" / "bob.key").write_text("half a key fi")
    assert not hears(gate, bob, endpoint)
    shutil.copy(tmp_path / "bob.key", server / "clients" / "bob.key")
    assert hears(gate, bob, endpoint)
    make_client_keys(server, "carol", tmp_path / "carol")
    (server / "clients" / "carol.key").rename(tmp_path / "carol.key")
    assert hears(gate, bob, endpoint)
    (server / "clients" / "bob.key").write_text((tmp_path / "carol.key").read_text())  # the folder stays as it was
    assert not hears(gate, bob, endpoint)
    assert hears(gate, load_client_keys(tmp_path / "carol"), endpoint)
    shutil.rmtree(server / "clients")
    assert not hears(gate, bob, endpoint)


def test_the_ipc_endpoint_of_the_same_router_needs_no_key(
    gate: tuple[Gatekeeper, zmq.Socket[bytes], str], tmp_path: Path
) -> None:
    assert hears(gate, None, f"ipc://{tmp_path}/socket")


def test_plain_tcp_is_refused_before_anything_starts(keys: Path) -> None:
    for argv, reason in (
        (["--frontend-endpoint", "tcp://0.0.0.0:5757"], "--frontend-endpoint: tcp://0.0.0.0:5757 needs --auth-keys"),
        (["--frontend-endpoint", "ipc:///tmp/x", "--auth-keys", "x"], "--frontend-endpoint: expected tcp://HOST:PORT"),
        (["--frontend-endpoint", "tcp://*"], "--frontend-endpoint: expected tcp://HOST:PORT"),
    ):
        with pytest.raises(ConfigError, match=re.escape(reason)):
            flags.parse(["--model", "m", *argv])
    with pytest.raises(ConfigError, match="tcp is encrypted"):
        AsyncClient("tcp://127.0.0.1:1")


def test_keys_that_others_may_read_or_that_are_missing_are_refused(keys: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(keys / "engine", tmp_path / "engine"))
    (folder / "server.key_secret").chmod(0o640)
    with pytest.raises(ConfigError, match="has mode 0640"):
        load_server_keys(folder)
    shutil.copy(folder / "server.key", folder / "server.key_secret")
    with pytest.raises(ConfigError, match="holds a public key only"):
        load_server_keys(folder)
    with pytest.raises(ConfigError, match=r"no secret key in .*client.key_secret"):
        load_client_keys(folder)
    with pytest.raises(ConfigError, match="that client has keys"):
        make_client_keys(folder, "alice", tmp_path / "again")
    assert "secret=" not in repr(load_client_keys(keys / "alice"))
