"""Prompts by FlashAttention-3: what its documentation says it computes, and, where it is installed, itself."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from executor.attention import LayerSpec
from executor.attention.flash import find_flash_attention
from tests.executor.paged_generate import engine_config
from tests.executor.test_architectures import ARCHITECTURES, save_model
from tests.executor.test_attention import (
    Case,
    check,
    make_case,
    make_spec,
    needs_triton,
    reference,
    triton_backend,
    with_room,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIXED = [(90, 1), (17, 1), (40, 40), (100, 33), (65, 2)]
PROMPTS = [(64, 64), (300, 250), (5, 5)]


class Documented:
    """`flash_attn_with_kvcache`, as its documentation defines it, in float32; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        q: torch.Tensor,  # [queries, q_heads, dim]
        k_cache: torch.Tensor,  # [blocks, page, kv_heads, dim]
        v_cache: torch.Tensor,
        *,
        cache_seqlens: torch.Tensor,
        page_table: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_q: int,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> torch.Tensor:
        self.calls += 1
        assert causal and num_splits == 1
        for numbers in (cache_seqlens, page_table, cu_seqlens_q):
            assert numbers.dtype == torch.int32
        out = torch.empty_like(q)
        starts = cu_seqlens_q.tolist()
        assert starts[0] == 0 and starts[-1] == len(q)
        for row, (start, stop) in enumerate(pairwise(starts)):
            keys_seen = int(cache_seqlens[row])
            assert stop - start <= max_seqlen_q
            keys, values = (
                cache[page_table[row].long()].flatten(0, 1)[:keys_seen].float().cpu() for cache in (k_cache, v_cache)
            )
            # Both are aligned to the bottom right corner; the left end of this window is inclusive.
            window = None if window_size[0] < 0 else window_size[0] + 1
            dim, heads = q.shape[2], (q.shape[1], k_cache.shape[2])
            spec = LayerSpec(*heads, dim, dim, q.dtype, softmax_scale, window, softcap or None, False)
            out[start:stop] = reference(spec, q[start:stop].float().cpu(), keys, values, None)
        return out


def run(flash: Any, case: Case) -> None:
    backend = triton_backend(case.layer.spec)
    backend.use_flash(flash, always=True)  # type: ignore[attr-defined]
    check(backend, case)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("rows", [MIXED, PROMPTS], ids=["mixed", "prompts"])
@pytest.mark.parametrize("changes", [{}, {"window": 20}, {"softcap": 4.0}], ids=str)
def test_prompts_of_exact_steps_are_handed_over_as_documented(
    rows: list[tuple[int, int]], changes: dict[str, Any]
) -> None:
    documented = Documented()
    run(documented, make_case(make_spec(dtype=torch.float16, **changes), rows, device=DEVICE))
    assert documented.calls == 1


@pytest.mark.gpu
@needs_triton
def test_steps_with_room_and_layers_it_cannot_do_are_left_to_triton() -> None:
    documented, half = Documented(), torch.float16
    for spec in (make_spec(), make_spec(dtype=half, sinks=True), make_spec(dims=(32, 16), dtype=half)):
        run(documented, make_case(spec, MIXED, device=DEVICE))
    case = make_case(make_spec(dtype=half), MIXED, device=DEVICE)
    backend: Any = triton_backend(case.layer.spec)
    backend.use_flash(documented, always=True)
    backend.begin(with_room(case, rows=9, decode=8, prefill=6, tokens=90))
    assert backend._prompts is None
    assert documented.calls == 0


@pytest.mark.gpu
@needs_triton
def test_short_prompts_are_left_to_triton() -> None:
    case = make_case(make_spec(dtype=torch.float16), [(20, 1), (1100, 1030), (1030, 1019)], device=DEVICE)
    backend: Any = triton_backend(case.layer.spec)
    backend.use_flash(Documented())
    backend.begin(case.inputs)
    assert backend._prompts is not None  # 1024.5 tokens a prompt
    case.inputs.num_tokens -= 2
    backend.begin(case.inputs)
    assert backend._prompts is None


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8), (16, 8), (4, 4)], ids=str)
@pytest.mark.parametrize("rows", [MIXED, PROMPTS, [(1500, 1100), (700, 3)]], ids=["mixed", "prompts", "long"])
def test_the_installed_one_computes_the_same(heads: tuple[int, int], rows: list[tuple[int, int]]) -> None:
    flash = find_flash_attention(DEVICE)
    if flash is None:
        pytest.skip("FlashAttention-3 is not installed, or no Hopper GPU")
    run(flash, make_case(make_spec(heads, (128, 128), torch.bfloat16), rows, device=DEVICE))


@pytest.mark.gpu
def test_one_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if DEVICE.type != "cuda":
        pytest.skip("no CUDA device")
    from executor import model
    from executor.attention import flash

    def wrong(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.zeros_like(q)

    monkeypatch.setattr(flash, "find_flash_attention", lambda _: wrong)
    save_model(tmp_path, *ARCHITECTURES["llama"][:2])
    loaded = model.load_model(engine_config(tmp_path, device="cuda", dtype="bfloat16"), False)
    assert any(note.startswith("no FlashAttention-3: ") for note in loaded.notes)
    assert loaded._backend._flash is None  # type: ignore[attr-defined]


def test_there_is_none_on_the_cpu() -> None:
    assert find_flash_attention(torch.device("cpu")) is None
