"""`engine-launch --cluster ray`: replicas and frontends on the nodes of a Ray cluster, and the directory they meet at.

Ray places them, starts again what dies, and ends all of them when this launcher ends. What is here makes the keys,
says what shall run, and adds or drains replicas and frontends as the queue grows or shrinks. It runs the directory
as a child: the one mechanism by which replicas join and clients find them. Never on the path of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from frontend import flags, model_files
from frontend.autoscaler import Load, Scale
from frontend.digests import ENVIRONMENT
from frontend.host import CONFIG, FIRST_HOST, FIRST_PORT, Host, Part, Program, actor_options, write_private
from frontend.replica import say
from frontend.replicas import Replicas
from ipc.auth import load_client_keys, make_client_keys, make_server_keys
from ipc.clock import now_s
from ipc.errors import ConfigError, TandemError, UnavailableError
from ipc.schema import HEARTBEAT_S

_STATS_S: Final = 5.0
_PATIENCE_S: Final = 15.0  # then the launcher says what it is waiting for
_GONE_S: Final = 2.0  # for a second signal: what was killed has time to be gone
_FRONTEND: Final = "frontend"  # a Ray resource: nodes that declare it, if any does, are where frontends run
_KEYS: Final = "keys"
_API_KEYS: Final = "api-keys"
_TEMPLATE: Final = "chat-template.jinja"


@dataclass(slots=True, eq=False)
class Placed:
    """A replica or a frontend: the actor that runs it, and what Ray reserved for it."""

    actor: Any
    group: Any = None  # a placement group, for a replica


def make_keys(folder: Path) -> dict[str, dict[str, bytes]]:
    """New keys for one cluster: files of the directory, "engine", and of each kind of client."""
    engine = folder / "engine"
    make_server_keys(engine)
    clients = ("replica", "replica-node", "frontend", "launcher")
    for name in clients:
        make_client_keys(engine, name, folder / name)
    found = {name: _read(folder / name) for name in ("engine", *clients)}
    found["replica"] = found["engine"] | found["replica"]  # a server to frontends, a client of the directory
    return found


def _read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replica_part(
    options: flags.Options, keys: dict[str, dict[str, bytes]], directory: str, nodes: int, needs: dict[str, float]
) -> Part:
    """A launcher with one replica that joins `directory`, on so many nodes, each of which needs as much."""
    config = flags.as_yaml(_of_one_node(options)).encode()
    common = ["--config", f"{{folder}}/{CONFIG}", "--auth-keys", f"{{folder}}/{_KEYS}", "--data-parallel-size", "1"]
    common += ["--frontends", "0"]
    first, further = ["--join", directory, "--frontend-endpoint", "tcp://{address}:0"], []
    if nodes > 1:
        common += ["--nnodes", str(nodes)]
        first += ["--master-addr", "{address}", "--master-port", "0"]
        further += ["--master-addr", FIRST_HOST, "--master-port", FIRST_PORT]

    def part(arguments: list[str], whose: str, *others: Part) -> Part:
        files = {CONFIG: config, **_under_keys(keys[whose])}
        return Part("launch", (*common, *arguments), files, options.shutdown_timeout, needs, others)

    others = [part([*further, "--node-rank", str(node)], "replica-node") for node in range(1, nodes)]
    return part(first, "replica", *others)


def frontend_part(
    options: flags.Options, keys: dict[str, bytes], api_keys: bytes, directory: str, needs: dict[str, float]
) -> Part:
    """An HTTP server that finds the replicas at `directory` and takes `api_keys`, a file's content; empty: open."""
    files, arguments = _under_keys(keys), [options.model, "--connect", directory]
    arguments += ["--auth-keys", f"{{folder}}/{_KEYS}", "--host", options.host, "--port", str(options.port)]
    for name in ("watchdog_timeout", "shutdown_timeout", "request_timeout", "queue_timeout", "metrics_prefix",
                 "allowed_origins", "tool_call_parser", "log_level", "log_format"):  # fmt: skip
        if (value := getattr(options, name)) is not None:
            arguments += ["--" + name.replace("_", "-"), str(value)]
    if options.isolate_api_keys:
        arguments.append("--isolate-api-keys")
    if api_keys:
        files[_API_KEYS] = api_keys
        arguments += ["--api-key-file", f"{{folder}}/{_API_KEYS}"]
    if options.chat_template is not None:
        files[_TEMPLATE] = Path(options.chat_template).read_bytes()
        arguments += ["--chat-template", f"{{folder}}/{_TEMPLATE}"]
    return Part("process", tuple(arguments), files, options.shutdown_timeout, needs)


def _of_one_node(options: flags.Options) -> flags.Options:
    return replace(
        options,
        cluster=None,
        ray_address="auto",
        max_replicas=None,
        max_frontends=None,
        api_key_file=None,
        chat_template=None,
        nnodes=None,
        port=0,
    )


