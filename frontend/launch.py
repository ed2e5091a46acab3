"""`engine-launch`: from flags to a serving engine, and back to nothing.

Binds the HTTP socket before anything slow, so that a taken port is known at once; checks the model and the device;
then hands over to the supervisor. Never imports torch, never touches a request.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import zmq

from frontend import flags, model_files
from frontend.children import engine_roles
from frontend.digests import collect_digests
from frontend.directory import Announcement, Directory
from frontend.host import AWAITING
from frontend.listener import bind_http, bind_tcp, url_of
from frontend.plumbing import Plumbing, address_of
from frontend.replica import Replica, config_of, environment_of
from frontend.supervisor import Supervisor
from frontend.tracing import step_trace
from ipc.auth import has_client_keys, load_client_keys, load_server_keys
from ipc.clock import now_s
from ipc.config import EngineConfig
from ipc.errors import ConfigError
from ipc.lifetime import fail, raise_file_limit
from ipc.logs import LogConfig, configure_news, news

_FILES: Final = 192  # that a process of an engine may need, connections of clients aside: 35, and what CUDA takes
_FILES_OF_CHILD: Final = 8  # what each process costs the launcher, and what a replica costs a frontend


def bind_nodes(options: flags.Options) -> socket.socket | None:
    """Where other nodes with ranks of this replica connect, if there are any."""
    if (options.nnodes or 1) == 1 or options.master_addr is None:
        return None
    return bind_tcp(options.master_addr, options.master_port, "--master-addr", "--master-port")


def cuda_devices() -> int:
    """GPUs that the NVIDIA driver shows this process; 0 without a driver. Makes no CUDA context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def choose_device(wanted: str) -> str:
    """ "cpu" or "cuda". Raises ConfigError if CUDA is asked for and there is no GPU."""
    if wanted == "cpu":
        return "cpu"
    if cuda_devices() > 0:
        return "cuda"
    if wanted == "cuda":
        raise ConfigError("cuda asked for, but the NVIDIA driver shows no GPU here", param="--device")
    return "cpu"


