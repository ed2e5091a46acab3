"""How peers come to be: memory that all ranks of a host share, and the proof that sums and logits come out of it right.

Called by `executor.model` at start, on every rank alike. While it is not known that the memory works nothing waits for
ever: what is not proven is not used, and NCCL does its work. No multicast: where torch would set it up along with the
memory, this is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F

from executor.linear import Linear, SkinnyLinears
from executor.peers import FOR_EVER, Peers, Place, bytes_of
from executor.ranks import Ranks

_MULTICAST_OFF: Final = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
_MAX_BYTES: Final = 4 << 20  # of a rank's peers' rows in one sum; beyond, sharing the work out wins
_MAX_ROWS: Final = 256
_PATIENCE: Final = 1 << 24  # looks, some seconds
_EPS: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Senders:
    """What of a decoder writes to peers."""

    skinny: SkinnyLinears
    linear: Linear  # one of those whose rows are summed
    head: Linear
    features: int | None  # of all ranks' logits, if each has a share of them

    @property
    def share(self) -> int:
        """Features of one rank's logits; 0 if it has them all."""
        return 0 if self.features is None else self.head.n


def open_peers(ranks: Ranks, senders: Senders) -> tuple[Peers | None, str]:
    """The peers, or None and why not. All ranks come to the same answer."""
    reason = "" if os.environ.get(_MULTICAST_OFF) == "1" else f"{_MULTICAST_OFF}=1 is not set"
    peers = None
    if ranks.agree(not reason):
        try:
            peers = _meet(ranks, senders)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if ranks.agree(peers is not None):
            assert peers is not None, "agreed"
            wrong = prove(peers, ranks, senders)
            if ranks.agree(not wrong):
                return peers, ""
            reason = wrong
    return None, reason or "it does not work on another rank"


def _meet(ranks: Ranks, senders: Senders) -> Peers:
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    module: Any = symmetric  # untyped in part
    width, share, dtype = senders.linear.n, senders.share, senders.linear.weight.dtype
    rows = min(_MAX_ROWS, _MAX_BYTES // (width * dtype.itemsize * (ranks.size - 1)))
    memory = module.empty(bytes_of(rows, width, share, dtype, ranks.size), dtype=torch.uint8, device=ranks.device)
    memory.zero_()
    torch.cuda.synchronize(ranks.device)
    shared = module.rendezvous(memory, dist.group.WORLD)
    return Peers(ranks.rank, memory, shared.buffer_ptrs, rows=rows, width=width, share=share, dtype=dtype)


def prove(peers: Peers, ranks: Ranks, senders: Senders, patience: int = _PATIENCE) -> str:
    """Run all that waits for peers and compare with what NCCL makes of it; what is wrong, or nothing."""
    peers.patience = 0
    # Once without waiting for anyone, so that no rank waits while another one compiles.
    _all_pairs(peers, ranks, senders, (1,), (1,))
    ranks.agree(True)
    peers.patience = patience
    limit = 4 * torch.finfo(senders.linear.weight.dtype).eps
    wrong = ""
    for ours, theirs in _all_pairs(peers, ranks, senders, (1, peers.max_rows, 3, peers.max_rows), (1, 3)):
        difference = ((ours.float() - theirs).norm() / theirs.norm()).item()
        if not difference <= limit:  # to the end all the same: the other ranks sum with this one
            wrong = f"sums differ from NCCL's by {difference:.2g} of their norm, the limit is {limit:.2g}"
    peers.patience = FOR_EVER
    return wrong


_Pair = tuple[torch.Tensor, torch.Tensor]  # what came by peers, and the same by NCCL


def _all_pairs(
    peers: Peers, ranks: Ranks, senders: Senders, sums: Sequence[int], products: Sequence[int]
) -> list[_Pair]:
    """For so many rows each."""
    return [*_sums(peers, ranks, sums), *_products(peers, ranks, senders, products)]


def _sums(peers: Peers, ranks: Ranks, counts: Sequence[int]) -> Iterator[_Pair]:
    """Rows that the sum itself sends, in every place."""
    random = torch.Generator(ranks.device).manual_seed(ranks.rank)
    for count in counts:
        for place in Place:
            rows = peers.rows(count)
            rows.copy_(torch.randn(rows.shape, generator=random, device=ranks.device))
            summed = ranks.sum(rows.to(torch.float32, copy=True))
            x, gain, normed = _blank(rows)
            peers.add_norm(place, x, gain, _EPS, normed, sends=True, pdl=False)
            yield x, summed
            yield normed, _normed(summed)


def _products(peers: Peers, ranks: Ranks, senders: Senders, counts: Sequence[int]) -> Iterator[_Pair]:
    """Rows and logits that products send."""
    random = torch.Generator(ranks.device).manual_seed(ranks.rank)
    skinny, linear, head = senders.skinny, senders.linear, senders.head
    for count in counts:
        skinny.begin()
        peers.begin()
        y = _inputs(linear, count, random)
        summed = ranks.sum(F.linear(y, linear.weight).float())
        x, gain, normed = _blank(peers.rows(count))
        # As in a step, nothing stands between the product and what waits for its rows.
        skinny.send(linear, y, peers.sink(Place.MLP))
        peers.add_norm(Place.MLP, x, gain, _EPS, normed, sends=False, pdl=skinny.pdl)
        yield x, summed
        yield normed, _normed(summed)
        if senders.features is not None:
            y = _inputs(head, count, random)
            gathered = ranks.gather(F.linear(y, head.weight), senders.features)
            skinny.send(head, y, peers.logits)
            yield peers.gather(count, senders.features, skinny.pdl), gathered.float()


def _inputs(linear: Linear, count: int, random: torch.Generator) -> torch.Tensor:
    x = torch.randn(count, linear.k, generator=random, device=linear.weight.device)
    return x.to(linear.weight.dtype)


def _blank(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A residual of zeros, a gain of ones, and room for normed rows."""
    return torch.zeros_like(rows), torch.ones_like(rows[0]), torch.empty_like(rows)


def _normed(rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + _EPS)
