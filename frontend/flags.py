"""The flags of `engine-launch`, as vLLM names them, and the frozen options they become.

Called by the launcher only. Reads no file but those that flags name, touches no socket or device.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import setproctitle
import yaml

from frontend.flag_groups import GROUPS, FlagParser
from frontend.flag_sources import config_file, from_environ, from_file
from ipc.auth import has_client_keys
from ipc.config import EngineConfig, HttpConfig
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
# vLLM's switches for what cannot be had otherwise here; they are taken, and mean nothing.
ALWAYS: Final = ("--disable-uvicorn-access-log", "--enable-prompt-tokens-details", "--enable-request-id-headers")


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
    allowed_origins: str | None
    frontend_endpoint: str | None
    auth_keys: str | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    long_prefill_token_threshold: int | None
    pipeline_depth: int
    enable_prefix_caching: bool
    device: str
    tensor_parallel_size: int
    disable_custom_all_reduce: bool
    nnodes: int | None
    node_rank: int
    master_addr: str | None
    master_port: int
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


def make_parser() -> FlagParser:
    parser = FlagParser(
        prog="engine-launch",
        description="Serve a language model over the OpenAI API.",
        epilog=f"Underscores work as dashes. Also understood: {', '.join([*ALIASES, *ALWAYS])}.",
        aliases=ALIASES,
    )
    parser.add_argument("--version", action="version", version=f"tandem-engine {version('tandem-engine')}")
    for add in GROUPS:
        add(parser)
    return parser


def _wanted(arguments: Sequence[str]) -> list[str]:
    """`arguments` by this parser's names, without those that ask for what always is."""
    return [flag for argument in arguments if (flag := _canonical(argument)) not in ALWAYS]


def _canonical(argument: str) -> str:
    """`--max_num_seqs=4` and other engines' names as this parser knows them; anything else unchanged."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = name.replace("_", "-")
    return ALIASES.get(name, name) + equals + value


def parse(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Options:
    """The options in a file, in `environ`, and in `argv` (without the program's name); the later ones win.

    Raises ConfigError with one line naming the flag.
    """
    environ = environ or {}
    parser = make_parser()
    canonical = _wanted(argv)
    namespace = argparse.Namespace()
    file = config_file(canonical, environ)
    if file is not None:
        _apply(parser, _wanted(from_file(parser, file)), namespace, f"{file}: ")
    _apply(parser, _wanted(from_environ(parser, environ)), namespace, "environment: ")
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
    _check_nodes(values)
    _check_join(values["join"], values["frontend_endpoint"], values["auth_keys"])
    values["api_key"] = tuple(values["api_key"])
    values["pipeline_depth"] = (1 if is_async is False else 0) if depth is None else depth
    return Options(**values)


def _apply(parser: FlagParser, arguments: list[str], namespace: argparse.Namespace, where: str) -> None:
    """Parse `arguments` over what `namespace` holds; errors begin with `where`."""
    try:
        parser.parse_args(arguments, namespace)
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
    for name in ("join", "frontend_endpoint", "auth_keys", "uds", "trace", "master_addr"):
        if values[name] is not None:
            raise ConfigError(f"--{_flag_of(name)}: means nothing with --cluster {values['cluster']}")
    if values["api_key"]:
        raise ConfigError("--api-key: cannot be passed on to other nodes, use --api-key-file or ENGINE_API_KEY")
    for low, high in (("data_parallel_size", "max_replicas"), ("frontends", "max_frontends")):
        if values[low] < 1:
            raise ConfigError(f"--{_flag_of(low)}: a cluster needs at least 1, got {values[low]}")
        if values[high] is not None and values[high] < values[low]:
            raise ConfigError(f"--{_flag_of(high)}: {values[high]} is below --{_flag_of(low)} {values[low]}")


def _check_nodes(values: Mapping[str, Any]) -> None:
    """Ranks of one replica on several nodes: the same flags on each of them, but for --node-rank."""
    nodes, ranks = values["nnodes"] or 1, values["tensor_parallel_size"]
    if ranks % nodes:
        raise ConfigError(f"--nnodes: {nodes} nodes cannot share {ranks} ranks evenly (--tensor-parallel-size)")
    if values["cluster"] is not None:
        return  # its launcher sees to the rest
    if nodes == 1:
        for name in ("node_rank", "master_addr"):
            if values[name]:
                raise ConfigError(f"--{_flag_of(name)}: needs --nnodes of at least 2")
        return
    if values["node_rank"] >= nodes:
        raise ConfigError(f"--node-rank: must be below --nnodes {nodes}, got {values['node_rank']}")
    if values["data_parallel_size"] != 1:
        raise ConfigError(
            f"--data-parallel-size: {values['data_parallel_size']} with --nnodes {nodes}; a launcher runs one replica "
            "of several nodes, further ones --join it"
        )
    if not values["master_addr"]:
        raise ConfigError("--nnodes: needs --master-addr, the address by which other nodes reach the first one")
    if values["auth_keys"] is None:
        raise ConfigError("--nnodes: needs --auth-keys: nodes talk encrypted only; scripts/make_keys.py makes them")
    if values["node_rank"] and not values["master_port"]:
        raise ConfigError("--master-port: the first node's is needed, 0 is none")


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
    nodes = options.nnodes or 1
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
        nodes=nodes,
        sums_by_peers=not options.disable_custom_all_reduce and nodes == 1,  # GPUs of another host have no memory here
        fake_executor=options.fake_executor,
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
        allowed_origins=tuple(filter(None, map(str.strip, (options.allowed_origins or "").split(",")))),
    )
