"""Several ranks compute what one does: shards of every plan, weights, and what is refused.

On the CPU over gloo; on GPUs over NCCL where there are two. The fused decoder also runs in Triton's interpreter.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from executor.shards import Cutter, Piece, read_plan
from executor.weights import load_module
from ipc.errors import ModelError
from tests.executor.fused_model import INTERPRET, ON_GPU, WIDER, check_logits
from tests.executor.paged_generate import engine_config
from tests.executor.rank_generate import RankJob, generate_on_ranks
from tests.executor.test_architectures import ARCHITECTURES, expected_tokens, one_thread, prompts, save_model

__all__ = ["one_thread"]

NEW_TOKENS = 8
# A vocabulary that does not divide is padded, and a tied head shares the rows of its embedding.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True, "vocab_size": 131, "attention_bias": True}),
    "qwen3_tied": ("Qwen3Config", {"tie_word_embeddings": True, "head_dim": 32}),
}
SERVED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "olmo2", "gpt_neox"]
SERVED += ["qwen3_moe", "mixtral", "deepseek_v3", *MORE]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def need_gpus(device: str, count: int = 2) -> None:
    found = torch.cuda.device_count()
    if device == "cuda" and found < count:
        pytest.skip(f"needs {count} CUDA devices, found {found}")


def named(name: str) -> tuple[str, dict[str, Any]]:
    return MORE[name] if name in MORE else ARCHITECTURES[name][:2]


def rank(index: int, size: int) -> Any:
    """A rank that has no peers: enough to be cut by."""
    return SimpleNamespace(rank=index, size=size, handle=torch.empty(1))


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_of_two_ranks_are_those_of_transformers(tmp_path: Path, device: str) -> None:
    need_gpus(device)
    theirs = {}
    for name in SERVED:
        (tmp_path / name).mkdir()
        theirs[name] = save_model(tmp_path / name, *named(name))
    folders = [str(tmp_path / name) for name in SERVED]
    ranks = generate_on_ranks(RankJob(folders, prompts(), NEW_TOKENS, 2, os.memfd_create("ranks"), device))
    for place, name in enumerate(SERVED):
        answers = [answers[place] for answers in ranks]
        assert "error" not in answers[0], f"{name}: {answers[0]}"
        assert answers[0]["tokens"] == answers[1]["tokens"], f"{name}: ranks disagree"
        expected = [expected_tokens(theirs[name], prompt)[:NEW_TOKENS] for prompt in prompts()]
        assert answers[0]["tokens"] == expected, name
        whole = sum(parameter.numel() for parameter in theirs[name].parameters())
        if name in ("llama", "qwen2", "qwen3", "mistral", "qwen3_moe", "mixtral"):
            # Plans of transformers 5.17 leave the embedding whole.
            is_cut = "model.embed_tokens" in read_plan(theirs[name])
            kept = 0 if is_cut else theirs[name].get_input_embeddings().weight.numel()
            assert ranks[0][place]["held"] < kept + 0.51 * (whole - kept), f"{name}: a rank of two holds more than half"
            assert ranks[0][place]["kv_heads"] == [1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU and not INTERPRET, reason="needs CUDA devices, or triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("peers", [False, pytest.param(True, marks=pytest.mark.skipif(ON_GPU, reason="on the CPU"))])
def test_the_fused_decoder_of_two_ranks_computes_what_transformers_does(tmp_path: Path, peers: bool) -> None:
    if ON_GPU:
        need_gpus("cuda")
    names = ["llama", "qwen3", "qwen2"]
    changes = {"qwen2": {"tie_word_embeddings": True}}
    wider = WIDER | {"intermediate_size": 256}  # the halves must divide too
    theirs = []
    for name in names:
        (tmp_path / name).mkdir()
        kind, more = named(name)
        theirs.append(save_model(tmp_path / name, kind, more | wider | changes.get(name, {})).float())
    device, dtype = ("cuda", "bfloat16") if ON_GPU else ("cpu", "float32")
    lengths, new = ((1, 2, 17, 50, 100), 24) if ON_GPU else ((1, 17), 3)
    asked = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    folders = [str(tmp_path / name) for name in names]
    fd, memories = os.memfd_create("ranks"), tuple(os.memfd_create("peers") for _ in range(2 * peers))
    job = RankJob(folders, asked, new, 2, fd, device, dtype, fused=True, memories=memories)
    first, second = generate_on_ranks(job)
    for model, one, other in zip(theirs, first, second, strict=True):
        assert one["logits"] == other["logits"], "ranks disagree"
        for prompt, ids, logits in zip([*asked, *asked], one["tokens"], one["logits"], strict=True):
            check_logits(model, prompt, ids, torch.tensor(logits))


@pytest.mark.parametrize(
    ("name", "changes", "size", "reason"),
    [
        ("gpt2", {}, 2, "no tensor-parallel plan for GPT2LMHeadModel"),
        ("llama", {}, 4, r"layers\.0\.self_attn\.k_proj has 2 heads, which 4 ranks cannot share"),
        (
            "llama",
            {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3},
            2,
            "q_proj has 3 heads, which 2",
        ),
        ("llama", {"intermediate_size": 95}, 2, r"gate_proj has 95 output features, which 2 ranks cannot share"),
        ("mixtral", {"intermediate_size": 95}, 2, r"experts\.gate_up_proj has 95 features, which 2 ranks cannot share"),
    ],
)
def test_what_ranks_cannot_share_is_refused_with_both_numbers(
    name: str, changes: dict[str, Any], size: int, reason: str, tmp_path: Path
) -> None:
    save_model(tmp_path, named(name)[0], named(name)[1] | changes)
    with pytest.raises(ModelError, match=reason) as refused:
        load_module(engine_config(tmp_path, device="cpu"), torch.device("cpu"), rank(0, size))
    assert refused.value.param == "--tensor-parallel-size"


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "mixtral"])
@pytest.mark.parametrize("random", [True, False], ids=["random", "stored"])
def test_pieces_of_all_ranks_are_the_weights_of_one(name: str, random: bool, tmp_path: Path) -> None:
    save_model(tmp_path, *named(name))
    config = engine_config(tmp_path, device="cpu", random_weights=random, random_seed=3)
    cpu = torch.device("cpu")
    whole = dict(load_module(config, cpu, None).named_parameters(remove_duplicate=False))
    for index in (0, 1):
        part = load_module(config, cpu, rank(index, 2))
        with torch.device("meta"):
            shape = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(tmp_path), dtype=torch.float32
            )
        cutter = Cutter(shape, rank(index, 2))
        cutter.cut()
        held = dict(part.named_parameters(remove_duplicate=False))
        assert held.keys() == whole.keys()
        assert sum("lm_head" in key or "mlp" in key for key in cutter.pieces) > 2
        for key, tensor in held.items():
            piece = cutter.pieces.get(key)
            expected = whole[key] if piece is None else piece.of(whole[key], whole[key].ndim, index)
            assert torch.equal(tensor, expected), key
        if name.endswith("tied"):
            assert held["lm_head.weight"] is held["model.embed_tokens.weight"], "rows are held twice"


def test_a_piece_is_cut_padded_and_packed() -> None:
    full = torch.arange(12).view(6, 2)
    assert torch.equal(Piece(0, 6, 3).of(full, 2, 1), full[3:])
    assert torch.equal(Piece(1, 2, 1).of(full, 2, 0), full[:, :1])
    assert torch.equal(Piece(0, 6, 4).of(full, 2, 1), torch.cat((full[4:], torch.zeros(2, 2, dtype=torch.int64))))
    assert torch.equal(Piece(0, 6, 4).of(full, 2, 2), torch.zeros(4, 2, dtype=torch.int64))
    # Gate and up, three rows each, of which a rank of three holds one of each.
    assert torch.equal(Piece(0, 3, 1, parts=2).of(full, 2, 1), full[[1, 4]])
