"""Loading: what is refused and how, random weights, the size of the KV cache, models of an older interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from executor import kv_cache
from executor.model import Model, choose_num_blocks, load_model
from ipc.config import EngineConfig
from ipc.errors import ConfigError, ModelError
from tests.executor.paged_generate import engine_config, paged_generate
from tests.executor.test_architectures import expected_tokens, prompts, save_model

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tiny(folder: Path, **changes: Any) -> Any:
    return save_model(folder, "Qwen3Config", {"head_dim": 16, **changes})


def cpu_model(folder: Path, **changes: Any) -> Model:
    return load_model(engine_config(folder, device="cpu", **changes), progress=False)


def test_description_of_a_model(tmp_path: Path) -> None:
    tiny(tmp_path)
    model = cpu_model(tmp_path)
    assert (model.vocab_size, model.device, model.dtype, model.backend) == (
        128,
        torch.device("cpu"),
        torch.float32,
        "sdpa",
    )
    assert model.kv_bytes_per_block() == 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, dim, bytes
    model.allocate_kv(5)
    assert [tuple(layer.v_cache.shape) for layer in model.layers] == [(5, 16, 2, 16)] * 2
    assert all(not layer.k_cache.any() for layer in model.layers)


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_tokens_do_not_depend_on_block_size(block_size: int, tmp_path: Path) -> None:
    theirs = tiny(tmp_path)
    tokens, _ = paged_generate(cpu_model(tmp_path, block_size=block_size), prompts(3), 24, seed=block_size)
    assert tokens == [expected_tokens(theirs, prompt) for prompt in prompts(3)]


def test_dtype_is_that_of_the_checkpoint_unless_told(tmp_path: Path) -> None:
    save_model(tmp_path, "LlamaConfig", {}, dtype=torch.bfloat16)
    assert cpu_model(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert cpu_model(tmp_path, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_self_check_passes_in_narrow_dtypes(dtype: str, tmp_path: Path) -> None:
    for i, config_class in enumerate(("LlamaConfig", "MixtralConfig")):
        save_model(tmp_path / str(i), config_class, {} if i == 0 else {"num_local_experts": 4})
        cpu_model(tmp_path / str(i), dtype=dtype)


def test_random_weights_need_only_a_config_and_follow_the_seed(tmp_path: Path) -> None:
    transformers.Qwen3Config(vocab_size=128, hidden_size=64, num_hidden_layers=2, head_dim=16).save_pretrained(tmp_path)
    logits = [
        paged_generate(cpu_model(tmp_path, random_weights=True, random_seed=seed), [[5, 6, 7]], 1)[1][0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_forward_without_logits_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older forward that knows no `logits_to_keep` gives all logits; the last ones are picked afterwards."""
    original = transformers.Qwen3ForCausalLM.forward

    def forward(
        self: Any, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, use_cache: bool | None = None
    ) -> Any:
        return original(self, input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    theirs = tiny(tmp_path)
    expected = [expected_tokens(theirs, prompt) for prompt in prompts()]
    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", forward)
    assert paged_generate(cpu_model(tmp_path), prompts(), 24)[0] == expected


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent has no config\.json"):
        cpu_model(tmp_path / "absent")


def test_missing_weights_file(tmp_path: Path) -> None:
    tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        cpu_model(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        cpu_model(tmp_path)


def test_truncated_weights(tmp_path: Path) -> None:
    tiny(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot load"):
        cpu_model(tmp_path)


def test_missing_weight_is_named(tmp_path: Path) -> None:
    """transformers would fill it with random values and go on."""
    from safetensors.torch import load_file, save_file

    tiny(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        cpu_model(tmp_path)


def test_unknown_architecture(tmp_path: Path) -> None:
    tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch", "architectures": ["None"]}))
    with pytest.raises(ModelError, match="nonesuch"):
        cpu_model(tmp_path)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    marker = tmp_path / "ran"
    (tmp_path / "custom.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code"):
        cpu_model(tmp_path)
    assert not marker.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(engine_config(tmp_path, device="cuda"), progress=False)
    assert caught.value.param == "--device"


class _Pages:
    """Stands for a model of 1000-byte blocks."""

    device = torch.device("cpu")

    def allocate_kv(self, num_blocks: int) -> None:
        raise AssertionError("nothing is allocated to size the cache of the CPU")

    def kv_bytes_per_block(self) -> int:
        return 1000


def _choose(**changes: Any) -> int:
    def run_full_step() -> None:
        raise AssertionError("nothing is run to size the cache of the CPU")

    config: EngineConfig = engine_config(Path("/nowhere"), device="cpu", max_num_seqs=8, **changes)
    return choose_num_blocks(config, _Pages(), run_full_step)


def test_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 8 * (256 // 16) + 1
    assert _choose(num_blocks=50) == 50
    assert _choose(num_blocks=2) == 2
    assert _choose(num_blocks=100_000) == most
    assert _choose(kv_cache_bytes=70_999) == 70
    assert _choose() == most
    monkeypatch.setattr(kv_cache, "_available_bytes", lambda: 8 * 40_000)
    assert _choose() == 40


@pytest.mark.parametrize(
    ("changes", "numbers", "flag"),
    [
        ({"num_blocks": 1}, "1 KV blocks; 2", "--num-gpu-blocks-override"),
        ({"kv_cache_bytes": 1999}, "1,999 .* 2,000", "--kv-cache-memory-bytes"),
    ],
)
def test_too_small_a_cache_states_both_numbers(changes: dict[str, Any], numbers: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=numbers) as caught:
        _choose(**changes)
    assert caught.value.param == flag


@pytest.mark.gpu
@needs_cuda
def test_cuda_cache_leaves_room_for_a_full_step(tmp_path: Path) -> None:
    tiny(tmp_path)
    config = engine_config(tmp_path, device="cuda", max_num_seqs=64, max_model_len=1 << 24, gpu_memory_utilization=0.5)
    model = load_model(config, progress=False)
    step_bytes = 1 << 30
    _, total_bytes = torch.cuda.mem_get_info()

    def run_full_step() -> None:
        torch.empty(step_bytes, dtype=torch.uint8, device="cuda")

    kv_bytes = choose_num_blocks(config, model, run_full_step) * model.kv_bytes_per_block()
    assert kv_bytes <= total_bytes // 2 - step_bytes


@pytest.mark.gpu
@needs_cuda
def test_bfloat16_on_cuda_follows_float32(tmp_path: Path) -> None:
    theirs = tiny(tmp_path).cuda()
    ours = load_model(engine_config(tmp_path, dtype="bfloat16", device="cuda"), progress=False)
    tokens, logits = paged_generate(ours, prompts(), 24)
    for prompt, new, got in zip(prompts(), tokens, logits, strict=True):
        with torch.inference_mode():
            sequence = torch.tensor([prompt + new], device="cuda")
            expected = theirs(sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu()
        assert (got - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.gpu
@needs_cuda
def test_forward_never_waits_for_the_device(tmp_path: Path) -> None:
    """A step whose launch synchronizes would stall the launch thread, and could not be captured."""
    from tests.executor.paged_generate import _Row, _step

    tiny(tmp_path)
    model = load_model(engine_config(tmp_path, device="cuda"), progress=False)
    model.allocate_kv(8)
    table = torch.arange(1, 7, dtype=torch.int32, device="cuda").view(2, 3)
    decode, prefill = _Row(0, [5] * 20, 21, [1, 2, 3], computed=19), _Row(1, [7] * 9, 10, [4, 5, 6])
    for rows, lengths, num_decode in (([decode], [1], 1), ([decode, prefill], [1, 9], 1)):
        step = _step(model, rows, lengths, num_decode, table)
        model.forward(step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.forward(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cache_that_cannot_be_allocated(tmp_path: Path) -> None:
    tiny(tmp_path)
    with pytest.raises(ConfigError, match="KV blocks do not fit") as caught:
        cpu_model(tmp_path).allocate_kv(1 << 40)
    assert caught.value.param == "--num-gpu-blocks-override"
