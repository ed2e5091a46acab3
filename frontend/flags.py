"""The flags of `engine-launch`, as vLLM names them, and the frozen options they become.

Called by the launcher only. Reads no file but those that flags name, touches no socket or device.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn

import setproctitle
import yaml

from frontend.digests import digest
from frontend.flag_sources import config_file, from_environ, from_file
from frontend.tools import PARSERS
from ipc.auth import has_client_keys
from ipc.config import MAX_DEPTH, EngineConfig, HttpConfig
from ipc.errors import ConfigError
from ipc.logs import LogConfig
from ipc.schema import ModelCard

# Names of other engines for the same thing; they work, and the help shows one name each.
ALIASES: Final = {
    "--model-path": "--model",
    "--model-id": "--model",
    "--context-length": "--max-model-len",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--max-running-requests": "--max-num-seqs",
    "--chunked-prefill-size": "--long-prefill-token-threshold",
    "--page-size": "--block-size",
    "--disable-cuda-graph": "--enforce-eager",
    "--disable-radix-cache": "--no-enable-prefix-caching",
    "--disable-overlap-schedule": "--no-async-scheduling",
    "--api-server-count": "--frontends",
    "--tokenizer-worker-num": "--frontends",
    "--max-queued-requests": "--max-num-queued-reqs",
    "--tp-size": "--tensor-parallel-size",
    "--dp-size": "--data-parallel-size",
}
_SWITCH: Final = argparse.BooleanOptionalAction  # every switch has a --no- form, for files and variables
_UNITS: Final = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the user asked of the launcher. None means: chosen automatically once the model and device are known."""

    model: str
    served_model_name: str | None
    dtype: str
    max_model_len: int | None
    max_logprobs: int
    generation_config: str
    trust_remote_code: bool
    random_weights: bool
    seed: int
    host: str
    port: int
    uds: str | None
    frontends: int
    max_num_queued_reqs: int
    max_num_queued_tokens: int | None
    request_timeout: float | None
    queue_timeout: float | None
    api_key: tuple[str, ...]  # digests
    api_key_file: str | None
    isolate_api_keys: bool
    frontend_endpoint: str | None
    auth_keys: str | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    long_prefill_token_threshold: int | None
    pipeline_depth: int
    enable_prefix_caching: bool
    device: str
    tensor_parallel_size: int
    data_parallel_size: int
    join: str | None
    cluster: str | None
    ray_address: str
    max_replicas: int | None
    max_frontends: int | None
    block_size: int
    num_gpu_blocks_override: int | None
    kv_cache_memory_bytes: int | None
    gpu_memory_utilization: float
    enforce_eager: bool
    compile: bool | None
    watchdog_timeout: float
    shutdown_timeout: float
    metrics_prefix: str
    chat_template: str | None
    tool_call_parser: str | None
    enable_auto_tool_choice: bool
    max_restarts: int
    fake_executor: bool
    print_config: bool
    log_level: str
    log_format: str
    disable_log_stats: bool
    trace: str | None
    enable_debug_endpoints: bool


def _integer(low: int, high: int | None = None) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value}")
        return value

    return parse


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Any:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not low <= value <= high or (above and value == low) or math.isinf(value):
            bounds = f"{'above' if above else 'at least'} {low:g}" + ("" if math.isinf(high) else f", at most {high:g}")
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value:g}")
        return value

    return parse


def _size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"expected bytes such as 4000000000, 4G or 512MiB, got {text!r}")
    value = int(float(match[1]) * _UNITS[match[2] or ""])
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return value


def _metrics_prefix(text: str) -> str:
    if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits and underscores, got {text!r}")
    return text


