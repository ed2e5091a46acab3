"""The benches' own logic, without a GPU: lengths that others published, limits, traces, tables; and each bench runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ipc.schema import Stats

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "models" / "demo"


@pytest.fixture(scope="module", autouse=True)
def scripts_importable() -> Iterator[None]:
    """As for a script that is run: its folder is on the path. One thread: more only fight for the cores of a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def offline(scripts_importable: None) -> ModuleType:
    import bench_offline

    return bench_offline


def test_ragged_lengths_are_those_of_the_published_numbers() -> None:
    from workloads import WORKLOADS

    outputs = {name: sum(o for _, o in WORKLOADS[name].lengths()) for name in ("trace", "small-trace")}
    assert outputs == {"trace": 284_413, "small-trace": 133_966}


def test_prompts_of_different_seeds_share_no_prefix() -> None:
    from workloads import Workload

    workload = Workload("w", 3, 16, 4)
    one, two = workload.prompts(1000, 1), workload.prompts(1000, 2)
    assert [len(prompt) for prompt in one] == [16] * 3
    assert one == workload.prompts(1000, 1)
    assert not {tuple(prompt[:4]) for prompt in one} & {tuple(prompt[:4]) for prompt in two}


def test_no_two_sampled_rows_of_a_dozen_are_alike() -> None:
    from workloads import sampled

    assert len({repr(sampled(i, 8)) for i in range(12)}) == 12
    assert all(sampled(i, 8).temperature > 0 for i in range(12))


def test_limits_of_the_8b_shape() -> None:
    """By hand: 7.505e9 weights without the embedding; K and V of 32 layers, 8 heads, 128 wide, in bfloat16."""
    from roofline import H200_BANDWIDTH, H200_FLOPS, model_cost
    from workloads import SHAPES, WORKLOADS

    cost = model_cost(SHAPES["llama-3.1-8b"])
    assert cost.weight_bytes == 2 * (32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096 * 128257)
    assert cost.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    one = [(3, 3)]  # the second and third token attend to 4 and 5 tokens, of which 3 + 1 and 3 + 2 are their own
    assert cost.decode_bytes(one, 2) == 2 * cost.weight_bytes + 9 * cost.kv_bytes_per_token
    headline = WORKLOADS["headline"].lengths()
    assert cost.limit_s(headline, 8191, H200_BANDWIDTH, H200_FLOPS) == pytest.approx(56.9, abs=0.1)


def test_a_tied_embedding_is_read_once() -> None:
    from roofline import model_cost
    from workloads import SHAPES

    cost = model_cost(SHAPES["qwen3-0.6b"])
    assert cost.weight_bytes == pytest.approx(2 * 596e6, rel=0.01)
    assert cost.head_flops == 2 * 1024 * 151_936


def kernel(start: float, end: float, name: str = "k", category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start}


def test_busy_share_is_of_the_union() -> None:
    from trace_report import report

    events = [
        kernel(0, 100, "first"),  # the window begins at 100, a tenth in
        kernel(100, 400, "gemm"),
        kernel(300, 500, "gemm"),  # overlaps
        kernel(350, 360, "norm"),
        kernel(600, 1000, "gemm"),
        kernel(500, 600, "Memcpy HtoD (Pinned -> Device)", "gpu_memcpy"),
        kernel(510, 520, "Memcpy DtoD (Device -> Device)", "gpu_memcpy"),
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 500, "dur": 100},
    ]
    found = report(events)
    assert found.window_us == 900
    assert found.busy == pytest.approx((400 + 10 + 400) / 900)
    assert found.longest_gap_us == 80
    assert next((k.name, k.count, k.total_us) for k in found.kernels) == ("gemm", 3, 900)
    assert "first" not in {k.name for k in found.kernels}


def test_a_trace_without_a_device_is_said() -> None:
    from trace_report import report

    with pytest.raises(ValueError, match="no kernels"):
        report([{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5}])


def test_start_up_phases_are_read_from_the_log() -> None:
    from bench_engine import read_log_line

    phases: dict[str, float] = {}
    lines = ["executor: start-up           seconds   total\n", "executor:   KV cache             0.5     3.6\n"]
    assert [read_log_line(line, phases) for line in lines] == ["", ""]
    assert phases == {"KV cache": 0.5}
    assert read_log_line("executor: demo on cpu, 7 KV tokens; ready in 4.1 s\n", phases) == "demo on cpu, 7 KV tokens"


def stats(**changes: int) -> Stats:
    fields = dict.fromkeys(Stats.__struct_fields__, 0)
    return Stats(**{**fields, "requests_finished": {}, "draining": False, "peers": [], **changes})