def prepare(options: flags.Options) -> EngineConfig:
    """Find and check the model and the device. Raises ConfigError or ModelError."""
    if options.auth_keys is not None and not options.node_rank:
        load_server_keys(Path(options.auth_keys))  # so that a fault is known before the model loads
    device = choose_device(options.device)
    if device == "cuda" and not options.fake_executor:
        _check_gpus(options.data_parallel_size, options.tensor_parallel_size // (options.nnodes or 1))
    weights = bool(options.data_parallel_size) and not (options.random_weights or options.fake_executor)
    folder = model_files.find_model(options.model, weights=weights, trust_remote_code=options.trust_remote_code)
    card = model_files.read_card(
        folder,
        name=options.served_model_name or model_files.served_name(options.model),
        max_model_len=options.max_model_len,
        max_logprobs=options.max_logprobs,
        sampling_defaults=_sampling_defaults(options.generation_config, folder),
    )
    if weights:
        model_files.check_weights(folder)
    api_keys = collect_digests(options.api_key, options.api_key_file, os.environ)
    return flags.engine_config(options, card, device, api_keys)


def _check_files(options: flags.Options) -> None:
    """The processes of the engine can open what they need; the rest is for connections."""
    processes = options.frontends + options.data_parallel_size * (1 + options.tensor_parallel_size)
    needed, limit = _FILES + _FILES_OF_CHILD * processes, raise_file_limit()
    if limit < needed:
        raise ConfigError(f"a process may open {limit} files, this engine needs {needed}", param="ulimit -n")


def _check_gpus(replicas: int, ranks: int) -> None:
    """Every rank of every replica has a GPU of its own."""
    if replicas * ranks > (gpus := cuda_devices()):
        flag = "--tensor-parallel-size" if ranks > gpus else "--data-parallel-size"
        needed = f"{replicas} replicas of {ranks} ranks" if replicas > 1 else f"{ranks} ranks"
        raise ConfigError(f"{needed} need {replicas * ranks} GPUs, the NVIDIA driver shows {gpus}", param=flag)


def _sampling_defaults(source: str, folder: Path) -> dict[str, float]:
    """The defaults of requests that do not say: of the model ("auto"), the API's own ("vllm"), or of another folder."""
    if source == "vllm":
        return {}
    if source != "auto" and not Path(source, "generation_config.json").exists():
        raise ConfigError(f"no generation_config.json in {source}", param="--generation-config")
    return model_files.read_sampling_defaults(folder if source == "auto" else Path(source))


def serve(options: flags.Options) -> int:
    """Run an engine until it is told to stop; returns the exit code. Raises ConfigError before anything starts."""
    _check_files(options)
    if options.node_rank:
        from frontend import node

        return node.serve(options, prepare(options))
    started_s = now_s()
    nodes = bind_nodes(options)
    listener = bind_http(options.host, options.port, options.uds) if options.frontends else None
    try:
        config = prepare(options)
        if nodes is not None:
            config = msgspec.structs.replace(config, nodes_endpoint=f"tcp://{address_of(nodes)}")
            print(f"{AWAITING}{config.nodes - 1} nodes at {config.nodes_endpoint}", flush=True)
        replicas = max(1, options.data_parallel_size)
        with step_trace(options.trace, on_demand=options.enable_debug_endpoints, replicas=replicas) as trace:
            return _supervise(options, config, listener, nodes, trace, started_s)
    finally:
        if nodes is not None:
            nodes.close()
        if listener is not None:
            listener.close()
            if options.uds is not None:
                Path(options.uds).unlink(missing_ok=True)


def _supervise(
    options: flags.Options,
    config: EngineConfig,
    listener: socket.socket | None,
    nodes: socket.socket | None,
    trace: int,
    started_s: float,
) -> int:
    count = options.data_parallel_size
    with contextlib.ExitStack() as stack:
        plumbing = _make_plumbing(config, listener, nodes, trace, count)
        stack.callback(plumbing.close)
        context = stack.enter_context(zmq.Context(io_threads=1))
        directory = Directory(
            context, plumbing.endpoints.frontend, remote=config.frontend_endpoint, auth_keys=config.auth_keys
        )
        stack.callback(directory.close)
        gpus = cuda_devices() if config.device == "cuda" else 0
        replicas = [
            Replica(n, config_of(n, count, config), plumbing.lines[n], context, environment_of(n, count, config, gpus))
            for n in range(count)
        ]
        announcement = None
        if options.join is not None:
            keys = load_client_keys(Path(config.auth_keys)) if has_client_keys(config.auth_keys) else None
            announcement = Announcement(context, options.join, keys)
            stack.callback(announcement.close)
        return Supervisor(
            config,
            plumbing,
            replicas,
            directory,
            engine_roles(
                options.frontends,
                ranks=config.ranks_per_node,
                relay=nodes is not None,
                fake_executor=config.fake_executor,
            ),
            shutdown_timeout_s=options.shutdown_timeout,
            max_restarts=options.max_restarts,
            on_ready=partial(_announce, options, config, _places(listener, directory, plumbing), started_s),
            announcement=announcement,
        ).run()


def _announce(options: flags.Options, config: EngineConfig, places: Sequence[str], started_s: float) -> None:
    took_s = now_s() - started_s
    # Only now, so that a start that fails says one line: what is at fault.
    told = ", ".join(f"{name}={value}" for name, value in flags.changed(options).items())
    news("engine-launch", f"{options.model} with {told or 'every flag at its default'}")
    if sampling := config.card.sampling_defaults:
        defaults = ", ".join(f"{field}={value}" for field, value in sampling.items())
        news("engine-launch", f"requests sample by the model's defaults: {defaults}")
    with contextlib.suppress(OSError):  # nobody needs to read it
        print(f"Serving {config.card.name} on {' and '.join(places)} (ready in {took_s:.1f} s)", flush=True)


def _places(listener: socket.socket | None, directory: Directory, plumbing: Plumbing) -> list[str]:
    places = [] if listener is None else [url_of(listener)]
    return [*places, *filter(None, (directory.remote, plumbing.endpoints.frontend))]


def _make_plumbing(
    config: EngineConfig, listener: socket.socket | None, nodes: socket.socket | None, trace: int, replicas: int
) -> Plumbing:
    try:
        return Plumbing(config, listener, trace, replicas=replicas, nodes=nodes)
    except OSError as error:
        need_mib = max(1, replicas) * 4 * (config.limits.plan_bytes + config.result_layout.nbytes) / (1 << 20)
        raise ConfigError(
            f"/dev/shm cannot hold the rings of {need_mib:.0f} MiB: {os.strerror(error.errno or 0)}; "
            "give it more, or lower this or --max-model-len",
            param="--max-num-batched-tokens",
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `engine-launch`."""
    argv = sys.argv[1:] if argv is None else argv
    flags.hide_api_keys("engine-launch", argv)
    try:
        options = flags.parse(argv, os.environ)
        configure_news(LogConfig(json=options.log_format == "json"))
        if options.print_config:
            print(flags.as_yaml(options), end="")
            return 0
        if options.cluster is not None:
            from frontend import cluster  # and with it Ray, an optional part

            return cluster.serve(options)
        return serve(options)
    except ConfigError as error:
        return fail("engine-launch", error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
