"""The executor process end to end: real rings, a transformers model, plans by hand, and transformers' own tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ipc.config import EngineConfig
from ipc.frames import INVALID_TOKEN, Param, PlanFlag
from ipc.schema import ModelCard
from tests.executor.driver import Driver, ExecutorDiedError, ExecutorProcess, Sequence, float_bits
from tests.executor.fused_model import WIDER
from tests.executor.test_architectures import save_model

VOCAB = 128
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,  # margins wide enough that rounding flips no token
    )
    path = tmp_path_factory.mktemp("qwen3")
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, VOCAB, size).tolist() for size in (1, 2, 15, 16, 17, 40, 75)]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations, 20 tokens each, by transformers."""
    model = Qwen3ForCausalLM.from_pretrained(folder)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def make_config(folder: Path, **options: object) -> EngineConfig:
    card = ModelCard("tiny", str(folder), 128, VOCAB, (), 3)
    settings = {"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 60, **options}
    return EngineConfig(card=card, **settings)  # type: ignore[arg-type]


def sequences_of(prompts: list[list[int]], max_tokens: int = 20) -> list[Sequence]:
    return [Sequence(slot, prompt, max_tokens) for slot, prompt in enumerate(prompts)]


def outputs_of(config: EngineConfig, executor: ExecutorProcess, prompts: list[list[int]]) -> list[list[int]]:
    sequences = sequences_of(prompts)
    Driver(config, executor, 64).run(sequences)
    return [sequence.output for sequence in sequences]


def skip_without(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def spawned() -> Iterator[list[ExecutorProcess]]:
    processes: list[ExecutorProcess] = []
    yield processes
    for process in processes:
        process.close()


@pytest.fixture(scope="module")
def sampled() -> dict[str, list[list[int]]]:
    """Sampled tokens of the first case on each device: every other case must repeat them."""
    return {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("depth", "chunk"), [(1, 64), (2, 7), (3, 9)])
def test_tokens_and_logprobs_are_those_of_transformers(
    folder: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    sampled: dict[str, list[list[int]]],
    spawned: list[ExecutorProcess],
    tmp_path: Path,
    device: str,
    depth: int,
    chunk: int,
) -> None:
    """On one process: 7 sequences at once, the same slots again with logprobs, then one at a time; then sampling."""
    skip_without(device)
    config = make_config(folder, device=device, pipeline_depth=depth, max_num_batched_tokens=512)
    executor = ExecutorProcess(config, tmp_path)
    spawned.append(executor)
    assert executor.wait_ready().num_blocks == 60
    driver = Driver(config, executor, chunk)
    for flags in (PlanFlag.NONE, PlanFlag.LOGPROBS):
        sequences = sequences_of(prompts)
        driver.run(sequences, flags)
        assert [sequence.output for sequence in sequences] == expected
    check_logprobs(folder, sequences, tolerance=1e-4 if device == "cpu" else 1e-3)
    for prompt, want in zip(prompts[:3], expected[:3], strict=True):
        sequence = Sequence(5, prompt, 20)
        driver.run([sequence])
        assert sequence.output == want
    together = sampling_sequences(prompts)
    driver.run(together, PlanFlag.SAMPLE)
    outputs = [sequence.output for sequence in together]
    assert sampled.setdefault(device, outputs) == outputs
    assert outputs != [want[:12] for want in expected]
    for sequence in sampling_sequences(prompts)[:2]:
        driver.run([sequence], PlanFlag.SAMPLE)
        assert sequence.output == outputs[sequence.slot]
    times = [(result.device_ns, result.gap_ns, result.launch_ns) for result in driver.results]
    assert all(device_ns > 0 and gap_ns >= 0 and launch_ns > 0 for device_ns, gap_ns, launch_ns in times)
    assert not any(result.compilations for result in driver.results), "something was compiled while serving"
    if depth > 1 and device == "cpu":  # on a GPU, steps of two layers may end before the next is queued
        assert any(result.hidden for result in driver.results)
    assert "attention" in executor.stop()
    assert executor.process.returncode == 0


def sampling_sequences(prompts: list[list[int]]) -> list[Sequence]:
    params = {Param.TEMPERATURE: float_bits(0.8), Param.FEATURES: int(PlanFlag.SAMPLE), Param.SEED_LOW: 7}
    return [Sequence(slot, prompt, 12, dict(params)) for slot, prompt in enumerate(prompts)]


def check_logprobs(folder: Path, sequences: list[Sequence], tolerance: float) -> None:
    model = Qwen3ForCausalLM.from_pretrained(folder)
    for sequence in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([sequence.prompt + sequence.output])).logits[0]
        logprobs = torch.log_softmax(logits, -1)[len(sequence.prompt) - 1 : -1]  # [tokens, vocab]
        for step, (result, row) in enumerate(sequence.results):
            assert result.logprob is not None
            assert result.rank is not None
            assert result.top_token is not None
            assert result.top_logprob is not None
            assert abs(float(result.logprob[row]) - float(logprobs[step, sequence.output[step]])) < tolerance
            assert int(result.rank[row]) == 1
            top = torch.topk(logprobs[step], 3)
            assert result.top_token[row].tolist() == top.indices.tolist()
            assert np.allclose(result.top_logprob[row], top.values.numpy(), atol=tolerance)


def test_plans_of_another_epoch_are_dropped(
    folder: Path, prompts: list[list[int]], expected: list[list[int]], spawned: list[ExecutorProcess], tmp_path: Path
) -> None:
    config = make_config(folder)
    executor = ExecutorProcess(config, tmp_path)
    spawned.append(executor)
    executor.wait_ready()
    driver = Driver(config, executor, 64)
    sequence = Sequence(0, prompts[2], 20)
    stale = executor.send_stale()
    driver.run([sequence])
    assert sequence.output == expected[2]
    assert all(result.seq > stale for result in driver.results)


def test_a_failed_step_ends_the_process_and_the_next_life_serves(
    folder: Path, prompts: list[list[int]], expected: list[list[int]], spawned: list[ExecutorProcess], tmp_path: Path
) -> None:
    config = make_config(folder)
    fault = {"ENGINE_FAULT": "executor:step=4:epoch=1:raise"}
    executor = ExecutorProcess(config, tmp_path, env=fault)
    spawned.append(executor)
    executor.wait_ready()
    with pytest.raises(ExecutorDiedError, match="raised at step 4"):
        Driver(config, executor, 64).run(sequences_of(prompts[:1]))
    assert executor.process.returncode == 1
    executor.start(fault, epoch=2)
    assert executor.wait_ready().epoch == 2
    executor.plans.restart()
    assert outputs_of(config, executor, prompts[:3]) == expected[:3]


@pytest.mark.parametrize("device", DEVICES)
def test_nan_fails_one_row_and_leaves_the_others_and_the_slot_unharmed(
    folder: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    spawned: list[ExecutorProcess],
    tmp_path: Path,
    device: str,
) -> None:
    skip_without(device)
    config = make_config(folder, device=device)
    executor = ExecutorProcess(config, tmp_path, env={"ENGINE_FAULT": "executor:step=5:nan"})
    spawned.append(executor)
    executor.wait_ready()
    driver = Driver(config, executor, 64)
    sequences = sequences_of(prompts[:3])
    driver.run(sequences)
    assert [token == INVALID_TOKEN for token in sequences[0].output] == [i == 4 for i in range(20)]
    assert [sequence.output for sequence in sequences[1:]] == expected[1:3]
    again = Sequence(0, prompts[0], 20)
    driver.run([again])
    assert again.output == expected[0]


@pytest.mark.parametrize(
    ("device", "fault", "said"),
    [
        ("cpu", "oom", "can't allocate memory"),
        pytest.param("cuda", "oom", "out of memory", marks=pytest.mark.gpu),
        pytest.param("cuda", "assert", "device-side assert", marks=pytest.mark.gpu),
    ],
)
def test_a_step_that_the_device_refuses_ends_the_process_with_the_reason_last(
    folder: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    spawned: list[ExecutorProcess],
    tmp_path: Path,
    device: str,
    fault: str,
    said: str,
) -> None:
    """And the next life on the same rings serves."""
    skip_without(device)
    config = make_config(folder, device=device)
    paths = [str(Path(__file__).resolve().parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {"TANDEM_TEST_FAULT": fault, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    executor = ExecutorProcess(config, tmp_path, "tests.executor.faulty", env)
    spawned.append(executor)
    executor.wait_ready()
    with pytest.raises(ExecutorDiedError, match=r"Traceback \(most recent call last\)") as died:
        Driver(config, executor, 64).run(sequences_of(prompts[:3]))
    assert executor.process.returncode == 1
    assert said in str(died.value)[str(died.value).rindex("Traceback") :]
    os.close(executor.parent_end)
    executor.start(epoch=2, module="executor")
    executor.wait_ready()
    executor.plans.restart()
    assert outputs_of(config, executor, prompts[:3]) == expected[:3]


@pytest.mark.gpu
def test_nothing_is_compiled_or_captured_while_a_fused_model_serves_any_mix(
    spawned: list[ExecutorProcess], tmp_path: Path
) -> None:
    """Steps in graphs of both kinds and beside them: more prompt rows or tokens than a graph has room for."""
    skip_without("cuda")
    save_model(tmp_path, "Qwen3Config", WIDER)
    limits = {"max_num_seqs": 40, "max_num_batched_tokens": 4500, "num_blocks": 400}
    config = make_config(tmp_path, device="cuda", dtype="bfloat16", compile=True, **limits)
    executor = ExecutorProcess(config, tmp_path)
    spawned.append(executor)
    executor.wait_ready()
    rng = np.random.default_rng(4)
    driver = Driver(config, executor, 100)
    for flags in (PlanFlag.NONE, PlanFlag.SAMPLE, PlanFlag.SAMPLE | PlanFlag.FILTER, PlanFlag.LOGPROBS):
        for count in (1, 3, 12, 40):
            driver._chunk = int(rng.integers(5, 100))
            lengths = rng.integers(1, 100, (count, 2)).tolist()
            prompts = [rng.integers(1, VOCAB, length).tolist() for length, _ in lengths]
            new = [min(20, 120 - length, tokens) for length, tokens in lengths]
            driver.run([Sequence(slot, prompts[slot], new[slot]) for slot in range(count)], flags)
    assert not any(result.compilations for result in driver.results)
    assert "fused decoder" in executor.stop()


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_kv_cache_is_sized_by_a_full_step(
    folder: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    spawned: list[ExecutorProcess],
    tmp_path: Path,
    enforce_eager: bool,
) -> None:
    skip_without("cuda")
    settings = {"num_blocks": None, "gpu_memory_utilization": 0.5, "enforce_eager": enforce_eager}
    config = make_config(folder, device="cuda", **settings)
    executor = ExecutorProcess(config, tmp_path)
    spawned.append(executor)
    # A tiny model leaves room for every sequence at full length; more is never taken.
    assert executor.wait_ready().num_blocks == config.max_num_seqs * config.limits.max_blocks_per_seq + 1
    sequences = sequences_of(prompts)
    Driver(config, executor, 8).run(sequences)
    assert [sequence.output for sequence in sequences] == expected


def test_a_folder_without_a_model_is_one_line_and_exit_code_2(spawned: list[ExecutorProcess], tmp_path: Path) -> None:
    executor = ExecutorProcess(make_config(tmp_path / "nothing"), tmp_path)
    spawned.append(executor)
    with pytest.raises(ExecutorDiedError, match="executor: error: --model: ") as died:
        executor.wait_ready()
    assert "Traceback" not in str(died.value)
    assert executor.process.returncode == 2


def test_it_dies_with_its_parent_and_uses_no_cpu_when_idle(
    folder: Path, spawned: list[ExecutorProcess], tmp_path: Path
) -> None:
    executor = ExecutorProcess(make_config(folder), tmp_path)
    spawned.append(executor)
    executor.wait_ready()
    before = cpu_ticks(executor.process.pid)
    executor.result_bell.wait(timeout_s=1.0)
    assert cpu_ticks(executor.process.pid) - before <= 2
    os.close(executor.parent_end)
    executor.parent_end = os.open(os.devnull, os.O_RDONLY)
    assert executor.process.wait(timeout=10) == 1


def test_sigterm_while_loading_ends_it(folder: Path, spawned: list[ExecutorProcess], tmp_path: Path) -> None:
    executor = ExecutorProcess(make_config(folder), tmp_path)
    spawned.append(executor)
    executor.process.send_signal(signal.SIGTERM)
    assert executor.process.wait(timeout=30) in (0, -signal.SIGTERM)


def cpu_ticks(pid: int) -> int:
    """User and system time of a process, in hundredths of a second (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
