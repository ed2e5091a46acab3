"""ZMQ sockets with the options this project relies on, and the private directory of its ipc endpoints.

Facts these options answer: a ROUTER past its high-water mark drops silently unless ROUTER_MANDATORY is set; a second
process may bind an ipc path and steal it, so the directory is fresh and 0700; LINGER would keep a dying process alive.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

import zmq

from ipc.auth import ClientKeys, check_endpoint, secure_client
from ipc.errors import ConfigError
from ipc.schema import MAX_MESSAGE_BYTES, Message, encode

_PREFIX: Final = "tandem-ipc-"
_SOCKET: Final = re.compile(r"frontend\.sock|[rc]\d+\.sock")
_LONGEST: Final = "frontend.sock"
_ADDRESS_BYTES: Final = 107  # of a unix socket
HIGH_WATER_MARK: Final = 1000  # messages a peer may fall behind before sends to it raise zmq.Again
_RECONNECT_MS: Final = (20, 500)  # the first wait for a peer that is gone, doubled up to the second


def _configure(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)


def bind_router(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """ROUTER at `endpoint`, for `send_to`."""
    socket = make_router(context)
    socket.bind(endpoint)
    return socket


def make_router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """The same, bound nowhere yet."""
    socket = context.socket(zmq.ROUTER)
    _configure(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects keeps its identity and its requests
    return socket


def send_to(router: zmq.Socket[bytes], identity: bytes, message: Message) -> bool | None:
    """Without waiting: True if sent, False if the peer's socket is full, None if there is no such peer."""
    try:
        router.send_multipart([identity, encode(message)], zmq.NOBLOCK)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno != zmq.EHOSTUNREACH:
            raise
        return None
    return True


def connect_dealer(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes, keys: ClientKeys | None = None
) -> zmq.Socket[bytes]:
    """DEALER to `endpoint`. `identity` must be unguessable: whoever knows it receives this peer's messages.

    Raises ConfigError for a tcp endpoint without keys, and for one that is not well-formed.
    """
    check_endpoint(endpoint, keys)
    socket = context.socket(zmq.DEALER)
    _configure(socket)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS[0])
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS[1])
    try:
        if endpoint.startswith("tcp://") and keys is not None:
            secure_client(socket, endpoint, keys)
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"cannot connect to {endpoint}: {error}", param="--connect") from error
    return socket


def new_identity() -> bytes:
    """16 random bytes after a zero-free first byte (ZMQ reserves identities that start with zero)."""
    return b"t" + os.urandom(16)


class EndpointDirectory:
    """A fresh directory, mode 0700, that holds this engine's ipc sockets; removed on close.

    It is locked for as long as its owner lives, so what a killed owner left is known for it and removed by the next
    engine. Raises ConfigError if the folder for temporary files has too long a path for a unix socket's address.
    """

    def __init__(self) -> None:
        folder = Path(tempfile.gettempdir())
        needed = len(os.fsencode(folder / f"{_PREFIX}12345678" / _LONGEST))
        if needed > _ADDRESS_BYTES:
            raise ConfigError(
                f"sockets in {folder} have paths of {needed} bytes, a unix socket's address holds {_ADDRESS_BYTES}",
                param="TMPDIR",
            )
        _remove_abandoned(folder)
        made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        self._lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # It gets the name that others look for only once it is locked.
        self.path = made.rename(made.with_name(made.name[1:]))
        self.frontend = f"ipc://{self.path}/frontend.sock"  # the engine's: that of its directory

    def replica(self, number: int) -> tuple[str, str]:
        """The endpoints of a replica's scheduler: for frontends, and for launcher and executor."""
        return f"ipc://{self.path}/r{number}.sock", f"ipc://{self.path}/c{number}.sock"

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned(folder: Path) -> None:
    """Remove endpoint directories of this user whose owner is gone; whatever else bears such a name keeps its files."""
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # of another user, or just removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_uid == os.getuid() and all(map(_SOCKET.fullmatch, os.listdir(lock))):
                for name in os.listdir(lock):
                    os.unlink(name, dir_fd=lock)
                path.rmdir()
        except BlockingIOError:
            continue  # in use
        finally:
            os.close(lock)
