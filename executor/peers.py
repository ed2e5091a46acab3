"""Sums over the ranks of one host without a library: each GPU writes its rows into the memory of the others.

Owns that memory. Made by `executor.peer_start` for the fused decoder where it is possible and proves right; else sums
are NCCL's.

Rows arrive in one of three places, taken in turn (the embedding's, those after attention, those after the MLP), and at
the end of a step each rank's share of the logits in a fourth. A rank writes to a place again only after it has got
every peer's rows for the next place, and a peer sends those only when its kernels that read the first place are done:
so nothing is overwritten while it is read, and nobody waits twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, Final

import torch
import triton

from executor.layer_launch import LayerLaunch
from executor.peer_kernels import gather_kernel, sum_norm_kernel

LOGIT_ROWS: Final = 64  # whose logits are gathered; of more the memory would be large
_PIECES: Final = 8  # of a row's logits, gathered by a program each
_GATHER_BLOCK: Final = 1024  # words at once
FOR_EVER: Final = -1  # how patient a kernel is with its peers, once they are known to write


class Place(IntEnum):
    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2


@dataclass(frozen=True, slots=True)
class Sink:
    """Where a product writes its rows instead of to its own GPU alone: `peer_kernels.send_tile`."""

    addresses: torch.Tensor  # int64 [ranks]: each rank's memory
    turns: torch.Tensor
    turns_at: int
    place: int  # of this rank's words in every memory, in bytes


class Peers:
    """This rank's end: where to write rows, and the kernel that sums all ranks' into the residual and norms it."""

    def __init__(
        self,
        rank: int,
        memory: torch.Tensor,
        addresses: Sequence[int],
        *,
        rows: int,
        width: int,
        share: int,
        dtype: torch.dtype,
    ) -> None:
        """`memory` uint8, zeroed, as long as `bytes_of` says; `addresses`: where each rank's is, seen from here.
        `share`: of the logits, 0 if they are not gathered."""
        self._rank, self._size = rank, len(addresses)
        self.max_rows, self._width = rows, width
        self._sender_bytes = _sender_bytes(rows, width, dtype)
        self._partial = torch.empty(rows, width, dtype=dtype, device=memory.device)
        self._turns = torch.zeros(len(Place) * rows + _PIECES * LOGIT_ROWS, dtype=torch.int32, device=memory.device)
        self._memory = memory
        self._kernel = LayerLaunch(sum_norm_kernel)
        self._addresses = torch.tensor(list(addresses), dtype=torch.int64, device=memory.device)
        self._sinks = [
            Sink(self._addresses, self._turns, place * rows, (place * self._size + rank) * self._sender_bytes)
            for place in Place
        ]
        self._share, self._share_bytes = share, _sender_bytes(LOGIT_ROWS, share, dtype)
        self._logits_at = len(Place) * self._size * self._sender_bytes
        self.logits = Sink(
            self._addresses, self._turns, len(Place) * rows, self._logits_at + rank * self._share_bytes
        )  # each rank's share, ahead of `gather`
        self.patience = FOR_EVER

    def rows(self, count: int) -> torch.Tensor:
        """[count, width], to be written by the kernel ahead of `add_norm`, which sends them."""
        return self._partial[:count]

    def sink(self, place: Place) -> Sink:
        """To be written to by the product ahead of `add_norm`, in place of `rows`."""
        return self._sinks[place]

    def add_norm(
        self, place: Place, x: torch.Tensor, gain: torch.Tensor, eps: float, normed: torch.Tensor, *, sends: bool,
        pdl: bool,
    ) -> None:  # fmt: skip
        """x [rows, width] += the sum of every rank's `rows`; normed = x / rms(x) * gain. `sends`: they are not in the
        place's `sink` yet."""
        arguments = (
            self._addresses, self._partial, self._turns, x, gain, normed, eps, place * self.max_rows,
            place * self._size * self._sender_bytes, self._sender_bytes, self.patience,
        )  # fmt: skip
        self._kernel((len(x), 1, 1), arguments, _options(self._rank, self._size, self._width, sends, pdl))

    def gather(self, rows: int, features: int, pdl: bool) -> torch.Tensor:
        """[rows, features] of every rank's share, which each has written to `logits`."""
        out = self._partial.new_empty(rows, features)
        gather_kernel[rows, _PIECES](
            self._addresses, self._turns, out, features, self.logits.turns_at, LOGIT_ROWS, self._logits_at,
            self._share_bytes, self.patience,
            rank=self._rank, size=self._size, share=self._share, block=_GATHER_BLOCK, pdl=pdl, num_warps=4,
            launch_pdl=pdl,
        )  # fmt: skip
        return out

    def begin(self) -> None:
        """A new step."""
        self._kernel.begin()


@cache
def _options(rank: int, size: int, width: int, sends: bool, pdl: bool) -> dict[str, Any]:
    return {
        "rank": rank,
        "size": size,
        "width": width,
        "width_pad": triton.next_power_of_2(width),
        "sends": sends,
        "pdl": pdl,
        "num_warps": 8 if width <= 2048 else 16,
        "launch_pdl": pdl,
    }


def _sender_bytes(rows: int, width: int, dtype: torch.dtype) -> int:
    """What one rank's rows take at one place: every four bytes come with the turn."""
    return rows * width * dtype.itemsize * 2


def bytes_of(rows: int, width: int, share: int, dtype: torch.dtype, size: int) -> int:
    """Memory of one rank."""
    return size * (len(Place) * _sender_bytes(rows, width, dtype) + _sender_bytes(LOGIT_ROWS, share, dtype))