class FlagParser(argparse.ArgumentParser):
    """argparse that raises ConfigError: a fault of the user is one line, not a usage page."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("model_positional", nargs="?", metavar="MODEL", help="same as --model")
    group.add_argument("--model", metavar="MODEL", help="folder with config.json and safetensors, or hub id ORG/NAME")
    group.add_argument("--served-model-name", metavar="NAME", help="name in the API (default: last part of MODEL)")
    group.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    group.add_argument("--max-model-len", type=_integer(1), metavar="TOKENS", help="context; default: the model's own")
    group.add_argument("--max-logprobs", type=_integer(0, 1000), default=20, metavar="N", help="most a request may ask")
    group.add_argument(
        "--generation-config",
        default="auto",
        metavar="SOURCE",
        help="sampling defaults: auto (the model's), vllm (the API's), or a folder",
    )
    group.add_argument("--seed", type=_integer(0), default=0, help="of random weights; requests bring their own")
    group.add_argument(
        "--trust-remote-code", action=_SWITCH, default=False, help="run Python code found in the model folder"
    )
    group.add_argument(
        "--random-weights", action=_SWITCH, default=False, help="no safetensors needed: for benchmarks of shapes"
    )


def _server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=_integer(0, 65535), default=8000, help="0: a free one (default: %(default)s)")
    group.add_argument("--uds", metavar="PATH", help="listen on a unix socket instead of host and port")
    group.add_argument("--frontends", type=_integer(0, 64), default=1, metavar="N", help="HTTP processes (default: 1)")
    group.add_argument("--max-num-queued-reqs", type=_integer(1), default=100_000, metavar="N", help="beyond: HTTP 429")
    group.add_argument("--max-num-queued-tokens", type=_integer(1), metavar="N", help="of waiting prompts; beyond: 429")
    group.add_argument(
        "--frontend-endpoint", metavar="tcp://HOST:PORT", help="for frontends of other hosts; needs --auth-keys"
    )
    group.add_argument("--auth-keys", metavar="DIR", help="key folder of the engine, by scripts/make_keys.py")


def _cluster_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    group.add_argument("--cluster", choices=("ray",), help="place replicas and frontends on the nodes of a cluster")
    group.add_argument("--ray-address", default="auto", metavar="ADDRESS", help="of a Ray cluster (default: auto)")
    group.add_argument(
        "--max-replicas", type=_integer(1, 1024), metavar="M", help="with --cluster: more of them while requests wait"
    )
    group.add_argument(
        "--max-frontends", type=_integer(1, 1024), metavar="N", help="with --cluster: more of them while many are open"
    )


def _scheduling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scheduling")
    group.add_argument("--max-num-seqs", type=_integer(1, 8192), default=256, metavar="N", help="requests in a step")
    group.add_argument("--max-num-batched-tokens", type=_integer(1), metavar="N", help="tokens in a step")
    group.add_argument(
        "--long-prefill-token-threshold", type=_integer(1), metavar="N", help="prompt tokens of one request in a step"
    )
    group.add_argument(
        "--pipeline-depth",
        type=_integer(0, MAX_DEPTH),
        metavar="D",
        help="steps in flight: 1 synchronous; 0, the default: 2, and 3 while steps take less than 1.5 ms",
    )
    group.add_argument("--async-scheduling", action=_SWITCH, default=None, help="same as depth 0 / depth 1")
    group.add_argument("--enable-prefix-caching", action=_SWITCH, default=True, help="default on")


def _device_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device and memory")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    group.add_argument(
        "--tensor-parallel-size", type=_integer(1, 32), default=1, metavar="N", help="GPUs that share the model"
    )
    group.add_argument(
        "--data-parallel-size",
        type=_integer(0, 1024),
        default=1,
        metavar="M",
        help="replicas of the model that share the requests; 0: only those that join",
    )
    group.add_argument(
        "--join", metavar="ENDPOINT", help="of a running engine that the replicas of this one shall be a part of"
    )
    group.add_argument("--block-size", type=_integer(1, 256), default=16, metavar="TOKENS", help="tokens of a KV block")
    group.add_argument("--num-gpu-blocks-override", type=_integer(2), metavar="N", help="KV blocks; default: profile")
    group.add_argument("--kv-cache-memory-bytes", type=_size_bytes, metavar="SIZE", help="such as 4G, or 512MiB")
    group.add_argument("--gpu-memory-utilization", type=_number(0, 1, above=True), default=0.9, metavar="SHARE")
    group.add_argument("--enforce-eager", action=_SWITCH, default=False, help="no CUDA graphs, nothing compiled")
    group.add_argument("--compile", action=_SWITCH, help="compile the decoder layers (default: on CUDA)")


def _api_key(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return digest(text)


def hide_api_keys(program: str, argv: Sequence[str]) -> None:
    """Keep the keys of a command line out of `ps`. Anyone could read them until now: a file is safer."""
    shown, value_is_key = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        is_flag = name.replace("_", "-") == "--api-key"
        shown.append("***" if value_is_key else f"{name}=***" if is_flag and equals else argument)
        value_is_key = is_flag and not equals
    if shown != list(argv):
        setproctitle.setproctitle(" ".join((program, *shown)))


def http_flags(parser: argparse.ArgumentParser) -> None:
    """What every serving frontend has a say in: also flags of `engine-frontend`."""
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--watchdog-timeout", type=_number(0, above=True), default=60.0, metavar="S", help="a step longer is a hang"
    )
    group.add_argument(
        "--shutdown-timeout", type=_number(0), default=30.0, metavar="S", help="for open requests at SIGTERM"
    )
    group.add_argument(
        "--request-timeout", type=_number(0, above=True), metavar="S", help="a request that takes longer fails"
    )
    group.add_argument(
        "--queue-timeout", type=_number(0, above=True), metavar="S", help="a request that waits longer to run fails"
    )
    group.add_argument(
        "--api-key",
        action="append",
        type=_api_key,
        default=[],
        metavar="KEY",
        help="needed to use the API; may be repeated. A file, or ENGINE_API_KEY in the environment, is safer",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="a key a line")
    group.add_argument("--isolate-api-keys", action=_SWITCH, default=False, help="keys share no cached prefixes")
    group.add_argument(
        "--metrics-prefix", type=_metrics_prefix, default="engine", metavar="NAME", help="vllm: for its dashboards"
    )
    group.add_argument("--chat-template", metavar="FILE", help="jinja file, instead of the model's own template")
    group.add_argument(
        "--tool-call-parser", choices=PARSERS, help="how the model writes tool calls (default: by its chat template)"
    )
    group.add_argument(
        "--enable-auto-tool-choice", action=argparse.BooleanOptionalAction, default=True, help="always on"
    )


def _configuration_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("configuration and logs")
    group.add_argument(
        "--config", metavar="FILE", help="YAML, such as `port: 9000`; ENGINE_PORT=9000 in the environment wins over it"
    )
    group.add_argument("--print-config", action="store_true", help="print every option as such a file, and exit")
    group.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    group.add_argument("--log-format", default="text", choices=("text", "json"))
    group.add_argument(
        "--disable-log-stats", action=_SWITCH, default=False, help="no line of statistics every ten seconds"
    )


def _supervision_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("supervision")
    group.add_argument("--max-restarts", type=_integer(0), default=3, metavar="N", help="of a process in ten minutes")
    group.add_argument(
        "--fake-executor", action=_SWITCH, default=False, help="made-up tokens: measures everything but the model"
    )
    group.add_argument(
        "--enable-debug-endpoints", action=_SWITCH, default=False, help="GET /debug/invariants, POST /debug/trace"
    )


def _debug_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("looking inside")
    group.add_argument("--trace", metavar="FILE", help="write a Perfetto trace of every step when the engine stops")


def make_parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="engine-launch",
        description="Serve a language model over the OpenAI API.",
        epilog="Underscores work as dashes. Also understood: " + ", ".join(ALIASES) + ".",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tandem-engine {version('tandem-engine')}")
    groups = (
        _model_flags,
        _server_flags,
        _cluster_flags,
        _scheduling_flags,
        _device_flags,
        http_flags,
        _supervision_flags,
        _configuration_flags,
        _debug_flags,
    )
    for add in groups:
        add(parser)
    return parser


def _canonical(argument: str) -> str:
    """`--max_num_seqs=4` and other engines' names as this parser knows them; anything else unchanged."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = name.replace("_", "-")
    return ALIASES.get(name, name) + equals + value


