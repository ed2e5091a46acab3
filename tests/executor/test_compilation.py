"""Compiled layers: the tokens of transformers, one compilation for all layers and numbers of tokens, and none later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.models.llama import modeling_llama

from executor import compilation, probe
from executor.model import Model, compile_model, load_model
from tests.executor.driver import Driver, ExecutorProcess, Sequence
from tests.executor.paged_generate import engine_config, paged_generate
from tests.executor.test_architectures import ARCHITECTURES, expected_tokens, prompts, save_model

_NEW_TOKENS = 24
# Everything but the generation of code, which costs a C++ compiler's seconds for each kernel.
_QUICK_BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """A compiler without memories or a stance, one thread as tiny matrices want it."""
    threads, config = torch.get_num_threads(), torch._dynamo.config
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with config.patch(specialize_float=config.specialize_float, recompile_limit=config.recompile_limit):
        yield
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)


def compiled(folder: Path, name: str, device: str = "cpu", backend: str = _QUICK_BACKEND) -> Model:
    """As in the process, all in inference mode: tensors made outside of it are of another kind to the compiler."""
    with torch.inference_mode():
        model = load_model(engine_config(folder, device=device), progress=False)
        compile_model(model, backend)
    assert model.notes[-1] == "layers compiled"
    return model


def num_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_tokens_are_those_of_transformers_and_nothing_is_compiled_for_them(name: str, tmp_path: Path) -> None:
    theirs = save_model(tmp_path, *ARCHITECTURES[name][:2])
    before = num_compiled()
    ours = compiled(tmp_path, name)
    assert num_compiled() - before == 6, "layer, norm and rotary table, for one token and for several"
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        for chunk in (3, 64):
            tokens, _ = paged_generate(ours, prompts(), _NEW_TOKENS, chunk=chunk)
            assert tokens == [expected_tokens(theirs, prompt) for prompt in prompts()]


def test_layers_share_code_however_many_they_are(tmp_path: Path) -> None:
    config_class, changes, _ = ARCHITECTURES["qwen3"]
    save_model(tmp_path, config_class, changes | {"num_hidden_layers": 5})
    before = num_compiled()
    compiled(tmp_path, "qwen3")
    assert num_compiled() - before == 6


def test_regions_are_layers_final_norm_and_rotary_table(tmp_path: Path) -> None:
    model = save_model(tmp_path, *ARCHITECTURES["llama"][:2])
    attentions = [layer.self_attn for layer in model.model.layers]
    assert compilation.regions(model, attentions) == [*model.model.layers, model.model.norm, model.model.rotary_emb]
    assert compilation.regions(model.model.norm, attentions) == []


def test_a_model_that_does_not_compile_is_served_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: modeling_llama.LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return original(self, x)

    original = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    theirs = save_model(tmp_path, *ARCHITECTURES["llama"][:2])
    ours = load_model(engine_config(tmp_path, device="cpu"), progress=False)
    compile_model(ours, _QUICK_BACKEND)
    assert ours.notes[-1].startswith("not compiled: Unsupported: ")
    assert ours.implementation == probe.SERVE
    with torch.compiler.set_stance("fail_on_recompile"):
        assert paged_generate(ours, prompts(), _NEW_TOKENS)[0] == [expected_tokens(theirs, p) for p in prompts()]


def test_a_model_that_computes_something_else_is_served_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = compilation._serve
    theirs = save_model(tmp_path, *ARCHITECTURES["llama"][:2])
    ours = load_model(engine_config(tmp_path, device="cpu"), progress=False)
    monkeypatch.setattr(compilation, "_serve", lambda *args, **kwargs: (-serve(*args, **kwargs)[0], None))
    compile_model(ours, _QUICK_BACKEND)
    assert "paged logits differ from its own" in ours.notes[-1]
    assert paged_generate(ours, prompts(), _NEW_TOKENS)[0] == [expected_tokens(theirs, p) for p in prompts()]


def test_nothing_is_compiled_after_the_stop(tmp_path: Path) -> None:
    theirs = save_model(tmp_path, *ARCHITECTURES["llama"][:2])
    ours = compiled(tmp_path, "llama")
    compilation.stop_compiling()
    before = num_compiled()
    # Tensors from outside of inference mode fit no compiled code.
    assert paged_generate(ours, prompts(), _NEW_TOKENS)[0] == [expected_tokens(theirs, p) for p in prompts()]
    assert num_compiled() == before


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_the_process_serves_a_compiled_model(device: str, tmp_path: Path) -> None:
    """With real code generation, in decode graphs on CUDA: tokens of mixed batches are those of transformers."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    changes = {"head_dim": 16, "initializer_range": 0.3}  # margins wide enough that rounding flips no token
    theirs = save_model(tmp_path, "Qwen3Config", changes)
    config = engine_config(tmp_path, device=device, compile=True, max_num_batched_tokens=128, num_blocks=128)
    executor = ExecutorProcess(config, tmp_path)
    try:
        executor.wait_ready()
        sequences = [Sequence(slot, prompt, _NEW_TOKENS) for slot, prompt in enumerate(prompts())]
        Driver(config, executor, 16).run(sequences)
        assert [sequence.output for sequence in sequences] == [expected_tokens(theirs, p) for p in prompts()]
        assert "layers compiled" in executor.stop()
    finally:
        executor.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_logits_on_cuda_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """float32 through generated code: logits of every generated position, given the same tokens before it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    theirs = save_model(tmp_path, *ARCHITECTURES[name][:2]).cuda()
    ours = compiled(tmp_path, name, "cuda", "inductor")
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        tokens, logits = paged_generate(ours, prompts(), _NEW_TOKENS)
    for prompt, new, got in zip(prompts(), tokens, logits, strict=True):
        with torch.inference_mode():
            expected = theirs(torch.tensor([prompt + new], device="cuda"), use_cache=False).logits
        expected = expected[0, len(prompt) - 1 : -1].float().cpu()
        assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()
