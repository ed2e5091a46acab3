"""`engine-launch` before anything starts: flags, the HTTP socket, and one line with exit code 2 for a user's fault."""

from __future__ import annotations

import socket
from dataclasses import asdict

import pytest

from frontend import flags, launch
from frontend.listener import bind_http, url_of
from ipc.errors import ConfigError
from ipc.schema import ModelCard
from tests.frontend.model_folder import tiny_model, write_config, write_safetensors


def test_defaults():
    options = flags.parse(["some/model"])
    assert (options.model, options.host, options.port) == ("some/model", "127.0.0.1", 8000)
    assert (options.pipeline_depth, options.enable_prefix_caching, options.device) == (0, True, "auto")


def test_flags_for_what_is_always_so_mean_nothing(tmp_path):
    (tmp_path / "file.yaml").write_text("enable_request_id_headers: true\n")
    assert flags.parse(["m", *flags.ALWAYS, "--config", str(tmp_path / "file.yaml")]) == flags.parse(["m"])


@pytest.mark.parametrize("alias", flags.ALIASES)
def test_other_engines_names_mean_the_same(alias):
    target = flags.ALIASES[alias]
    value = {"--model": ["m"], "--gpu-memory-utilization": ["0.5"]}.get(target, ["8"])
    if target.startswith("--no-") or target == "--enforce-eager":
        value = []
    model = [] if target == "--model" else ["m"]
    assert asdict(flags.parse([*model, alias, *value])) == asdict(flags.parse([*model, target, *value]))
    assert target == "--model" or flags.parse([*model, alias, *value]) != flags.parse(model)


def test_underscores_are_dashes_and_equals_is_a_space():
    assert flags.parse(["m", "--max_num_seqs=7"]).max_num_seqs == 7
    assert flags.parse(["--model=some_model"]).model == "some_model"


