"""The whole engine on two ranks: the tokens of transformers, and nothing lost when a rank dies under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from frontend import AsyncClient, Client
from frontend.request import GenerateParams
from ipc.auth import make_client_keys, make_server_keys
from tests.e2e.engine import DEMO_MODEL, Engine, running_engine
from tests.e2e.equality import LIMIT_S, check
from tests.e2e.reference import Case, greedy_cases, long_cases, sampled_cases
from tests.executor.test_ranks import DEVICES, need_gpus

RANKS = 2
LONG = 80  # tokens of the requests that a rank dies under
CLOSE = 0.5  # log-probabilities: in bfloat16 ranks may choose otherwise where the two best are this close


def flags(device: str, ranks: int, *more: str) -> list[str]:
    chosen = ["--device", device, "--frontends", "0", "--max-num-seqs", "32", "--max-num-batched-tokens", "512"]
    return [*chosen, "--max-model-len", "1024", "--tensor-parallel-size", str(ranks), *more]


@pytest.fixture(scope="module", params=DEVICES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    need_gpus(request.param)
    with running_engine(*flags(request.param, RANKS, "--dtype", "float32")) as engine:
        yield engine


def executors(launcher: subprocess.Popen[Any]) -> list[psutil.Process]:
    found = {}
    for child in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if match := re.search(r"engine-launch: executor ?(\d*)", " ".join(child.cmdline())):
                found[int(match[1] or 0)] = child
    return [found[rank] for rank in sorted(found)]


def test_tokens_are_those_of_transformers(engine: Engine) -> None:
    cases = [*greedy_cases(30, 300, max_tokens=6), *sampled_cases(16, 100, max_tokens=6)]
    stats = check(engine.endpoint, cases, 16)
    assert stats.preemptions == 0


def test_a_rank_that_dies_under_load_costs_no_token(engine: Engine) -> None:
    cases = long_cases(12, max_tokens=LONG)
    before = executors(engine.process)
    assert len(before) == RANKS
    assert tokens_under_load(engine, cases, before[-1].kill) == [list(case.output) for case in cases]
    after = executors(engine.process)
    assert len(after) == RANKS
    assert not {process.pid for process in after} & {process.pid for process in before}


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_on_two_nodes_are_one_replica(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node is a launcher of its own, with one GPU; the other node's rank dies under load."""
    need_gpus(device)
    make_server_keys(tmp_path / "engine")
    make_client_keys(tmp_path / "engine", "replica", tmp_path / "node")
    common = flags(device, RANKS, "--dtype", "float32", "--nnodes", str(RANKS), "--master-addr", "127.0.0.1")
    cases = long_cases(4, max_tokens=LONG // 4)
    with contextlib.ExitStack() as stack:
        nodes: list[subprocess.Popen[bytes]] = []

        def start(port: str) -> None:
            command = [sys.executable, "-P", "-m", "frontend.launch", str(DEMO_MODEL), *common, "--node-rank", "1"]
            command += ["--master-port", port, "--auth-keys", str(tmp_path / "node")]
            nodes.append(subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": "1"}))
            stack.callback(nodes[-1].wait)
            stack.callback(nodes[-1].kill)

        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        own = ("--master-port", "0", "--auth-keys", str(tmp_path / "engine"))
        engine = stack.enter_context(running_engine(*common, *own, on_awaiting=start))
        (here,), (there,) = executors(engine.process), executors(nodes[0])
        assert tokens_under_load(engine, cases, there.kill) == [list(case.output) for case in cases]
        assert (here.pid, there.pid) != (executors(engine.process)[0].pid, executors(nodes[0])[0].pid)


def tokens_under_load(engine: Engine, cases: Sequence[Case], strike: Callable[[], object]) -> list[list[int]]:
    """What the engine says to all of them at once; `strike` is called when one of them is under way."""

    async def generate() -> list[list[int]]:
        running = asyncio.Event()

        async def one(client: AsyncClient, case: Case) -> list[int]:
            tokens: list[int] = []
            async for chunk in client.stream(list(case.prompt), case.params()):
                tokens += chunk.token_ids
                if len(tokens) > LONG // 10:
                    running.set()
            return tokens

        async with AsyncClient(engine.endpoint) as client:
            answers = asyncio.gather(*(one(client, case) for case in cases))
            await running.wait()
            strike()
            return await answers

    return asyncio.run(asyncio.wait_for(generate(), LIMIT_S))


@pytest.mark.gpu
def test_two_gpus_in_bfloat16_choose_what_one_does() -> None:
    """NCCL, CUDA graphs and the fused decoder; tokens are compared until the first close call."""
    need_gpus("cuda")
    prompts = [list(case.prompt) for case in greedy_cases(30, 300, max_tokens=6)]
    params = GenerateParams(max_tokens=32, temperature=0.0, logprobs=2, ignore_eos=True)
    answers = []
    for ranks in (1, RANKS):
        with running_engine(*flags("cuda", ranks, "--dtype", "bfloat16")) as engine, Client(engine.endpoint) as client:
            answers.append([client.generate(prompt, params).choices[0] for prompt in prompts])
    alike = 0
    for one, other in zip(*answers, strict=True):
        assert one.logprobs is not None
        for a, b, entry in zip(one.token_ids, other.token_ids, one.logprobs, strict=True):
            if a != b:
                first, second = (value for _, _, value in entry.top)
                assert first - second < CLOSE, "another token where the choice was clear"
                break
            alike += 1
    assert alike > len(prompts) * 16, "hardly anything was compared"
