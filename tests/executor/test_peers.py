"""Rows of two ranks meet in each other's memory, here of one device; by turns, since one process does both."""

from __future__ import annotations

import pytest
import torch

from tests.executor.fused_model import INTERPRET, ON_GPU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU and not INTERPRET, reason="needs a CUDA device, or triton and TRITON_INTERPRET=1"),
]
DEVICE = "cuda" if ON_GPU else "cpu"
ROWS, EPS = 3, 1e-6
LOOKS = 1000  # by turns all that is waited for is there: a row sent wrong must fail its test, not stop it


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_rank_sums_what_it_has_with_what_it_was_sent(width: int, dtype: torch.dtype) -> None:
    from executor.peers import Peers, Place, bytes_of

    size = bytes_of(ROWS, width, 0, dtype, 2)
    memories = [torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    addresses = [memory.data_ptr() for memory in memories]
    one, other = (Peers(i, memories[i], addresses, rows=ROWS, width=width, share=0, dtype=dtype) for i in range(2))
    other.patience = LOOKS
    random = torch.Generator().manual_seed(width)
    for place in (*Place, *Place):
        rows = torch.randn(2, ROWS, width, generator=random).to(dtype)
        x, gain = torch.randn(ROWS, width, generator=random).to(dtype), torch.randn(width, generator=random).to(dtype)
        one.patience = 0  # sends, and does not wait for what the other one sends only then
        add_norm(one, place, rows[0], x, gain)
        got = add_norm(other, place, rows[1], x, gain)
        one.patience = LOOKS
        one._turns -= (torch.arange(len(one._turns), device=DEVICE) // ROWS == place).int()
        again = add_norm(one, place, rows[0], x, gain)
        total = x.float() + rows[0].float() + rows[1].float()
        normed = total * torch.rsqrt(total.square().mean(1, keepdim=True) + EPS) * gain.float()
        near = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-5}
        for summed, norm in (got, again):
            torch.testing.assert_close(summed.cpu().float(), total, **near)
            torch.testing.assert_close(norm.cpu().float(), normed, **near)
        assert torch.equal(got[1], again[1]), "ranks disagree"


@pytest.mark.parametrize("pdl", [False, pytest.param(True, marks=pytest.mark.skipif(not ON_GPU, reason="on a GPU"))])
def test_products_are_sent_and_summed_or_gathered(pdl: bool) -> None:
    from executor.linear import Linear, SkinnyLinears, has_pdl
    from executor.peers import Peers, Place, bytes_of

    # The interpreter's products know no bfloat16.
    dtype, width, inner = torch.bfloat16 if ON_GPU else torch.float32, 128, 256
    if pdl and not has_pdl(torch.device(DEVICE)):
        pytest.skip("needs programmatic dependent launch")
    share, room = 192, 70  # rows of more than one tile
    size = bytes_of(room, width, share, dtype, 2)
    memories = [torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    addresses = [memory.data_ptr() for memory in memories]
    ranks = [Peers(i, memories[i], addresses, rows=room, width=width, share=share, dtype=dtype) for i in range(2)]
    for peers in ranks:
        peers.patience = LOOKS
    linears = [Linear((torch.randn(width, inner, device=DEVICE) / inner**0.5).to(dtype)) for _ in ranks]
    heads = [Linear((torch.randn(share, inner, device=DEVICE) / inner**0.5).to(dtype)) for _ in ranks]
    skinny = SkinnyLinears([*linears, *heads], torch.device(DEVICE))
    skinny.pdl = pdl
    for turn, place in enumerate((*Place, *Place, *Place)):
        rows = room if turn == 4 else 1 + turn % ROWS
        inputs = torch.randn(2, rows, inner, device=DEVICE).to(dtype)
        x, gain = torch.randn(rows, width, device=DEVICE).to(dtype), torch.randn(width, device=DEVICE).to(dtype)
        for peers, linear, y in zip(ranks, linears, inputs, strict=True):
            skinny.send(linear, y, peers.sink(place))
        got = []
        for peers in ranks:
            summed, normed = x.clone(), torch.full_like(x, torch.nan)
            peers.add_norm(place, summed, gain, EPS, normed, sends=False, pdl=pdl)
            got.append((summed, normed))
        total = x.double() + sum(
            y.double() @ linear.weight.double().T for linear, y in zip(linears, inputs, strict=True)
        )
        want = total * torch.rsqrt(total.square().mean(1, keepdim=True) + EPS) * gain.double()
        for summed, normed in got:
            assert ((summed - total).norm() / total.norm()).item() < 8 * torch.finfo(dtype).eps
            assert ((normed - want).norm() / want.norm()).item() < 8 * torch.finfo(dtype).eps
        assert torch.equal(got[0][1], got[1][1]), "ranks disagree"
        if place is Place.MLP:  # a step ends
            for peers, head in zip(ranks, heads, strict=True):
                skinny.send(head, inputs[0], peers.logits)
            features = 2 * share - 30  # what the shares hold beyond is padding
            logits = [peers.gather(rows, features, pdl) for peers in ranks]
            want = torch.cat([inputs[0].double() @ head.weight.double().T for head in heads], 1)[:, :features]
            assert ((logits[0] - want).norm() / want.norm()).item() < 8 * torch.finfo(dtype).eps
            assert torch.equal(*logits), "ranks disagree"


def add_norm(
    peers: object, place: object, rows: torch.Tensor, x: torch.Tensor, gain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from executor.peers import Peers, Place

    assert isinstance(peers, Peers) and isinstance(place, Place)
    peers.rows(len(rows)).copy_(rows)
    summed = x.to(DEVICE, copy=True)
    normed = torch.full_like(summed, torch.nan)
    peers.add_norm(place, summed, gain.to(DEVICE), EPS, normed, sends=True, pdl=False)
    return summed, normed
