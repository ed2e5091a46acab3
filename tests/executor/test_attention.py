"""Every attention backend against a plain float32 softmax, on fresh random pages, lengths and block tables.

The Triton backend runs on a GPU, or on the CPU under TRITON_INTERPRET=1 where triton is installed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from executor.attention import AttentionBackend, LayerSpec, PagedLayer
from executor.attention.sdpa import SdpaBackend
from executor.inputs import StepInputs

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
_TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(
    not torch.cuda.is_available() and not _INTERPRET, reason="needs a CUDA device, or triton and TRITON_INTERPRET=1"
)
_MAX_ROWS = 320
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_spec(
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> LayerSpec:
    return LayerSpec(*heads, *dims, dtype, 0.7 * dims[0] ** -0.5, window, softcap, sinks)


@dataclass
class Case:
    inputs: StepInputs
    layer: PagedLayer
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sinks: torch.Tensor | None
    expected: torch.Tensor  # float32 [tokens, q_heads, v_dim]


def make_case(
    spec: LayerSpec,
    rows: list[tuple[int, int]],  # (kv_len, query_len), rows of one token first
    *,
    block_size: int = 16,
    device: torch.device | None = None,
    seed: int = 0,
) -> Case:
    """Random pages in random order; keys and values of the step's own tokens are passed, not in the pages yet."""
    device = device or torch.device("cpu")
    random = torch.Generator().manual_seed(seed)
    pages_per_row = max(-(-kv // block_size) for kv, _ in rows)
    num_blocks = 1 + sum(-(-kv // block_size) for kv, _ in rows)
    order = (torch.randperm(num_blocks - 1, generator=random) + 1).tolist()
    slots = torch.randperm(len(rows) + 3, generator=random)[: len(rows)]
    table = torch.zeros(len(rows) + 3, pages_per_row, dtype=torch.int32)
    caches = [torch.randn(num_blocks, block_size, spec.kv_heads, d, generator=random) for d in (spec.k_dim, spec.v_dim)]
    caches = [cache.to(spec.dtype) for cache in caches]
    tokens = sum(n for _, n in rows)
    query = torch.randn(1, tokens, spec.q_heads, spec.k_dim, generator=random).to(spec.dtype)
    key = torch.empty(tokens, spec.kv_heads, spec.k_dim, dtype=spec.dtype)
    value = torch.empty(tokens, spec.kv_heads, spec.v_dim, dtype=spec.dtype)
    sinks = torch.randn(spec.q_heads, generator=random).to(spec.dtype) if spec.has_sinks else None
    expected, mapping, starts = [], [], [0]
    for row, (kv_len, query_len) in enumerate(rows):
        for page in range(-(-kv_len // block_size)):
            table[slots[row], page] = order.pop()
        position = torch.arange(kv_len)
        place = table[slots[row], position // block_size].long() * block_size + position % block_size
        keys, values = (cache.flatten(0, 1)[place].float() for cache in caches)
        start, stop = starts[-1], starts[-1] + query_len
        key[start:stop], value[start:stop] = keys[-query_len:].to(spec.dtype), values[-query_len:].to(spec.dtype)
        expected.append(reference(spec, query[0, start:stop].float(), keys, values, sinks))
        mapping.append(place[-query_len:])
        starts.append(stop)
    slot_mapping = torch.cat(mapping)
    for cache in caches:
        cache.flatten(0, 1)[slot_mapping] = 0
    kv_len = torch.tensor([kv for kv, _ in rows], dtype=torch.int32)
    inputs = StepInputs(
        num_rows=len(rows),
        num_decode=sum(n == 1 for _, n in rows),
        num_prefill=sum(n > 1 for _, n in rows),
        num_tokens=tokens,
        counts=torch.tensor([len(rows), sum(n == 1 for _, n in rows)], dtype=torch.int32, device=device),
        token_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.zeros(tokens, dtype=torch.int64, device=device),
        slot_mapping=slot_mapping.to(device),
        row_slot=slots.to(device),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        kv_len=kv_len.to(device),
        last_index=torch.tensor(starts[1:], device=device) - 1,
        block_table=table.to(device),
    )
    layer = PagedLayer(spec, caches[0].to(device), caches[1].to(device))
    # Heads before tokens in memory, as rotary embeddings leave them.
    query, key, value = (x.to(device).transpose(0, 1).contiguous().transpose(0, 1) for x in (query[0], key, value))
    return Case(inputs, layer, query, key, value, None if sinks is None else sinks.to(device), torch.cat(expected))


def reference(
    spec: LayerSpec, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """float32 [query_len, q_heads, v_dim] for the last `query_len` positions of `keys`."""
    query_len, kv_len = query.shape[0], keys.shape[0]
    position = torch.arange(kv_len - query_len, kv_len)[:, None]
    key = torch.arange(kv_len)[None, :]
    visible = (key <= position) & (key > position - (spec.window or kv_len + 1))
    scores = torch.einsum("qhd,khd->hqk", query, keys.repeat_interleave(spec.group, 1)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, query_len, 1)], -1)
    weights = scores.softmax(-1)[..., :kv_len]
    return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(spec.group, 1))


def check(backend: AttentionBackend, case: Case) -> None:
    backend.begin(case.inputs)
    out = backend.attend(case.layer, case.query, case.key, case.value, case.sinks)
    worst = (out.float().cpu() - case.expected).abs().max().item()
    assert worst <= _TOLERANCE[case.layer.spec.dtype] * max(1.0, case.expected.abs().max().item()), worst
    for cache, new in ((case.layer.k_cache, case.key), (case.layer.v_cache, case.value)):
        assert torch.equal(cache.flatten(0, 1)[case.inputs.slot_mapping], new)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh memory is NaN, so a lane that is never written fails the test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


ROWS = {
    "decode": [(1, 1), (15, 1), (16, 1), (17, 1), (33, 1), (100, 1)],
    "prefill": [(2, 2), (16, 16), (17, 5), (64, 31), (70, 70)],
    "mixed": [(5, 1), (48, 1), (129, 1), (9, 9), (40, 8)],
}
SPECS = {
    "plain": make_spec(),
    "one_head_each": make_spec(heads=(3, 3)),
    "odd_group": make_spec(heads=(6, 2), dims=(64, 64)),
    "wide_group": make_spec(heads=(16, 1), dims=(16, 16)),
    "padded_dim": make_spec(heads=(10, 2), dims=(80, 80)),
    "two_dims": make_spec(dims=(48, 32)),
    "window": make_spec(window=8),
    "window_of_a_page": make_spec(window=16),
    "softcap": make_spec(softcap=5.0),
    "softcap_window": make_spec(softcap=5.0, window=21),
    "sinks": make_spec(sinks=True),
    "sinks_window": make_spec(sinks=True, window=9, heads=(8, 1)),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_sdpa_matches_reference(spec: LayerSpec, rows: list[tuple[int, int]]) -> None:
    check(SdpaBackend([spec], 16), make_case(spec, rows))


@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_sdpa_block_sizes(block_size: int) -> None:
    spec = make_spec(window=20)
    check(SdpaBackend([spec], block_size), make_case(spec, ROWS["mixed"], block_size=block_size))


def test_sdpa_keeps_layers_of_two_kinds_apart() -> None:
    """Layers of one model share a step but not a mask."""
    full, windowed = make_spec(), make_spec(window=8)
    backend = SdpaBackend([full, windowed], 16)
    for spec in (full, windowed, full):
        check(backend, make_case(spec, ROWS["mixed"]))


def _faulty(case: Case) -> torch.Tensor:
    """Make the last row's own keys and values NaN and infinite; returns the tokens of the other rows."""
    last = int(case.inputs.query_start[-2])
    case.key[last:], case.value[last:] = float("nan"), float("inf")
    return torch.arange(last)


def test_sdpa_pages_stay_finite() -> None:
    case = make_case(make_spec(), ROWS["mixed"])
    others = _faulty(case)
    backend = SdpaBackend([case.layer.spec], 16)
    backend.begin(case.inputs)
    out = backend.attend(case.layer, case.query, case.key, case.value, None)
    assert case.layer.k_cache.isfinite().all()
    assert case.layer.v_cache.isfinite().all()
    assert torch.allclose(out[others], case.expected[others], atol=2e-5)


def triton_backend(spec: LayerSpec, block_size: int = 16, max_rows: int = _MAX_ROWS) -> AttentionBackend:
    from executor.attention.triton import TritonBackend

    return TritonBackend([spec], block_size, max_rows, _TRITON_DEVICE)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_triton_matches_reference(spec: LayerSpec, rows: list[tuple[int, int]]) -> None:
    check(triton_backend(spec), make_case(spec, rows, device=_TRITON_DEVICE))


@pytest.mark.gpu
@needs_triton
def test_triton_long_rows_are_split_and_joined() -> None:
    """Few rows, far longer than a chunk: every row takes the combine kernel, with and without a sink or a window."""
    rows = [(1, 1), (700, 1), (1025, 1), (127, 1), (128, 1), (129, 1)]
    for spec in (make_spec(), make_spec(sinks=True), make_spec(window=900, softcap=4.0)):
        backend = triton_backend(spec, max_rows=8)
        check(backend, make_case(spec, rows, device=_TRITON_DEVICE))
        work = backend._work[spec.window, spec.kv_heads]  # type: ignore[attr-defined]
        row, *_, splits = work.items[work.items[:, 0] >= 0].T
        assert int(splits.max()) > 1
        assert torch.equal(row.bincount()[row], splits)


def with_room(case: Case, rows: int, decode: int, prefill: int, tokens: int) -> StepInputs:
    """The case's inputs as a CUDA graph has them: the host's numbers say more than there is, the rest is padding."""
    inputs, null_slot = case.inputs, len(case.inputs.block_table) - 1
    table = torch.cat((inputs.block_table, torch.zeros_like(inputs.block_table[:1])))

    def pad(x: torch.Tensor, size: int, value: int) -> torch.Tensor:
        return torch.cat((x, x.new_full((size - len(x),), value)))

    return StepInputs(
        num_rows=rows,
        num_decode=decode,
        num_prefill=prefill,
        num_tokens=tokens,
        counts=inputs.counts,
        token_ids=pad(inputs.token_ids, tokens, 0),
        positions=pad(inputs.positions, tokens, 0),
        slot_mapping=pad(inputs.slot_mapping, tokens, 0),
        row_slot=pad(inputs.row_slot, rows, null_slot + 1),
        query_start=pad(inputs.query_start, rows + 1, inputs.num_tokens),
        kv_len=pad(inputs.kv_len, rows, 0),
        last_index=pad(inputs.last_index, rows, 0),
        block_table=table,
        has_exact_rows=False,
    )


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("rows", [*ROWS.values(), [(2000, 1), (70, 70), (300, 5)]], ids=[*ROWS, "long"])
@pytest.mark.parametrize("kind", ["plain", "odd_group", "window", "sinks"])
def test_triton_goes_by_the_counts_on_the_device(kind: str, rows: list[tuple[int, int]]) -> None:
    """Room for more rows of both kinds and more tokens than there are: what there is comes out, the rest is left."""
    spec = SPECS[kind]
    case = make_case(spec, rows, device=_TRITON_DEVICE)
    tokens, room = case.inputs.num_tokens, 160
    inputs = with_room(case, rows=50, decode=49, prefill=20, tokens=room)
    query, key, value = (
        torch.cat((x, x.new_full((room - tokens, *x.shape[1:]), float("nan"))))
        for x in (case.query, case.key, case.value)
    )
    backend = triton_backend(spec)
    backend.begin(inputs)
    out = backend.attend(case.layer, query, key, value, case.sinks)[:tokens]
    assert (out.cpu() - case.expected).abs().max().item() <= _TOLERANCE[torch.float32] * max(
        1.0, case.expected.abs().max().item()
    )
    assert case.layer.k_cache.isfinite().all()
    assert torch.equal(case.layer.k_cache.flatten(0, 1)[case.inputs.slot_mapping], case.key)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_triton_block_sizes(block_size: int) -> None:
    spec = make_spec(window=20)
    case = make_case(spec, ROWS["mixed"], block_size=block_size, device=_TRITON_DEVICE)
    check(triton_backend(spec, block_size), case)


@pytest.mark.gpu
@needs_triton
def test_triton_pages_stay_finite() -> None:
    case = make_case(make_spec(), ROWS["mixed"], device=_TRITON_DEVICE)
    others = _faulty(case)
    backend = triton_backend(case.layer.spec)
    backend.begin(case.inputs)
    out = backend.attend(case.layer, case.query, case.key, case.value, None).cpu()
    assert case.layer.k_cache.isfinite().all()
    assert case.layer.v_cache.isfinite().all()
    assert torch.allclose(out[others], case.expected[others], atol=2e-5)


@pytest.mark.gpu
@needs_triton
def test_triton_row_without_keys_is_zero() -> None:
    """A padding row of a CUDA graph may have no key at all; it must not leave NaN behind."""
    spec = make_spec()
    case = make_case(spec, [(20, 1), (5, 1)], device=_TRITON_DEVICE)
    case.inputs.kv_len[1] = 0
    backend = triton_backend(spec)
    backend.begin(case.inputs)
    out = backend.attend(case.layer, case.query, case.key, case.value, None).cpu()
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.allclose(out[0], case.expected[0], atol=2e-5)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


_LONGER = [(600, 1), (513, 1), (800, 300), (64, 64)]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
def test_triton_head_dims(dim: int, dtype: torch.dtype) -> None:
    spec = make_spec(heads=(8, 2), dims=(dim, dim), dtype=dtype)
    for rows in (ROWS["mixed"], _LONGER):
        check(triton_backend(spec), make_case(spec, rows, device=_TRITON_DEVICE, seed=dim))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (8, 8), (32, 8), (28, 4), (16, 1), (24, 1)], ids=str)
def test_triton_groups(heads: tuple[int, int]) -> None:
    spec = make_spec(heads=heads, dims=(128, 128), dtype=torch.float16)
    check(triton_backend(spec), make_case(spec, _LONGER, device=_TRITON_DEVICE, seed=heads[0]))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks", "all"])
def test_triton_features_at_speed_dtype(kind: str) -> None:
    on = {kind} if kind != "all" else {"window", "softcap", "sinks"}
    spec = make_spec(
        heads=(32, 8),
        dims=(128, 128),
        dtype=torch.bfloat16,
        window=200 if "window" in on else None,
        softcap=20.0 if "softcap" in on else None,
        sinks="sinks" in on,
    )
    for rows in ([(n, 1) for n in (1, 199, 200, 201, 1000, 3000)], [(1500, 1), (700, 700), (1300, 17), (201, 2)]):
        check(triton_backend(spec), make_case(spec, rows, device=_TRITON_DEVICE))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("batch", [1, 2, 7, 32, 64, 255, 300])
def test_triton_batches(batch: int) -> None:
    spec = make_spec(heads=(8, 2), dims=(64, 64), dtype=torch.bfloat16)
    lengths = torch.randint(1, 500, (batch,), generator=torch.Generator().manual_seed(batch)).tolist()
    check(triton_backend(spec), make_case(spec, [(n, 1) for n in lengths], device=_TRITON_DEVICE, seed=batch))


@pytest.mark.gpu
@needs_cuda
def test_triton_rows_that_wait_for_programs() -> None:
    spec = make_spec(heads=(16, 8), dims=(128, 128), dtype=torch.bfloat16)
    lengths = torch.randint(1, 500, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    backend = triton_backend(spec)
    assert backend._work[None, spec.kv_heads].is_crowded(len(lengths))  # type: ignore[attr-defined]
    check(backend, make_case(spec, [(n, 1) for n in lengths], device=_TRITON_DEVICE))


@pytest.mark.gpu
@needs_cuda
def test_triton_long_context() -> None:
    spec = make_spec(heads=(8, 2), dims=(128, 128), dtype=torch.bfloat16)
    for rows in ([(32768, 1)], [(32767, 1), (1, 1), (9000, 1)], [(4096, 1), (20000, 64)]):
        check(triton_backend(spec), make_case(spec, rows, device=_TRITON_DEVICE))


@pytest.mark.gpu
@needs_cuda
def test_triton_graph_follows_lengths() -> None:
    """Captured once, replayed with other lengths, tables and queries: nothing of a step is baked in."""
    spec = make_spec(heads=(8, 2), dims=(64, 64), dtype=torch.bfloat16)
    cases = [
        make_case(spec, [(n, 1) for n in lengths], device=_TRITON_DEVICE, seed=seed)
        for seed, lengths in enumerate([(900, 3, 64, 17), (901, 1, 1, 1), (880, 640, 700, 897)])
    ]
    static = make_case(spec, [(912, 1)] * 4, device=_TRITON_DEVICE, seed=9)
    backend = triton_backend(spec)

    def step() -> torch.Tensor:
        backend.begin(static.inputs)
        return backend.attend(static.layer, static.query, static.key, static.value, None)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for case in cases:
        for name in ("slot_mapping", "row_slot", "kv_len", "query_start"):
            getattr(static.inputs, name).copy_(getattr(case.inputs, name))
        pages = case.inputs.block_table.shape[1]
        static.inputs.block_table[:, :pages] = case.inputs.block_table
        for ours, theirs in ((static.layer.k_cache, case.layer.k_cache), (static.layer.v_cache, case.layer.v_cache)):
            ours[: theirs.shape[0]] = theirs
        for ours, theirs in ((static.query, case.query), (static.key, case.key), (static.value, case.value)):
            ours.copy_(theirs)
        out.fill_(float("nan"))
        graph.replay()
        assert (out.float().cpu() - case.expected).abs().max().item() < 1e-2
