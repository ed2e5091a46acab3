"""The ranks of one executor as one of them sees them: what they sum and gather on the device, what they agree on.

Owns the process group: NCCL between GPUs, gloo between CPUs; on one host by its loopback interface, else by the one
that leads to rank 0. Opened by the executor process before the model is loaded; used by the shards of the model on the
compute stream. Every rank runs the same plans, so each call here is met by the same call of all others; one that dies
leaves them waiting or raises in them, and the launcher ends them all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from ipc.config import EngineConfig, ExecutorChannels

# Of rendezvous, and of what runs eagerly at start. A step that hangs is the watchdog's.
_LIMIT: Final = timedelta(minutes=10)
_SIOCGIFADDR: Final = 0x8915  # of Linux: the IPv4 address of an interface
_HANDLE: Final = "tandem_ranks"  # attribute of a handle: the Ranks it stands for

_TORCH_LIBRARY: Final[Any] = torch.library  # untyped
_DIST: Final[Any] = dist  # untyped in part
_OPERATORS: Final = _TORCH_LIBRARY.Library("tandem", "FRAGMENT")


class Ranks:
    """This rank and its peers."""

    def __init__(self, rank: int, size: int, rendezvous: int, device: torch.device, store: str = "") -> None:
        """`rendezvous`: a memory file that all of them hold, empty before the first one opens it. With `store`,
        HOST:PORT, they are on several hosts, and it is rank 0's listener there."""
        self.rank, self.size, self.device = rank, size, device
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_open_tcp(store, rank, size, rendezvous) if store else _open_file(rendezvous, size),
            rank=rank,
            world_size=size,
            timeout=_LIMIT,
        )
        self._gather: Callable[..., Any] = getattr(_DIST, "all_gather_single", dist.all_gather_into_tensor)
        self.handle = torch.empty(1, device=device)  # stands for this object in compiled code
        setattr(self.handle, _HANDLE, self)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, the same bits on all of them; `x` itself may hold it."""
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def gather(self, x: torch.Tensor, features: int) -> torch.Tensor:
        """Columns of all ranks side by side: [..., share] -> [..., features]. What shares hold beyond it is dropped."""
        rows = x.reshape(-1, x.shape[-1])
        parts = rows.new_empty(self.size * len(rows), rows.shape[1])
        self._gather(parts, rows.contiguous())
        joined = parts.view(self.size, len(rows), -1).movedim(0, 1).reshape(len(rows), -1)
        return joined[:, :features].contiguous().view(*x.shape[:-1], features)

    def least(self, number: int) -> int:
        """The smallest of every rank's `number`. On the host: for the start only."""
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def agree(self, holds: bool) -> bool:
        """Whether it holds on every rank."""
        return self.least(int(holds)) == 1


def open_ranks(config: EngineConfig, channels: ExecutorChannels, device: torch.device) -> Ranks | None:
    """None for an executor of one rank."""
    if config.ranks == 1:
        return None
    return Ranks(channels.rank, config.ranks, channels.rendezvous, device, channels.store)


def _open_file(fd: int, size: int) -> Any:
    _talk_by("lo")  # nothing listens beyond the host
    return _DIST.FileStore(f"/proc/self/fd/{fd}", size)


def _open_tcp(store: str, rank: int, size: int, listener: int) -> Any:
    host, _, port = store.rpartition(":")
    host = host.strip("[]")
    _talk_by(_interface_to(host, int(port)))
    own = None if rank else listener
    return _DIST.TCPStore(host, int(port), size, rank == 0, _LIMIT, master_listen_fd=own)


def _talk_by(interface: str) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ():
        os.environ.setdefault(variable, interface)


def _interface_to(host: str, port: int) -> str:
    """The network interface by which this host reaches that one; "" if it has no IPv4 address, or none is found."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # it has no address
                    found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                    if found[20:24] == own:
                        return name
    except OSError:
        pass
    return ""


def _sum(x: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    """Ranks.sum as an operator that a compiler takes as it is; `x` is left alone, as its contract wants."""
    ranks: Ranks = getattr(handle, _HANDLE)
    return ranks.sum(x.clone())


def _gather(x: torch.Tensor, handle: torch.Tensor, features: int) -> torch.Tensor:
    ranks: Ranks = getattr(handle, _HANDLE)
    return ranks.gather(x, features)


_OPERATORS.define("rank_sum(Tensor x, Tensor handle) -> Tensor")
_OPERATORS.define("rank_gather(Tensor x, Tensor handle, int features) -> Tensor")
_OPERATORS.impl("rank_sum", _sum, "CompositeExplicitAutograd")
_OPERATORS.impl("rank_gather", _gather, "CompositeExplicitAutograd")
torch.library.register_fake("tandem::rank_sum", lambda x, handle: torch.empty_like(x), lib=_OPERATORS)
torch.library.register_fake(
    "tandem::rank_gather", lambda x, handle, features: x.new_empty(*x.shape[:-1], features), lib=_OPERATORS
)
