"""Flags from a file and from the environment: which of them wins, what a wrong one says, and that the whole is one."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from frontend import flags, launch, model_files
from frontend.digests import collect_digests, digest
from frontend.openai import ChatRequest, CompletionRequest, chat_params, completion_params
from ipc.errors import ConfigError, ModelError
from ipc.logs import LogConfig, configure_logs, configure_news
from tests.frontend.model_folder import tiny_model


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "model: m\nmax-num-seqs: 1\nport: 1\nblock_size: 1\nenforce-eager: true\n")
    environ = {"ENGINE_PORT": "2", "ENGINE_MAX_NUM_SEQS": "2", "ENGINE_ENFORCE_EAGER": "0", "ENGINE_FAKE_STEP_US": "5"}
    options = flags.parse(["--config", file, "--max-num-seqs", "3"], environ)
    assert (options.model, options.block_size, options.port, options.max_num_seqs) == ("m", 1, 2, 3)
    assert options.enforce_eager is False
    assert flags.parse(["other"], environ | {"ENGINE_CONFIG": file}).model == "other"


def test_other_engines_names_work_in_a_file_too(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.yaml", "page-size: 8\ndisable-overlap-schedule: true\nenable-prefix-caching: false\nuds:\n"
    )
    options = flags.parse(["m", f"--config={file}"])
    assert (options.block_size, options.pipeline_depth, options.enable_prefix_caching) == (8, 1, False)


SWITCHES = {name: target for name, target in flags.ALIASES.items() if target[2:5] == "no-" or "eager" in target}


@pytest.mark.parametrize("switch", [*SWITCHES, "--no-enable-prefix-caching"])
def test_a_switch_that_is_false_means_the_opposite_whatever_its_name(tmp_path: Path, switch: str) -> None:
    target = SWITCHES.get(switch, switch)
    opposite = "--" + target[5:] if target.startswith("--no-") else "--no-" + target[2:]
    variable = "ENGINE_" + switch[2:].replace("-", "_").upper()
    file = write(tmp_path / "c.yaml", f"model: m\n{switch[2:]}: false\n")
    on, off = flags.parse(["m", target]), flags.parse(["m", opposite])
    assert on != off
    assert flags.parse(["--config", file]) == flags.parse(["m"], {variable: "0"}) == off
    assert flags.parse(["--config", file], {variable: "1"}) == on


def test_the_key_of_the_environment_is_good_once_and_no_option() -> None:
    environ = {"ENGINE_API_KEY": "sk-environment\n"}
    options = flags.parse(["m", "--api-key", "sk-flag"], environ)
    known = collect_digests(options.api_key, options.api_key_file, environ)
    assert known == (digest("sk-flag"), digest("sk-environment"))
    assert "sk-" not in repr(options)
    assert environ == {}
    for nothing in ("", " \n"):
        with pytest.raises(ConfigError, match="ENGINE_API_KEY: is empty"):
            flags.parse(["m"], {"ENGINE_API_KEY": nothing})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "--prot: no such flag; did you mean --port?"),
        ("port: http", "--port: expected a whole number, got 'http'"),
        ("port: [1]", "port holds a list, expected one value"),
        ("- port", "holds a list, expected flags by name"),
        ("port: [", "is not readable YAML"),
        ("config: more.yaml", "config is no setting"),
        ("help: true", "help is no setting"),
        ("max_num_batched_tokens: 100000000000000000000000", "must be between 1 and 2147483647"),
        ("port: !!python/object/apply:os.getpid []", "is not readable YAML"),
    ],
)
def test_a_wrong_entry_is_one_line_that_names_file_and_flag(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "c.yaml", text)
    assert launch.main(["m", "--config", file]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert file in error
    assert error.count("\n") == 1


def test_a_wrong_variable_names_itself_or_its_flag() -> None:
    with pytest.raises(ConfigError, match="environment: --port: expected a whole number"):
        flags.parse(["m"], {"ENGINE_PORT": "x"})
    with pytest.raises(ConfigError, match="ENGINE_ENFORCE_EAGER: expected true or false, got 'maybe'"):
        flags.parse(["m"], {"ENGINE_ENFORCE_EAGER": "maybe"})
    with pytest.raises(ConfigError, match=r"ENGINE_MAX_NUM_SEQ: no such variable; did you mean ENGINE_MAX_NUM_SEQS\?"):
        flags.parse(["m"], {"ENGINE_MAX_NUM_SEQ": "4"})
    with pytest.raises(ConfigError, match=r"/nowhere\.yaml is not readable"):
        flags.parse(["m", "--config", "/nowhere.yaml"])


def test_a_variable_may_have_an_engines_other_name_and_what_is_none_of_ours_is_left_alone() -> None:
    of_kubernetes = {"ENGINE_SERVICE_HOST": "10.0.0.1", "ENGINE_SERVICE_PORT": "80", "ENGINE_PORT_80_TCP_PROTO": "tcp"}
    options = flags.parse(["m"], {"ENGINE_PAGE_SIZE": "8", "ENGINE_VERSION": "7", "ENGINE_X": "", **of_kubernetes})
    assert flags.changed(options) == {"block-size": 8}
    assert not flags.parse(["m"], {"ENGINE_PRINT_CONFIG": "0"}).print_config


def test_a_printed_configuration_is_the_same_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["m", "--max-num-seqs", "7", "--no-async-scheduling", "--kv-cache-memory-bytes", "4G", "--no-compile"]
    assert launch.main([*given, "--print-config"]) == 0
    file = write(tmp_path / "c.yaml", capsys.readouterr().out)
    options = flags.parse(given)
    assert flags.parse(["--config", file]) == options
    assert flags.changed(options) == {
        "max-num-seqs": 7,
        "pipeline-depth": 1,
        "kv-cache-memory-bytes": 4 * 10**9,
        "compile": False,
    }
    assert flags.changed(replace(options, port=1))["port"] == 1


def test_sampling_defaults_come_from_the_model_and_yield_to_the_request(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    write(folder / "generation_config.json", '{"temperature": 0.6, "top_k": 20, "top_p": 0.9, "do_sample": true}')

    def defaults(*given: str) -> dict[str, float]:
        options = flags.parse([str(folder), "--fake-executor", "--device", "cpu", *given])
        return launch.prepare(options).card.sampling_defaults

    assert defaults() == defaults("--generation-config", str(folder)) == {"temperature": 0.6, "top_k": 20, "top_p": 0.9}
    assert defaults("--generation-config", "vllm") == {}
    params = completion_params(CompletionRequest(prompt="a", temperature=0.0), defaults())
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.0, 20, 0.9, 16)
    assert chat_params(ChatRequest(messages=[]), defaults()).temperature == 0.6
    with pytest.raises(ConfigError, match=r"no generation_config\.json in"):
        defaults("--generation-config", str(tmp_path))
    write(folder / "generation_config.json", '{"temperature": -1}')
    with pytest.raises(ModelError, match="temperature"):
        model_files.read_sampling_defaults(folder)


def test_a_log_line_is_one_line_and_json_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.root.handlers[:], logging.root.level
    try:
        for as_json in (False, True):
            configure_logs("scheduler", LogConfig(level="warning", json=as_json))
            logging.getLogger("x").info("unseen")
            logging.getLogger("x").warning("model %s", "a\nINFO forged")
    finally:
        logging.root.handlers, level = before
        logging.root.setLevel(level)
        configure_news(LogConfig())
    text, structured = capsys.readouterr().err.splitlines()
    assert text.startswith("(scheduler pid=")
    assert text.endswith("] model a\\nINFO forged")
    entry = json.loads(structured)
    assert (entry["level"], entry["process"], entry["message"]) == ("warning", "scheduler", "model a\nINFO forged")