@pytest.mark.parametrize(
    ("given", "depth"),
    [
        ([], 0),
        (["--no-async-scheduling"], 1),
        (["--async-scheduling"], 0),
        (["--pipeline-depth", "3"], 3),
        (["--async-scheduling", "--pipeline-depth", "3"], 3),
        (["--no-async-scheduling", "--pipeline-depth", "1"], 1),
    ],
)
def test_async_scheduling_is_a_depth(given, depth):
    assert flags.parse(["m", *given]).pipeline_depth == depth


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("4G", 4 * 10**9), ("512MiB", 512 << 20), ("1.5k", 1500), ("2gi", 2 << 30)]
)
def test_sizes(text, size):
    assert flags.parse(["m", "--kv-cache-memory-bytes", text]).kv_cache_memory_bytes == size


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["m", "--prot", "1"], "--prot: no such flag; did you mean --port?"),
        (["m", "--max_model_length=5"], "--max-model-length: no such flag; did you mean --max-model-len?"),
        (["m", "--port", "http"], "--port: expected a whole number, got 'http'"),
        (["m", "--port", "65536"], "--port: must be between 0 and 65535, got 65536"),
        (["m", "--pipeline-depth", "4"], "--pipeline-depth: must be between 0 and 3, got 4"),
        (["m", "--pipeline-depth", "2", "--no-async-scheduling"], "--pipeline-depth: 2 contradicts"),
        (["m", "--max-num-seqs", "0"], "--max-num-seqs: must be between 1 and 8192, got 0"),
        (["m", "--gpu-memory-utilization", "nan"], "--gpu-memory-utilization: must be above 0, at most 1, got nan"),
        (["m", "--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization: must be"),
        (["m", "--kv-cache-memory-bytes", "lots"], "--kv-cache-memory-bytes: expected bytes"),
        (["m", "--watchdog-timeout", "inf"], "--watchdog-timeout: must be above 0, got inf"),
        (["m", "--dtype", "int4"], "--dtype: invalid choice: 'int4'"),
        (["m", "--host"], "--host: expected one argument"),
        (["m", "other"], "unexpected argument 'other'"),
        (["m", "--model", "other"], "--model: given twice"),
        ([], "--model: needed"),
    ],
)
def test_bad_flags_are_one_line_with_their_name(capsys, given, said):
    assert launch.main(given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_help_shows_groups_and_each_flag_once(capsys):
    with pytest.raises(SystemExit) as caught:
        launch.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for group in ("model:", "server:", "scheduling:", "device and memory:", "supervision:"):
        assert f"\n{group}\n" in text


def test_config_carries_every_choice():
    text = (
        "m --max-num-seqs 4 --chunked-prefill-size 7 --block-size 8 --no-enable-prefix-caching --dtype float32"
        " --num-gpu-blocks-override 50 --pipeline-depth 3 --watchdog-timeout 9"
    )
    options = flags.parse(text.split())
    card = ModelCard("m", "/m", 64, 100, (0,), 5)
    config = flags.engine_config(options, card, "cpu")
    assert (config.max_num_seqs, config.max_prefill_chunk, config.block_size, config.num_blocks) == (4, 7, 8, 50)
    assert (config.pipeline_depth, config.dtype, config.watchdog_timeout_s) == (3, "float32", 9.0)
    assert config.enable_prefix_caching is False
    assert config.max_num_batched_tokens < flags.engine_config(options, card, "cuda").max_num_batched_tokens


def test_port_zero_takes_a_free_port_and_says_which():
    with bind_http("127.0.0.1", 0, None) as listener:
        port = listener.getsockname()[1]
        assert port > 0
        assert url_of(listener) == f"http://127.0.0.1:{port}/v1"


def test_ipv6_url_has_brackets():
    try:
        listener = bind_http("::1", 0, None)
    except ConfigError:
        pytest.skip("no IPv6 loopback here")
    with listener:
        assert url_of(listener).startswith("http://[::1]:")


def test_a_taken_port_is_known_before_anything_starts(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert launch.main(["/no/such/model", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"engine-launch: error: --port: cannot listen on 127.0.0.1 port {port}: Address already")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 300])
def test_an_unusable_host_names_the_flag(host):
    with pytest.raises(ConfigError) as caught:
        bind_http(host, 0, None)
    assert caught.value.param == "--host"


def test_unix_socket_replaces_a_dead_one_and_respects_a_living_one(tmp_path):
    path = str(tmp_path / "http.sock")
    with bind_http("", 0, path) as listener:
        assert url_of(listener) == f"unix:{path}"
        with pytest.raises(ConfigError) as caught:
            bind_http("", 0, path)
        assert caught.value.param == "--uds"
    bind_http("", 0, path).close()
    with pytest.raises(ConfigError, match="is empty"):
        bind_http("", 0, "")


def test_a_unix_socket_never_replaces_a_file(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError):
        bind_http("", 0, str(path))
    assert path.read_text() == "data"


def test_unknown_model_and_truncated_weights_exit_2_with_one_line(capsys, tmp_path):
    assert launch.main(["/no/such/model", "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert error == "engine-launch: error: --model: no such folder: /no/such/model\n"

    write_config(tmp_path)
    path = write_safetensors(tmp_path / "model.safetensors", 100)
    path.write_bytes(path.read_bytes()[:-10])
    size = path.stat().st_size
    assert launch.main([str(tmp_path), "--port", "0", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"expected {size + 10} bytes, found {size}" in error


def test_cuda_without_a_gpu_exits_2(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "cuda_devices", lambda: 0)
    assert launch.main([str(tiny_model(tmp_path)), "--port", "0", "--device", "cuda"]) == 2
    assert "--device: cuda asked for, but the NVIDIA driver shows no GPU" in capsys.readouterr().err


def test_auto_device_follows_the_driver(monkeypatch):
    for count, device in ((0, "cpu"), (1, "cuda")):
        monkeypatch.setattr(launch, "cuda_devices", lambda count=count: count)
        assert launch.choose_device("auto") == device
        assert launch.choose_device("cpu") == "cpu"


def test_rings_that_do_not_fit_into_shared_memory_name_the_flag(capsys, tmp_path, monkeypatch):
    def no_space(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("frontend.plumbing.create_ring", no_space)
    assert launch.main([str(tiny_model(tmp_path)), "--port", "0", "--fake-executor", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "--max-num-batched-tokens: /dev/shm cannot hold the rings" in error
    assert error.count("\n") == 1


def test_too_few_files_name_the_limit(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "raise_file_limit", lambda: 150)
    command = [str(tiny_model(tmp_path)), "--port", "0", "--device", "cpu", "--frontends", "2"]
    assert launch.main(command) == 2
    error = "engine-launch: error: ulimit -n: a process may open 150 files, this engine needs 224\n"
    assert capsys.readouterr().err == error