def test_a_row_is_made_of_differences(offline: ModuleType) -> None:
    before = stats(steps=10, device_ns=5_000, hidden_steps=9, bubbles=2, plan_ns=1_000)
    after = stats(
        steps=110, device_ns=5_000 + 900_000_000, hidden_steps=108, bubbles=5, bubble_ns=100_000_000, plan_ns=5_001_000,
        longest_bubble_ns=70_000, compilations=1,
    )  # fmt: skip
    row = offline.summarize(offline.WORKLOADS["small-1"], "greedy", 2, 1, 512, 1.0, before, after, None)
    assert (row.steps, row.bubbles, row.compilations, row.longest_bubble_us) == (100, 3, 1, 70)
    assert (row.step_ms, row.device_ms, row.plan_us) == (10, 9, 50)
    assert (row.busy, row.hidden) == (0.9, 0.99)
    assert row.over_device == pytest.approx(1 / 0.9 - 1)
    assert len(offline.format_row(row)) == len(offline.HEADER)


def test_unknown_workloads_are_refused(offline: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        offline.parse(["--model", "x", "--workload", "small-1,nope"])
    assert "no workload 'nope'" in capsys.readouterr().err


def test_an_engine_is_measured_in_every_way(
    offline: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One start of a real engine with the fake executor: throughput, sampled, latency and burst."""
    monkeypatch.setenv("ENGINE_FAKE_STEP_US", "1000")
    known = offline.WORKLOADS
    small = {"batch": 4, "prompt_len": 16, "output_len": 320, "slots": 40}
    monkeypatch.setitem(known, "small-32", replace(known["small-32"], batch=4, prompt_len=16, output_len=12))
    monkeypatch.setitem(known, "latency", replace(known["latency"], **small, arriving_len=200))
    monkeypatch.setitem(known, "burst", replace(known["burst"], **small, arriving_len=200, arrivals=50))
    out = tmp_path / "out.json"
    flags = ["--fake-executor", "--sampled", "--depth", "2", "--json", str(out)]
    offline.main(["--model", str(DEMO_MODEL), "--workload", "small-32,latency,burst", *flags])
    found = json.loads(out.read_text())
    assert [(row["sampling"], row["tokens"]) for row in found["rows"]] == [("greedy", 48), ("sampled", 48)]
    assert all(row["steps"] >= 12 and row["limit_s"] > 0 for row in found["rows"])
    assert found["latency"][0]["alone_p50_ms"] > 0.5, "a step takes 1 ms"
    assert [each["what"] for each in found["burst"]][:2] == ["decode alone", "50 arrivals at once"]
    assert all(each["steps"] > 0 and each["compilations"] == 0 for each in found["burst"])
    assert found["starts"][0]["ready_s"] > 0
    assert "sampled takes" in capsys.readouterr().out


def test_gaps_of_rows_are_those_that_end_inside_the_window(offline: ModuleType) -> None:
    from interruptions import TimedRows

    rows = TimedRows(None, offline.WORKLOADS["latency"], [[1], [2]])  # type: ignore[arg-type]
    rows.arrivals = [[1.0, 1.1, 1.4], [0.9, 1.2]]
    assert rows.latencies_ms(1.1, 1.4) == pytest.approx([300, 300])


def test_every_kernel_case_runs(tmp_path: Path) -> None:
    import bench_kernels

    out = tmp_path / "kernels.json"
    bench_kernels.main(["--device", "cpu", "--tiny", "--replays", "1", "--json", str(out)])
    found = json.loads(out.read_text())
    assert {row["group"] for row in found} == {"decode", "prefill", "worklist", "linear", "sampling"}
    assert all(row["us"] > 0 and row["limit_us"] > 0 for row in found)


def test_kernel_cases_are_filtered_by_name(tmp_path: Path) -> None:
    import bench_kernels

    out = tmp_path / "kernels.json"
    only = "linear/tiny M=4,sampling/greedy"
    bench_kernels.main(["--device", "cpu", "--tiny", "--replays", "1", "--only", only, "--json", str(out)])
    names = [f"{row['group']}/{row['name']}" for row in json.loads(out.read_text())]
    assert names == ["linear/tiny M=4", "sampling/greedy 1x128", "sampling/greedy 4x128"]


def test_paged_attention_cases_compute_attention() -> None:
    """What the bench times is attention over the pages it made, not over nothing."""
    from bench_kernels import ATTENTION_BACKENDS, Heads, attention_calls, step_inputs

    device = torch.device("cpu")
    inputs, pages = step_inputs([5, 20], 1, device)
    assert inputs.kv_len.tolist() == [6, 21]
    assert sorted(set(inputs.block_table[:2].flatten().tolist()) - {0}) == list(range(1, pages))
    calls = attention_calls(ATTENTION_BACKENDS["ours"], Heads(4, 2, 16, torch.float32), [5, 20], 1, device)
    out = calls[0]()
    assert isinstance(out, torch.Tensor)
    assert out.shape == (2, 4, 16)
    assert out.isfinite().all() and out.abs().sum() > 0


def test_copies_leave_the_cache() -> None:
    from kernel_timing import L2_BYTES, MAX_COPIES, copies_needed

    assert copies_needed(1 << 30) == 1
    assert copies_needed(L2_BYTES) * L2_BYTES >= 4 * L2_BYTES
    assert copies_needed(1) == MAX_COPIES


def test_lanes_give_the_same_scores_at_every_depth(capsys: pytest.CaptureFixture[str]) -> None:
    import example_lanes

    options = ["--device", "cpu", "--batches", "5", "--batch", "2", "--width", "4", "--views", "2"]
    outcomes = example_lanes.main(options)
    assert [outcome.depth for outcome in outcomes] == [1, 2, 3]
    assert all(len(outcome.scores) == 5 for outcome in outcomes)
    for outcome in outcomes[1:]:
        assert all(np.allclose(a, b) for a, b in zip(outcomes[0].scores, outcome.scores, strict=True))
    assert not np.allclose(outcomes[0].scores[0], outcomes[0].scores[1]), "batches differ, so their scores do"
    assert "running on the CPU" in capsys.readouterr().out


def test_images_are_resized_and_normalized() -> None:
    import example_lanes

    grey = np.full((1, 10, 12, 3), 255, np.uint8)
    out = np.empty((1, 3, example_lanes.SIDE, example_lanes.SIDE), np.float32)
    example_lanes.prepare(grey, out)
    for channel in range(3):
        expected = (1.0 - example_lanes.MEAN[channel]) / example_lanes.STD[channel]
        assert np.allclose(out[0, channel], expected, atol=1e-5)


def test_scheduler_bench_measures_steps_and_arrivals(tmp_path: Path) -> None:
    import bench_scheduler

    out = tmp_path / "scheduler.json"
    bench_scheduler.main(["--rows", "1,4", "--waiting", "0,20", "--steps", "40", "--json", str(out)])
    found = json.loads(out.read_text())
    assert [(step["rows"], step["waiting"]) for step in found["steps"]] == [(1, 0), (4, 0), (1, 20), (4, 20)]
    assert [(each["count"], each["placed"]) for each in found["admissions"]] == [(1, 1), (16, 16), (256, 32)]


def test_peers_are_compared_by_tokens_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    import bench_peers

    slow = bench_peers.Outcome("transformers", "5", 100, 2.0, "")
    fast = bench_peers.Outcome("tandem", "0", 100, 1.0, "")
    bench_peers.print_table([slow, fast])
    table = capsys.readouterr().out
    assert "2.00x" in table.splitlines()[1]
    assert "different numbers" not in table
    bench_peers.print_table([replace(slow, tokens=90), fast])
    assert "different numbers of tokens, [90, 100]" in capsys.readouterr().out


def test_a_peer_that_fails_is_said_and_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_peers
    from workloads import Workload

    child = tmp_path / "child.py"
    monkeypatch.setattr(bench_peers, "__file__", str(child))
    job = bench_peers.Job("transformers", "", False, Workload("w", 1, 4, 4, (1, 2)), 2, "cpu")
    done = bench_peers.Outcome("transformers", "5", 7, 0.5, "sdpa")
    child.write_text(f"print('chatter'); print({bench_peers.MARK + json.dumps(asdict(done))!r})")
    assert bench_peers.run_child(job) == done
    child.write_text("print('out of memory'); raise SystemExit(3)")
    assert bench_peers.run_child(job) is None
    assert "transformers: failed with exit code 3\nout of memory" in capsys.readouterr().out


def test_a_child_gets_the_job_it_was_sent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_peers
    from workloads import Workload

    job = bench_peers.Job("vllm", "folder", True, Workload("w", 2, 4, 4, (1, 2)), 3, "cuda")
    seen = []
    done = bench_peers.Outcome("vllm", "0.24", 7, 0.5, "")
    monkeypatch.setitem(bench_peers.RUNNERS, "vllm", lambda received: seen.append(received) or done)
    bench_peers.child_main(json.dumps(asdict(job)))
    assert seen == [job]
    assert capsys.readouterr().out.startswith(bench_peers.MARK)