def _unknown_flag(parser: argparse.ArgumentParser, argument: str) -> ConfigError:
    name = argument.partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings] + list(ALIASES)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; see --help"
    return ConfigError(f"{name}: no such flag{hint}" if name.startswith("-") else f"unexpected argument {name!r}")


def parse(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Options:
    """The options in a file, in `environ`, and in `argv` (without the program's name); the later ones win.

    Raises ConfigError with one line naming the flag.
    """
    environ = environ or {}
    parser = make_parser()
    canonical = [_canonical(argument) for argument in argv]
    namespace = argparse.Namespace()
    file = config_file(canonical, environ)
    if file is not None:
        _apply(parser, [_canonical(argument) for argument in from_file(file)], namespace, f"{file}: ")
    _apply(parser, from_environ(parser, environ), namespace, "environment: ")
    default_model = getattr(namespace, "model", None)
    _apply(parser, canonical, namespace, "")
    values = vars(namespace)
    values.pop("config")
    positional, is_async = values.pop("model_positional"), values.pop("async_scheduling")
    if positional and values["model"] not in (None, default_model):
        raise ConfigError(f"--model: given twice, as {positional!r} and {values['model']!r}")
    values["model"] = positional or values["model"]
    if not values["model"]:
        raise ConfigError("--model: needed, a folder or a hub id such as Qwen/Qwen3-0.6B")
    depth = values["pipeline_depth"]
    if is_async is not None and depth is not None and is_async != (depth != 1):
        flag = "--async-scheduling" if is_async else "--no-async-scheduling"
        raise ConfigError(f"--pipeline-depth: {depth} contradicts {flag}")
    _check_endpoint(values["frontend_endpoint"], values["auth_keys"])
    _check_cluster(values)
    _check_join(values["join"], values["frontend_endpoint"], values["auth_keys"])
    values["api_key"] = tuple(values["api_key"])
    values["pipeline_depth"] = (1 if is_async is False else 0) if depth is None else depth
    return Options(**values)


def _apply(parser: argparse.ArgumentParser, arguments: list[str], namespace: argparse.Namespace, where: str) -> None:
    """Parse `arguments` over what `namespace` holds; errors begin with `where`."""
    try:
        _, unknown = parser.parse_known_args(arguments, namespace)
        if unknown:
            raise _unknown_flag(parser, unknown[0])
    except ConfigError as error:
        raise ConfigError(where + error.message) from error


def changed(options: Options) -> dict[str, Any]:
    """The options that are not the defaults, by flag."""
    default = asdict(parse([options.model]))
    return {_flag_of(name): value for name, value in _told(options).items() if value != default[name]}


def _told(options: Options) -> dict[str, Any]:
    """The options that may be shown."""
    return {name: value for name, value in asdict(options).items() if name not in ("api_key", "print_config")}


def as_yaml(options: Options) -> str:
    """All options as a file for --config."""
    values = {_flag_of(name): value for name, value in _told(options).items()}
    return str(yaml.safe_dump(values, sort_keys=False))


def _flag_of(name: str) -> str:
    return name.replace("_", "-")


def _check_endpoint(endpoint: str | None, keys: str | None) -> None:
    if endpoint is None:
        return
    if not re.fullmatch(r"tcp://(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):\d{1,5}", endpoint):
        raise ConfigError(f"--frontend-endpoint: expected tcp://HOST:PORT, got {endpoint!r}")
    if keys is None:
        raise ConfigError(
            f"--frontend-endpoint: {endpoint} needs --auth-keys: tcp is served encrypted only, to clients with "
            "listed keys; scripts/make_keys.py makes them"
        )


def _check_cluster(values: Mapping[str, Any]) -> None:
    """A cluster's launcher makes addresses and keys by itself."""
    if values["cluster"] is None:
        for name in ("max_replicas", "max_frontends"):
            if values[name] is not None:
                raise ConfigError(f"--{_flag_of(name)}: needs --cluster ray")
        return
    for name in ("join", "frontend_endpoint", "auth_keys", "uds", "trace"):
        if values[name] is not None:
            raise ConfigError(f"--{_flag_of(name)}: means nothing with --cluster {values['cluster']}")
    if values["api_key"]:
        raise ConfigError("--api-key: cannot be passed on to other nodes, use --api-key-file or ENGINE_API_KEY")
    for low, high in (("data_parallel_size", "max_replicas"), ("frontends", "max_frontends")):
        if values[low] < 1:
            raise ConfigError(f"--{_flag_of(low)}: a cluster needs at least 1, got {values[low]}")
        if values[high] is not None and values[high] < values[low]:
            raise ConfigError(f"--{_flag_of(high)}: {values[high]} is below --{_flag_of(low)} {values[low]}")


def _check_join(directory: str | None, endpoint: str | None, keys: str | None) -> None:
    """Other hosts find a replica by the address that it announces."""
    if directory is None or directory.startswith("ipc://"):
        return
    if not directory.startswith("tcp://"):
        raise ConfigError(f"--join: expected ipc://PATH or tcp://HOST:PORT, got {directory!r}")
    if endpoint is None or endpoint.startswith(("tcp://0.0.0.0:", "tcp://[::]:")):
        raise ConfigError(
            f"--join: {directory} needs --frontend-endpoint with the address that others reach this host by"
        )
    if keys is None or not has_client_keys(keys):
        raise ConfigError(f"--join: {directory} needs --auth-keys with the engine's keys and those of a client")


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable: {error}", param="--chat-template") from error


def engine_config(
    options: Options, card: ModelCard, device: str, api_key_digests: tuple[str, ...] = ()
) -> EngineConfig:
    """The configuration of the engine's processes, with the choices that depend on the device made."""
    budget_tokens = options.max_num_batched_tokens or (8192 if device == "cuda" else 2048)
    return EngineConfig(
        card=card,
        dtype=options.dtype,
        device=device,
        random_weights=options.random_weights,
        random_seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        enforce_eager=options.enforce_eager,
        compile=(device == "cuda" if options.compile is None else options.compile) and not options.enforce_eager,
        ranks=options.tensor_parallel_size,
        block_size=options.block_size,
        num_blocks=options.num_gpu_blocks_override,
        kv_cache_bytes=options.kv_cache_memory_bytes,
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=budget_tokens,
        max_prefill_chunk=options.long_prefill_token_threshold,
        enable_prefix_caching=options.enable_prefix_caching,
        pipeline_depth=options.pipeline_depth,
        max_num_queued_reqs=options.max_num_queued_reqs,
        max_num_queued_tokens=options.max_num_queued_tokens,
        watchdog_timeout_s=options.watchdog_timeout,
        frontend_endpoint=options.frontend_endpoint or "",
        auth_keys=options.auth_keys or "",
        debug_endpoints=options.enable_debug_endpoints,
        http=http_config(options, api_key_digests),
        log=LogConfig(level=options.log_level, json=options.log_format == "json"),
        log_stats=not options.disable_log_stats,
    )


def http_config(options: Options | argparse.Namespace, api_key_digests: tuple[str, ...]) -> HttpConfig:
    """What `http_flags` said."""
    return HttpConfig(
        watchdog_timeout_s=options.watchdog_timeout,
        shutdown_timeout_s=options.shutdown_timeout,
        request_timeout_s=options.request_timeout,
        queue_timeout_s=options.queue_timeout,
        metrics_prefix=options.metrics_prefix,
        chat_template=None if options.chat_template is None else _read_template(options.chat_template),
        tool_call_parser=options.tool_call_parser,
        api_key_digests=api_key_digests,
        isolate_api_keys=options.isolate_api_keys,
    )
