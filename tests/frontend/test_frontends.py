"""Several frontends on one engine: one port, frontends that join, leave and die, and a scheduler that is away."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import psutil
import pytest

from ipc.schema import PROTOCOL_VERSION, Welcome
from tests.e2e.engine import Engine, read_line, running_engine, wait_until
from tests.frontend.model_folder import tiny_model
from tests.frontend.scripted_scheduler import ScriptedScheduler, card
from tests.frontend.tokenizers_for_tests import byte_level_tokenizer

WAIT_S = 60.0
FRONTENDS = 3


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    flags = ("--fake-executor", "--device", "cpu", "--frontends", str(FRONTENDS), "--metrics-prefix", "vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_FAKE_STEP_US", "2000")
        with running_engine(*flags, model=folder) as engine:
            yield engine


@dataclass
class Frontend:
    """An `engine-frontend` of its own."""

    root: str
    process: subprocess.Popen[str]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)


@contextlib.contextmanager
def joined(endpoint: str, *flags: str) -> Iterator[Frontend]:
    code = "import sys; from frontend.process import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", code, "--connect", endpoint, "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http://\S+(?=/v1)", read_line(process, WAIT_S))
        assert found, "no address"
        yield Frontend(found.group(), process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def status(root: str) -> int:
    return httpx.get(f"{root}/health", timeout=WAIT_S).status_code


def launched(engine: Engine) -> list[psutil.Process]:
    children = psutil.Process(engine.process.pid).children(recursive=True)
    return [child for child in children if "frontend" in " ".join(child.cmdline())]


def metrics(root: str) -> dict[str, float]:
    """Samples of every process-independent family, through whichever frontend answers; no keep-alive."""
    text = httpx.get(f"{root}/metrics", timeout=WAIT_S).text
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


class Load:
    """Streams without end on one address: each is counted when it is whole, and any other ending is a failure."""

    def __init__(self, root: str, streams: int, max_tokens: int = 200) -> None:
        self.root, self.max_tokens = root, max_tokens
        self.whole = 0
        self.ids: list[str] = []
        self.failures: list[str] = []
        self._stop = False
        self._tasks = [asyncio.ensure_future(self._run(seed)) for seed in range(streams)]

    async def _run(self, seed: int) -> None:
        # One connection each time, so that all frontends of the port are met.
        while not self._stop:
            body = {"prompt": "the end", "max_tokens": self.max_tokens, "seed": seed, "stream": True}
            try:
                async with httpx.AsyncClient(timeout=WAIT_S) as client:
                    answer = await client.post(f"{self.root}/v1/completions", json=body)
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                continue
            if answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n"):
                self.whole += 1
                self.ids.append(answer.text[: answer.text.index(",")])
            else:
                self.failures.append(answer.text[-300:])

    async def until_more(self, count: int) -> None:
        """Wait for `count` more whole streams."""
        goal = self.whole + count
        async with asyncio.timeout(WAIT_S):
            while self.whole < goal and not self.failures:
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)


def test_frontends_share_a_port_and_one_of_them_dying_costs_the_others_nothing(engine: Engine) -> None:
    """Through a fourth frontend, whose requests no kill of a launched one can touch."""

    async def main() -> None:
        with joined(engine.endpoint) as own:
            wait_until(lambda: status(own.root) == 200, WAIT_S, "the frontend serves")
            assert len(launched(engine)) == FRONTENDS
            load = Load(own.root, streams=8)
            await load.until_more(8)
            victim = launched(engine)[0]
            victim.kill()
            await load.until_more(16)
            await load.end()
            assert load.failures == []
            assert len(set(load.ids)) == load.whole
            assert own.stop() == 0

    asyncio.run(main())
    wait_until(lambda: len(launched(engine)) == FRONTENDS, WAIT_S, "the killed frontend is replaced")


def test_a_frontend_joins_under_load_and_leaves_without_harm(engine: Engine) -> None:
    async def main() -> None:
        shared = Load(engine.root, streams=6)
        await shared.until_more(6)
        with joined(engine.endpoint) as guest:
            wait_until(lambda: status(guest.root) == 200, WAIT_S, "the frontend serves")
            async with httpx.AsyncClient(timeout=WAIT_S) as client:
                body = {"prompt": "the end", "max_tokens": 1500, "stream": True, "ignore_eos": True}
                async with client.stream("POST", f"{guest.root}/v1/completions", json=body) as answer:
                    lines = answer.aiter_lines()
                    await anext(lines)
                    guest.process.send_signal(signal.SIGTERM)  # with this stream far from its end
                    rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert guest.process.wait(WAIT_S) == 0
        await shared.until_more(6)
        await shared.end()
        assert shared.failures == []
        assert len(set(shared.ids)) == shared.whole

    asyncio.run(main())
    counted = 'vllm:frontends{engine="0",model_name="tiny"}'
    wait_until(lambda: metrics(engine.root)[counted] == FRONTENDS, WAIT_S, "the guest has said goodbye")


def test_a_second_signal_and_the_deadline_end_open_streams_with_an_error(engine: Engine) -> None:
    async def main() -> None:
        with joined(engine.endpoint, "--shutdown-timeout", "0.1") as guest:
            wait_until(lambda: status(guest.root) == 200, WAIT_S, "the frontend serves")
            async with httpx.AsyncClient(timeout=WAIT_S) as client:
                body = {"prompt": "the end", "max_tokens": 2000, "stream": True, "ignore_eos": True}
                async with client.stream("POST", f"{guest.root}/v1/completions", json=body) as answer:
                    lines = answer.aiter_lines()
                    await anext(lines)
                    guest.process.send_signal(signal.SIGTERM)
                    rest = [line async for line in lines if line]
            assert "this frontend is shutting down" in rest[-1]
            assert guest.process.wait(WAIT_S) == 0

    asyncio.run(main())


def test_metrics_are_the_same_through_every_frontend(engine: Engine) -> None:
    def settled() -> dict[str, float]:
        samples = metrics(engine.root)
        return {name: value for name, value in samples.items() if "inflight" not in name}

    before = settled()
    for _ in range(12):
        answer = httpx.post(f"{engine.root}/v1/completions", json={"prompt": "the end", "max_tokens": 5}, timeout=60)
        assert answer.status_code == 200
    labels = 'engine="0",model_name="tiny"'
    after = settled()
    for name, expected in (("request_generation_tokens_sum", 60), ("e2e_request_latency_seconds_count", 12)):
        key = f"vllm:{name}{{{labels}}}"
        assert after[key] - before[key] == expected
    key = f"vllm:inter_token_latency_seconds_count{{{labels}}}"
    assert after[key] - before[key] == 12 * 4
    sent = [after[name] - before.get(name, 0) for name in after if name.startswith("vllm:frontend_tokens_total")]
    assert (len(sent), sum(sent)) == (FRONTENDS, 60)  # each has its own row
    assert all(settled() == after for _ in range(8))  # whoever answers


def test_a_frontend_whose_scheduler_is_away_says_so_and_recovers(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    model = card(str(folder))
    template = folder / "own.jinja"
    template.write_text("{{ messages[0].content }}")
    served, newer = (Welcome(PROTOCOL_VERSION + later, True, model, 1, 100, 16) for later in (0, 1))

    def health() -> tuple[int, str]:
        answer = httpx.get(f"{frontend.root}/health", timeout=WAIT_S)
        return answer.status_code, answer.text and answer.json()["error"]["message"]

    with ScriptedScheduler(model_card=model) as silent:
        silent.answers = False
        with joined(silent.endpoint, "--chat-template", str(template)) as frontend:
            assert health()[0] == 503 and "does not answer" in health()[1]
            silent.hang_up()
            with ScriptedScheduler(model_card=model, welcome=newer, directory=silent.directory):
                wait_until(lambda: f"protocol {PROTOCOL_VERSION + 1}" in health()[1], WAIT_S, "the reason is told")
                assert health()[0] == 503
            with ScriptedScheduler(model_card=model, welcome=served, directory=silent.directory):
                wait_until(lambda: health()[0] == 200, WAIT_S, "it serves")
                body = {"messages": [{"role": "user", "content": "the"}]}
                tokens = httpx.post(f"{frontend.root}/tokenize", json=body, timeout=WAIT_S).json()["tokens"]
                assert tokens == byte_level_tokenizer().encode("the"), "by the template of the flag"
                assert frontend.stop() == 0