def _under_keys(keys: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{_KEYS}/{name}": content for name, content in keys.items()}


def take_api_keys(options: flags.Options, environment: MutableMapping[str, str]) -> bytes:
    """The API keys, a key a line; the variable is removed from `environment`, so that no child inherits it."""
    try:
        found = b"" if options.api_key_file is None else Path(options.api_key_file).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {options.api_key_file}: {error.strerror}", param="--api-key-file") from error
    own = environment.pop(ENVIRONMENT, "").strip().encode()
    return b"\n".join(filter(None, (found, own)))


def resources(options: flags.Options, nodes: list[dict[str, Any]]) -> tuple[int, dict[str, float]]:
    """On how many nodes a replica is, the fewest that have GPUs for its ranks, and what it needs of each.

    Raises ConfigError if no node has that.
    """
    ranks = options.tensor_parallel_size
    most = max((int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]), default=0)
    if options.device == "cpu" or options.fake_executor or (options.device == "auto" and not most):
        return options.nnodes or 1, {"CPU": 1.0}
    even = (n for n in range(1, ranks + 1) if ranks % n == 0 and ranks // n <= most)
    count = options.nnodes or next(even, 1)
    here = ranks // count
    if here > most:
        raise ConfigError(
            f"{ranks} ranks on {count} nodes need {here} GPUs of each, and no node of the cluster has more than {most}",
            param="--tensor-parallel-size",
        )
    return count, {"CPU": 1.0 + here, "GPU": float(here)}


class Cluster:
    """The life of one engine on a Ray cluster. `run` returns the launcher's exit code."""

    def __init__(self, ray: Any, options: flags.Options, api_keys: bytes, folder: Path) -> None:
        self._ray = ray
        self._options = options
        self._folder = folder
        self._keys = make_keys(folder)
        self._api_keys = api_keys
        self._nodes, self._resources = resources(options, ray.nodes())
        declared = any(_FRONTEND in node["Resources"] for node in ray.nodes() if node["Alive"])
        self._frontend_needs = {_FRONTEND: 1.0} if declared else {"CPU": 1.0}
        self._host: Any = ray.remote(Host)
        self._replicas: list[Placed] = []
        self._frontends: list[Placed] = []
        self._changing: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._signals = 0
        self._directory: Program
        self._endpoint = f"tcp://{ray.util.get_node_ip_address()}:0"
        self._client: Replicas
        self._scale_replicas = Scale(options.data_parallel_size, options.max_replicas or options.data_parallel_size)
        self._scale_frontends = Scale(options.frontends, options.max_frontends or options.frontends)

    async def run(self) -> int:
        """Start everything, adapt it to the load until a signal comes, then drain it."""
        started_s = now_s()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        await self._start_directory()
        keys = load_client_keys(self._folder / "launcher")
        self._client = Replicas(self._endpoint, name="launcher", keys=keys)
        try:
            serving = asyncio.ensure_future(self._start())
            await asyncio.wait((serving, asyncio.ensure_future(self._stop.wait())), return_when="FIRST_COMPLETED")
            if serving.done():
                places = [*serving.result(), self._endpoint]
                name = self._options.served_model_name or model_files.served_name(self._options.model)
                took_s = now_s() - started_s
                print(f"Serving {name} on {' and '.join(places)} (ready in {took_s:.1f} s)", flush=True)
                await self._adapt()
            serving.cancel()
        except Exception as error:
            if not isinstance(error, TandemError | self._ray.exceptions.RayError):
                raise
            say(f"a replica or frontend could not be started: {error}")
            return 1
        finally:
            await self._end()
        return 0

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals == 1:
            say(f"draining: open requests have {self._options.shutdown_timeout:g} s; a second signal stops at once")
        self._stop.set()
        if self._signals > 1:
            for placed in (*self._frontends, *self._replicas):
                if placed.actor is not None:  # it waits for room
                    self._ray.kill(placed.actor)

    # -- the directory

    async def _start_directory(self) -> None:
        """On the port it had before, if it had one: everybody looks for it there."""
        config = self._folder / CONFIG
        if not config.exists():
            write_private(self._folder, {CONFIG: flags.as_yaml(_of_one_node(self._options)).encode()})
        loop = asyncio.get_running_loop()
        arguments = ["--config", str(config), "--data-parallel-size", "0", "--frontends", "0", "--device", "cpu"]
        arguments += ["--frontend-endpoint", self._endpoint, "--auth-keys", str(self._folder / "engine")]
        self._directory = Program("launch", arguments, lambda code: _tell(loop, self._on_directory_exit, code))
        try:
            places = await asyncio.to_thread(self._directory.wait_until_it_serves)
        except UnavailableError as error:
            raise ConfigError(f"the directory does not start: {error.message}", param="--cluster") from error
        self._endpoint = next(place for place in places if place.startswith("tcp://"))

    def _on_directory_exit(self, code: int) -> None:
        if not self._stop.is_set():
            say(f"the directory ended with exit code {code}; it is started again")
            self._follow(self._start_directory())

    # -- what runs

    async def _start(self) -> list[str]:
        """The first replicas and frontends; returns where the frontends serve once all do."""
        options = self._options
        found = await asyncio.gather(
            *(self._add_replica() for _ in range(options.data_parallel_size)),
            *(self._add_frontend() for _ in range(options.frontends)),
        )
        await self._client.open(_STATS_S * 12, wait_ready=True)
        return [place for places in found for place in places if place.startswith("http")]

    async def _add_replica(self) -> list[str]:
        """One more replica, where Ray finds room for all of its ranks: a bundle for each of its nodes."""
        bundles, how = [self._resources] * self._nodes, "STRICT_PACK" if self._nodes == 1 else "STRICT_SPREAD"
        group = self._ray.util.placement_group(bundles, strategy=how)
        placed = Placed(None, group)
        self._replicas.append(placed)
        await self._patiently(group.ready(), "the cluster has no room for a replica yet")
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, 0)
        part = replica_part(self._options, self._keys, self._endpoint, self._nodes, self._resources)
        placed.actor = self._actor(part, strategy)
        return await self._places(placed, self._replicas)

    async def _add_frontend(self) -> list[str]:
        """One more frontend, on whatever node has the fewest."""
        part = frontend_part(
            self._options, self._keys["frontend"], self._api_keys, self._endpoint, self._frontend_needs
        )
        placed = Placed(self._actor(part, "SPREAD"))
        self._frontends.append(placed)
        return await self._places(placed, self._frontends)

    def _actor(self, part: Part, strategy: Any) -> Any:
        return self._host.options(**actor_options(part, strategy)).remote(part)

    async def _places(self, placed: Placed, among: list[Placed]) -> list[str]:
        try:
            return list(await self._patiently(placed.actor.places.remote(), "a program does not serve yet"))
        except BaseException:
            among.remove(placed)
            self._forget(placed)
            raise

    async def _patiently(self, reference: Any, what: str) -> Any:
        task = asyncio.ensure_future(_result(reference))
        while not (await asyncio.wait([task], timeout=_PATIENCE_S))[0]:
            say(what)
        return task.result()

    async def _remove(self, placed: Placed) -> None:
        """Drain it: what it has open is finished, or goes on elsewhere."""
        if placed.actor is not None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                await placed.actor.stop.remote()
        self._forget(placed)

    def _forget(self, placed: Placed) -> None:
        if placed.actor is not None:
            self._ray.kill(placed.actor)
        if placed.group is not None:
            self._ray.util.remove_placement_group(placed.group)

    # -- as many as the load asks for

    async def _adapt(self) -> None:
        """Once a beat, until the stop: compare what there is with what there should be."""
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), HEARTBEAT_S)
            if self._changing or self._stop.is_set():
                continue  # what is being added or drained is not to be added twice
            try:
                stats = await self._client.stats(_STATS_S)
            except TandemError:
                continue
            load = Load(stats.running, stats.waiting)
            replicas, frontends = len(self._replicas), len(self._frontends)
            self._change(
                "replicas", self._replicas, self._scale_replicas.replicas(replicas, load, self._options.max_num_seqs)
            )
            self._change("frontends", self._frontends, self._scale_frontends.frontends(frontends, load))

    def _change(self, what: str, placed: list[Placed], wanted: int) -> None:
        have = len(placed)
        if wanted != have:
            say(f"{have} {what} become {wanted}")
        for _ in range(wanted - have):
            self._follow(self._add_replica() if placed is self._replicas else self._add_frontend())
        for each in placed[wanted:]:
            placed.remove(each)
            self._follow(self._remove(each))

    def _follow(self, work: Any) -> None:
        async def follow() -> None:
            try:
                await work
            except (TandemError, self._ray.exceptions.RayError) as error:
                say(f"not done: {error}")

        task = asyncio.get_running_loop().create_task(follow())
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)

    async def _end(self) -> None:
        """Frontends first, so that their open responses end; then replicas, which have nothing left by then."""
        self._stop.set()
        for task in self._changing:
            task.cancel()
        for placed in (self._frontends, self._replicas):
            await asyncio.gather(*(self._remove(each) for each in placed))
        await self._client.close()
        await asyncio.to_thread(self._directory.stop, _GONE_S)


async def _result(reference: Any) -> Any:
    return await reference


def _tell(loop: asyncio.AbstractEventLoop, what: Any, code: int) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody needs to know
        loop.call_soon_threadsafe(what, code)


def _check_reachable(address: str) -> None:
    """Raises OSError if nobody listens at HOST:PORT. Ray knows other kinds of addresses, which pass."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), _STATS_S).close()


def serve(options: flags.Options) -> int:
    """Run an engine on a Ray cluster until it is told to stop; returns the exit code. Raises ConfigError before."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError("ray needs the package ray: pip install 'tandem-engine[ray]'", param="--cluster") from error
    api_keys = take_api_keys(options, os.environ)
    try:
        _check_reachable(options.ray_address)  # Ray itself would try for minutes
        ray.init(address=options.ray_address, log_to_driver=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {options.ray_address!r}: {error}", param="--ray-address") from error
    try:
        with tempfile.TemporaryDirectory(prefix="tandem-cluster-") as folder:
            return asyncio.run(Cluster(ray, options, api_keys, Path(folder)).run())
    finally:
        ray.shutdown()
