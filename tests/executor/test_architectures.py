"""Architectures served unmodified: greedy tokens through pages are those of transformers' own generate.

Tiny random models of each kind, on the CPU through SDPA and, marked gpu, on CUDA through Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from executor.attention import LayerSpec
from executor.model import Model, load_model
from ipc.errors import ModelError
from tests.executor.paged_generate import engine_config, paged_generate

_NEW_TOKENS = 24
_PROMPT_LENGTHS = (1, 2, 9, 17, 33, 50)

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large enough that tokens depend on the whole context rather than on the last token alone.
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2}

# name -> (config class, what differs from _COMMON, windows of the layers)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], list[int | None]]] = {
    "llama": ("LlamaConfig", {}, [None, None]),
    "llama_yarn": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        [None, None],
    ),
    "qwen2": ("Qwen2Config", {}, [None, None]),
    "qwen2_window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
        [None, 12],
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}, [None, None]),
    "mistral": ("MistralConfig", {"sliding_window": 10}, [10, 10]),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "num_hidden_layers": 4,
        },
        [9, None, 9, None],
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        [8, None],
    ),
    "phi3": ("Phi3Config", {}, [None, None]),
    "phi3_longrope": (
        "Phi3Config",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 0.5 * i for i in range(8)],
            },
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 512,
        },
        [None, None],
    ),
    "olmo2": ("Olmo2Config", {}, [None, None]),
    "granite": (
        "GraniteConfig",
        {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
        [None, None],
    ),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.25}, [None, None]),
    "gpt2": ("GPT2Config", {"n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}, [None, None]),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 16,
            "sliding_window": 11,
            "num_local_experts": 4,
            **_MOE,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        [11, None],
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, **_MOE},
        [None] * 2,
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **_MOE}, [None, None]),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            **_MOE,
        },
        [None, None],
    ),
}


def save_model(folder: Path, config_class: str, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A random model of one architecture, saved in `folder`; the sinks of gpt-oss are made to matter."""
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(_COMMON | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model.eval()


def prompts(seed: int = 0) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 128, (n,), generator=random).tolist() for n in _PROMPT_LENGTHS]


def expected_tokens(model: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt], device=model.device)
    settings = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    return generated[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    config_class, changes, windows = ARCHITECTURES[name]
    theirs = save_model(tmp_path, config_class, changes)
    ours = load_model(engine_config(tmp_path, device="cpu"), progress=False)
    assert [layer.spec.window for layer in ours.layers] == windows
    tokens, _ = paged_generate(ours, prompts(), _NEW_TOKENS)
    for prompt, got in zip(prompts(), tokens, strict=True):
        assert got == expected_tokens(theirs, prompt), f"prompt of {len(prompt)} tokens"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_on_cuda_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """float32 through the Triton kernels: logits of every generated position, given the same tokens before it."""
    config_class, changes, windows = ARCHITECTURES[name]
    theirs = save_model(tmp_path, config_class, changes).cuda()
    ours = load_model(engine_config(tmp_path, device="cuda"), progress=False)
    assert [layer.spec.window for layer in ours.layers] == windows
    tokens, logits = paged_generate(ours, prompts(), _NEW_TOKENS)
    for prompt, new, got in zip(prompts(), tokens, logits, strict=True):
        sequence = torch.tensor([prompt + new], device="cuda")
        with torch.inference_mode():
            expected = theirs(sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu()
        assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()


def _load_changed(folder: Path, config_class: str, changes: dict[str, Any]) -> Model:
    save_model(folder, config_class, changes)
    return load_model(engine_config(folder, device="cpu"), progress=False)


def test_recurrent_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no layer of it attends through transformers' AttentionInterface"):
        _load_changed(tmp_path, "MambaConfig", {"state_size": 8})


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("GPTJConfig", {"n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
        ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    ],
)
def test_private_attention_code_is_refused_with_the_reason(
    config: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"does not attend through .* \(private attention code is not served\)"):
        _load_changed(tmp_path, config, changes)


def test_hybrid_model_names_its_recurrent_layers(tmp_path: Path) -> None:
    changes = {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        **_MOE,
    }
    with pytest.raises(ModelError, match=r"of 2 layers, \[0\] do not attend"):
        _load_changed(tmp_path, "Qwen3NextConfig", changes)


def test_bias_on_scores_is_refused(tmp_path: Path) -> None:
    """ALiBi adds to the scores inside private attention code."""
    with pytest.raises(ModelError, match="Bloom"):
        _load_changed(tmp_path, "BloomConfig", {"n_layer": 2, "n_head": 4})


def test_bidirectional_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not causal"):
        _load_changed(tmp_path, "Gemma3TextConfig", {"head_dim": 16, "use_bidirectional_attention": True})


def test_chunked_attention_is_refused(tmp_path: Path) -> None:
    """Llama 4's local layers see up to the start of a chunk: a window of no constant size."""
    changes = {
        "head_dim": 16,
        "attention_chunk_size": 32,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
        "layer_types": ["chunked_attention", "full_attention"],
    }
    with pytest.raises(ModelError, match="neither causal nor a sliding window"):
        _load_changed(tmp_path, "Llama4TextConfig", changes)


@pytest.mark.parametrize(("rope", "reason"), [("dynamic", "longest request"), ("longrope", "past 64 tokens")])
def test_rope_that_depends_on_the_batch_is_refused(rope: str, reason: str, tmp_path: Path) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    changes: dict[str, Any] = {"rope_parameters": parameters, "original_max_position_embeddings": 64}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    with pytest.raises(ModelError, match=reason):
        _load_changed(tmp_path, "Phi3Config" if rope == "longrope" else "LlamaConfig", changes)


def test_self_check_catches_a_wrong_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is served by another scale than the model's own differs in its logits, and is refused."""
    from executor import probe

    def wrong(*args: Any) -> LayerSpec:
        import dataclasses

        return dataclasses.replace(right(*args), scale=0.01)

    right = probe._spec
    monkeypatch.setattr(probe, "_spec", wrong)
    with pytest.raises(ModelError, match="paged logits differ"):
        _load_changed(tmp_path, "LlamaConfig", {})
