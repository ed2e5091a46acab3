"""CURVE keys of tcp endpoints, and the gatekeeper that lets only listed keys in.

A key folder belongs to one party and holds its own secret key, mode 0600, and the public keys it trusts:

    engine   server.key_secret   clients/NAME.key   who may connect; read again when the folder changes
    client   client.key_secret   server.key

`scripts/make_keys.py` writes both; the files are those of zmq.auth. Secrets are read here and handed to ZMQ, and must
never reach a message, a log or an argument list. CURVE alone admits whoever knows the server's public key, hence ZAP.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zmq
import zmq.auth
from zmq.utils import z85

from ipc.errors import ConfigError

REPLICA_KEYS: Final = "replica"  # how the names of keys begin whose owners may add replicas, and ranks to one

_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"  # fixed by ZMQ RFC 27
_ZAP_DOMAIN: Final = b"tandem"
_FLAG: Final = "--auth-keys"
_MAX_LOGGED: Final = 1000
_PING_MS: Final = 5000  # a host that vanished is noticed by its silence
_RETRY_MS: Final = 5000  # a client that is not let in does not hammer
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Own keys, as 40 characters of Z85; the secret one does not show in a repr."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a client needs to reach an engine: its own keys, and the key that proves the engine."""

    own: KeyPair
    server: bytes


def load_client_keys(folder: Path) -> ClientKeys:
    """The keys of a client. Raises ConfigError for a folder without them, or whose secret others may read."""
    return ClientKeys(_load_pair(folder / "client.key_secret"), _load_public(folder / "server.key"))


def has_client_keys(folder: str) -> bool:
    """Whether an engine's key folder is also that of a client, which reaches replicas of other hosts with it."""
    return bool(folder) and Path(folder, "client.key_secret").exists()


def load_server_keys(folder: Path) -> KeyPair:
    """The keys of an engine. Raises ConfigError as above, and if there is no folder of clients."""
    clients = folder / "clients"
    if not clients.is_dir():
        raise ConfigError(f"no folder {clients}: nobody could connect", param=_FLAG)
    return _load_pair(folder / "server.key_secret")


def make_server_keys(folder: Path) -> None:
    """Write the keys of an engine into `folder`. Raises ConfigError if it has some already."""
    _make_pair(folder, "server")
    (folder / "clients").mkdir(exist_ok=True)


def make_client_keys(server: Path, name: str, folder: Path) -> None:
    """Write the keys of client `name` into `folder`, and list it in the engine's folder `server`."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"{name!r} is no name for a client: use letters, digits, '.', '-' and '_'")
    listed = server / "clients" / f"{name}.key"
    if listed.exists():
        raise ConfigError(f"{listed} exists: that client has keys")
    _make_pair(folder, "client")
    (folder / "server.key").write_bytes((server / "server.key").read_bytes())
    listed.write_bytes((folder / "client.key").read_bytes())


def _make_pair(folder: Path, name: str) -> None:
    if (folder / f"{name}.key_secret").exists():
        raise ConfigError(f"{folder} has a {name}.key_secret, which would be lost")
    before = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        zmq.auth.create_certificates(folder, name)
    finally:
        os.umask(before)


def _load_public(path: Path) -> bytes:
    try:
        return zmq.auth.load_certificate(path)[0]
    except (OSError, ValueError) as error:
        raise ConfigError(f"no public key in {path}: {error}", param=_FLAG) from error


def _load_pair(path: Path) -> KeyPair:
    try:
        public, secret = zmq.auth.load_certificate(path)
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no secret key in {path}: {error}", param=_FLAG) from error
    if secret is None:
        raise ConfigError(f"{path} holds a public key only", param=_FLAG)
    if mode & _OTHERS:
        raise ConfigError(f"{path} has mode {mode:04o}, others may read it; expected 0600", param=_FLAG)
    return KeyPair(public, secret)


class Gatekeeper:
    """Answers libzmq's question, at each handshake, whether the owner of a public key may connect (ZMQ RFC 27, ZAP).

    One for each ZMQ context. Poll `socket`, and call `answer` when it is readable.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self._keys = load_server_keys(folder)
        self._clients = folder / "clients"
        self._listed: dict[bytes, str] = {}  # public key -> name
        self._files: dict[Path, int] = {}  # modification time of each when they were read
        self._refused: set[bytes] = set()  # keys already logged
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ZAP_ENDPOINT)

    def bind(self, router: zmq.Socket[bytes], endpoint: str) -> str:
        """Bind one more, encrypted endpoint to `router`; endpoints it has already stay as they are.

        Returns the endpoint with the port that the system chose for port 0. Raises ConfigError if it cannot be bound.
        """
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        router.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an answer nobody is let in
        router.setsockopt(zmq.HEARTBEAT_IVL, _PING_MS)
        router.setsockopt(zmq.IPV6, int("[" in endpoint))
        try:
            router.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on {endpoint}: {error}", param="--frontend-endpoint") from error
        return router.getsockopt_string(zmq.LAST_ENDPOINT)

    def answer(self) -> None:
        """Decide every handshake that waits."""
        while self.socket.poll(0):
            version, request, _, address, _, mechanism, *credentials = self.socket.recv_multipart()
            key = z85.encode(credentials[0]) if mechanism == b"CURVE" and credentials else b""
            name = self._names().get(key)
            status, text = (b"200", b"OK") if name is not None else (b"400", b"not listed")
            if name is None and key not in self._refused and len(self._refused) < _MAX_LOGGED:
                self._refused.add(key)  # it will try again and again
                _log.warning("a client at %s was refused: key %s is not listed", address.decode(), key.decode())
            self.socket.send_multipart([version, request, status, text, (name or "").encode(), b""])

    def _names(self) -> dict[bytes, str]:
        """Who is listed now; while the folder cannot be read, nobody."""
        try:
            self._clients.stat()  # a folder that is not there would be an empty list
            files = {path: path.stat().st_mtime_ns for path in sorted(self._clients.glob("*.key"))}
            if files != self._files:
                self._listed = {_load_public(path): path.stem for path in files}
                self._files = files
        except (OSError, ConfigError) as error:
            self._listed, self._files = {}, {}
            _log.warning("no client is let in: %s", error)
        return self._listed


def name_of_key(part: zmq.Frame) -> str | None:
    """Under which name the sender's key is listed; None if it did not come by tcp: nobody asked for a key."""
    try:
        return str(part.get("User-Id"))
    except zmq.ZMQError:
        return None


def check_endpoint(endpoint: str, keys: ClientKeys | None) -> None:
    """Raise ConfigError for tcp without keys, since there is no plain tcp, and for what is no endpoint."""
    if not endpoint.startswith(("ipc://", "tcp://")):
        raise ConfigError(f"{endpoint!r} is no endpoint: expected ipc://PATH or tcp://HOST:PORT", param="--connect")
    if endpoint.startswith("tcp://") and keys is None:
        raise ConfigError(f"needed for {endpoint}: tcp is encrypted, and open to clients with listed keys", param=_FLAG)


def secure_client(socket: zmq.Socket[bytes], endpoint: str, keys: ClientKeys) -> None:
    """Give a socket that will connect to a tcp endpoint its keys."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RETRY_MS)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
