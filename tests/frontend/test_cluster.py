"""`engine-launch --cluster ray` on a Ray cluster of three nodes on this machine, with the fake executor."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from frontend import flag_groups, flags
from frontend.cluster import frontend_part, make_keys, replica_part, resources, take_api_keys
from frontend.digests import collect_digests, digest
from frontend.host import write_private
from ipc.auth import load_client_keys, load_server_keys
from ipc.errors import ConfigError
from tests.e2e.engine import read_line, wait_until
from tests.frontend.model_folder import tiny_model

START_S, STOP_S = 120.0, 60.0
HEAD = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray cluster of three nodes with a core each, one of which is for frontends."""
    pytest.importorskip("ray", reason="the optional extra [ray] is not installed")
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("ENGINE_FAKE_STEP_US", "10000")  # what runs on a node has the environment of the node
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20, resources={"frontend": 2})
    yield cluster.address
    cluster.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def programs(kind: str) -> list[psutil.Process]:
    """What Ray actors run on any node: "launch", replicas, or "process", frontends."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if "frontend.host" in command and kind in command and {"--join", "--connect", "--node-rank"} & set(command):
                found.append(process)
    return found


def answers(url: str, count: int, max_tokens: int) -> list[Any]:
    """The choices of so many requests at once, all of which must succeed."""

    def ask(seed: int) -> Any:
        body = {"prompt": [1, 8, 9 + seed], "max_tokens": max_tokens, "seed": seed, "return_token_ids": True}
        answer = httpx.post(f"{url}/completions", json=body, timeout=START_S)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask, range(count)))


def running(url: str) -> dict[str, float]:
    """Requests that run in each replica that answers, by its number."""
    text = httpx.get(url.removesuffix("/v1") + "/metrics", timeout=START_S).text
    return {n: float(value) for n, value in re.findall(r'num_requests_running\{engine="(\d+)".*?\} (\S+)', text)}


@pytest.mark.slow
def test_a_cluster_serves_loses_a_node_program_and_grows(address: str, folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "frontend.launch", str(folder), "--cluster", "ray", "--ray-address", address]
    command += ["--data-parallel-size", "2", "--max-replicas", "3", "--fake-executor", "--port", "0"]
    command += ["--max-num-seqs", "8"]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = read_line(launcher, START_S)
        url = re.search(r"http://\S+/v1", line)
        assert url, line
        calm = answers(url[0], 6, 300)
        assert len(running(url[0])) == 2

        with concurrent.futures.ThreadPoolExecutor() as pool:  # a replica dies under load: Ray starts it again
            asked = pool.submit(answers, url[0], 6, 300)
            wait_until(lambda: sum(running(url[0]).values()) == 6, START_S, "all run")
            victim = programs("launch")[0]
            victim.kill()
            assert asked.result() == calm, "no stream is lost or changed"
        wait_until(lambda: len(programs("launch")) == 2, START_S, "Ray started it again")
        wait_until(lambda: len(running(url[0])) == 2, START_S, "it serves again")

        assert len(answers(url[0], 40, 150)) == 40  # more than two replicas run at a time
        wait_until(lambda: len(running(url[0])) == 3, START_S, "a third one has come")
        mine = psutil.Process(launcher.pid).children(recursive=True)
        mine += [p for program in programs("launch") + programs("process") for p in program.children(recursive=True)]
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(STOP_S) == 0
        _, alive = psutil.wait_procs(mine, STOP_S)
        assert not alive
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not programs("launch") + programs("process"), STOP_S, "nothing is left")


def test_ranks_are_on_two_nodes_and_a_killed_launcher_leaves_nothing(address: str, folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "frontend.launch", str(folder), "--cluster", "ray", "--ray-address", address]
    command += ["--tensor-parallel-size", "2", "--nnodes", "2", "--fake-executor", "--port", "0"]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+/v1", read_line(launcher, START_S))
        assert url
        assert len(programs("launch")) == 2, "a launcher for each node of the replica"
        calm = answers(url[0], 2, 200)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = pool.submit(answers, url[0], 2, 200)
            wait_until(lambda: sum(running(url[0]).values()) == 2, START_S, "both run")
            [victim] = [program for program in programs("launch") if "--node-rank" in program.cmdline()]
            victim.kill()
            assert asked.result() == calm, "Ray starts it again, and no stream is lost or changed"
        assert len(programs("launch") + programs("process")) == 3
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not programs("launch") + programs("process"), STOP_S, "Ray ended them with their launcher")


def options_of(*argv: str) -> flags.Options:
    return flags.parse(["--model", "m", "--cluster", "ray", *argv])


def test_no_cluster_is_one_line(folder: Path) -> None:
    pytest.importorskip("ray", reason="the optional extra [ray] is not installed")
    command = [sys.executable, "-P", "-m", "frontend.launch", str(folder), "--cluster", "ray"]
    ended = subprocess.run([*command, "--ray-address", "127.0.0.1:1"], capture_output=True, text=True, timeout=START_S)
    assert ended.returncode == 2
    assert "--ray-address: no Ray cluster at '127.0.0.1:1'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_keys_are_told_to_whom_they_are_for_and_lie_in_private_files(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "made")
    secrets = {name: {path for path in files if path.endswith("_secret")} for name, files in keys.items()}
    assert secrets["frontend"] == secrets["launcher"] == secrets["replica-node"] == {"client.key_secret"}
    assert secrets["engine"] == {"server.key_secret"}
    options = options_of()
    replica = replica_part(options, keys, "tcp://d:1", 1, {})
    frontend = frontend_part(options, keys["frontend"], b"sk-1", "tcp://d:1", {})
    for part in (replica, frontend):
        folder = tmp_path / part.program
        write_private(folder, part.files)
        found = [path for path in folder.rglob("*") if path.is_file()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o600}
        load_client_keys(folder / "keys")
        for content in part.files.values():
            assert content.decode() not in repr(part)
    load_server_keys(tmp_path / "launch" / "keys")
    assert not (tmp_path / "process" / "keys" / "server.key_secret").exists()


def test_what_a_replica_is_told_is_what_the_launcher_was_told(tmp_path: Path) -> None:
    options = options_of("--max-num-seqs", "7", "--max-replicas", "9", "--frontends", "3", "--dtype", "float32")
    part = replica_part(options, make_keys(tmp_path / "made"), "tcp://d:1", 1, {})
    write_private(tmp_path / "node", part.files)
    arguments = [text.format(address="node", folder=tmp_path / "node") for text in part.arguments]
    told = flags.parse(arguments)
    assert told == replace(
        options, cluster=None, max_replicas=None, frontends=0, join="tcp://d:1", port=0,
        frontend_endpoint="tcp://node:0", auth_keys=str(tmp_path / "node" / "keys"),
    )  # fmt: skip


def test_every_flag_that_a_frontend_understands_is_told_to_it_or_means_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-file")
    (tmp_path / "template").write_text("{{ messages }}")
    files = {"api_key_file": str(tmp_path / "keys"), "chat_template": str(tmp_path / "template")}
    values = {"watchdog_timeout": 7.0, "shutdown_timeout": 8.0, "request_timeout": 9.0, "queue_timeout": 10.0,
              "allowed_origins": "https://a.example,*", "metrics_prefix": "vllm", "tool_call_parser": "hermes",
              "log_level": "debug", "log_format": "json"}  # fmt: skip
    parser = flag_groups.FlagParser()
    flag_groups.http_flags(parser)
    flag_groups.log_flags(parser)
    # --api-key is refused with --cluster, and --enable-auto-tool-choice means nothing.
    untold = {"api_key": [], "enable_auto_tool_choice": True}
    assert vars(parser.parse_args([])).keys() == {*files, *values, *untold, "isolate_api_keys"}

    given = [f"--{name.replace('_', '-')}={value}" for name, value in (values | files).items()]
    options = options_of("--isolate-api-keys", *given)
    part = frontend_part(options, {}, take_api_keys(options, {}), "tcp://d:1", {})
    write_private(tmp_path / "node", part.files)
    told, _ = parser.parse_known_args([text.format(address="", folder=tmp_path / "node") for text in part.arguments])
    assert all(Path(getattr(told, name)).read_text() == Path(path).read_text() for name, path in files.items())
    assert {k: v for k, v in vars(told).items() if k not in files} == values | untold | {"isolate_api_keys": True}


def test_frontends_take_the_key_of_the_launchers_environment_and_nobody_inherits_it(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-file\n")
    environ = {"ENGINE_API_KEY": "sk-environment"}
    argv = ["m", "--cluster", "ray", "--api-key-file", str(tmp_path / "keys")]
    options = flags.parse(argv, environ)
    part = frontend_part(options, {}, take_api_keys(options, environ), "tcp://d:1", {})
    assert environ == {}
    write_private(tmp_path / "node", part.files)
    told = dict(zip(part.arguments, part.arguments[1:], strict=False))["--api-key-file"]
    known = collect_digests((), told.format(folder=tmp_path / "node"), {})
    assert known == (digest("sk-file"), digest("sk-environment"))
    assert not [text for text in (*part.arguments, repr(part), flags.as_yaml(options)) if "sk-" in text]


def test_ranks_are_on_as_few_nodes_as_have_gpus_for_them() -> None:
    nodes = [{"Alive": True, "Resources": {"GPU": 4.0, "CPU": 8}}, {"Alive": False, "Resources": {"GPU": 16.0}}]

    def asked(ranks: int, *argv: str) -> tuple[int, dict[str, float]]:
        return resources(options_of("--tensor-parallel-size", str(ranks), *argv), nodes)

    assert asked(4) == (1, {"CPU": 5.0, "GPU": 4.0})
    assert asked(16) == (4, {"CPU": 5.0, "GPU": 4.0})
    assert asked(6) == (2, {"CPU": 4.0, "GPU": 3.0})
    assert asked(4, "--nnodes", "4") == (4, {"CPU": 2.0, "GPU": 1.0})
    assert asked(4, "--device", "cpu") == (1, {"CPU": 1.0})
    with pytest.raises(ConfigError, match=r"10 ranks on 2 nodes need 5 GPUs of each.* more than 4"):
        asked(10, "--nnodes", "2")
    with pytest.raises(ConfigError, match=r"2 ranks on 1 nodes need 2 GPUs of each.* more than 0"):
        resources(options_of("--tensor-parallel-size", "2", "--device", "cuda"), [])


def test_flags_that_contradict_a_cluster_are_refused() -> None:
    for argv, reason in (
        (["--join", "ipc:///x"], "--join: means nothing with --cluster ray"),
        (["--api-key", "k"], "--api-key: cannot be passed on to other nodes"),
        (["--max-replicas", "1", "--data-parallel-size", "2"], "--max-replicas: 1 is below --data-parallel-size 2"),
        (["--frontends", "0"], "--frontends: a cluster needs at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(reason)):
            options_of(*argv)
    with pytest.raises(ConfigError, match="--max-replicas: needs --cluster ray"):
        flags.parse(["--model", "m", "--max-replicas", "2"])
