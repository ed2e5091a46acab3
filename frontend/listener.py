"""Listening sockets of those who start servers: bound before anything slow, so that a taken port is known at once.

Called by `engine-launch` and `engine-frontend`. Must never accept a connection.
"""

from __future__ import annotations

import errno
import os
import socket
import stat

from ipc.errors import ConfigError


def bind_http(host: str, port: int, uds: str | None) -> socket.socket:
    """The listening HTTP socket; requests queue in it until a frontend accepts. Raises ConfigError naming the flag."""
    if uds is not None:
        return _bind_unix(uds)
    return bind_tcp(host, port, "--host", "--port")


def bind_tcp(host: str, port: int, host_flag: str, port_flag: str) -> socket.socket:
    """A listening socket. Raises ConfigError naming the flag at fault."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"cannot resolve {host!r}: {error}", param=host_flag) from error
    family, kind, _, _, address = found[0]
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        flag = host_flag if error.errno == errno.EADDRNOTAVAIL else port_flag
        raise ConfigError(
            f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}", param=flag
        ) from error
    return listener


def _bind_unix(path: str) -> socket.socket:
    if not path:  # the kernel would choose a name that nobody knows
        raise ConfigError("is empty", param="--uds")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
            os.unlink(path)  # left behind by a process that was killed
        listener.bind(path)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error}", param="--uds") from error
    return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


def url_of(listener: socket.socket) -> str:
    """Where clients reach the API, with the port the system chose for port 0."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if listener.family == socket.AF_INET6 else f"http://{host}:{port}/v1"
