"""What a Ray actor does on its node: it runs one of our own programs there, and dies with it.

`Host` is the actor's class; the cluster launcher makes one for each replica and each frontend. It holds no state that
is worth saving: Ray starts it again, on this node or another, with the same arguments. The launcher uses `Program` for
the directory, too. Must never be on the path of a request.

The program is a child with its own supervisor below it, started as `python -P -m frontend.host FD PROGRAM ...`, which
ends when whoever holds the other end of FD does.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from frontend.replica import say
from ipc.errors import ConfigError, UnavailableError
from ipc.lifetime import die_with_parent, fail

PLACE: Final = re.compile(r"(?:http|tcp)://\S+")  # in the line that says where a program serves
_KILL_GRACE_S: Final = 10.0  # beyond what a program may take to drain
_READY_PERIOD_S: Final = 0.2
CONFIG: Final = "config.yaml"
AWAITING: Final = "Awaiting "  # how the line begins that says where further nodes of a replica shall connect
FIRST_HOST: Final = "{first-host}"  # in arguments of such a node: that place
FIRST_PORT: Final = "{first-port}"


@dataclass(frozen=True, slots=True)
class Part:
    """One program of the cluster: `engine-launch` for a replica, `engine-frontend` for a frontend.

    In its arguments {address} stands for the node's address and {folder} for the folder of its files.
    """

    program: str  # "launch" or "process": the module of frontend/ whose `main` it is
    arguments: tuple[str, ...]
    files: Mapping[str, bytes]  # keys and options, by path in a private folder
    drain_s: float  # that it may take to stop
    needs: Mapping[str, float]  # of its node, as Ray calls it
    nodes: tuple[Part, ...] = ()  # further ranks of the same replica, each on a node of its own

    def __repr__(self) -> str:
        return f"Part({self.program})"  # Ray shows arguments in errors, and the files are secret


def actor_options(part: Part, strategy: Any) -> dict[str, Any]:
    """How Ray runs an actor for this part: until it is told otherwise."""
    needs = dict(part.needs)
    return dict(
        num_cpus=needs.pop("CPU", 0.0),
        num_gpus=needs.pop("GPU", 0.0),
        resources=needs,
        max_restarts=-1,
        max_concurrency=4,
        scheduling_strategy=strategy,
    )


class Program:
    """A child that runs `main` of a module of frontend/ until it is told to stop, and ends with its parent."""

    def __init__(self, program: str, arguments: Sequence[str], on_exit: Callable[[int], None]) -> None:
        """`on_exit` is called with the exit code, from another thread, unless `stop` was called before."""
        self.places: list[str] = []  # where it serves, as it printed them
        self.awaits = ""  # where it waits for further nodes
        self._serves, self._speaks = threading.Event(), threading.Event()
        self._stopping = False
        self._process: subprocess.Popen[str]
        self._lifeline, self._held = os.pipe2(os.O_CLOEXEC)
        started = threading.Event()
        # PDEATHSIG is of the thread that forks: this one lives as long as the child.
        self._thread = threading.Thread(
            target=self._run, args=(program, arguments, on_exit, started), name=f"program {program}", daemon=True
        )
        self._thread.start()
        started.wait()

    def wait_until_it_serves(self) -> list[str]:
        """Its places. Raises UnavailableError if it ends before it has some."""
        self._serves.wait()
        if not self.places:
            self.check()
        return self.places

    def wait_until_it_awaits(self) -> str:
        """Where it waits for further nodes; "" if it ended."""
        self._speaks.wait()
        return self.awaits

    def check(self) -> None:
        """Raises UnavailableError if it has ended."""
        if (code := self._process.poll()) is not None:
            raise UnavailableError(f"it ended with exit code {code} before it served")

    def stop(self, limit_s: float) -> None:
        """SIGTERM, with so many seconds to drain, then SIGKILL."""
        self._stopping = True
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        self._thread.join(limit_s)
        self._process.kill()
        self._thread.join()

    def _run(
        self, program: str, arguments: Sequence[str], on_exit: Callable[[int], None], started: threading.Event
    ) -> None:
        command = [sys.executable, "-P", "-m", "frontend.host", str(self._lifeline), program, *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, pass_fds=[self._lifeline],
            start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone
        )  # fmt: skip
        started.set()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = PLACE.findall(line)
            if found and line.startswith(AWAITING):
                self.awaits = found[0]
                self._speaks.set()
            elif found and not self.places:
                self.places = found
                self._serves.set()
        code = self._process.wait()
        self._serves.set()
        self._speaks.set()
        for fd in (self._lifeline, self._held):
            os.close(fd)
        if not self._stopping:
            on_exit(code)


class Host:
    """The body of a Ray actor: one program on one node. Its methods are called from several threads."""

    def __init__(self, part: Part) -> None:
        """Returns at once; `places` waits."""
        import ray

        self._address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._drain_s = part.drain_s
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-host-")  # mode 0700
        write_private(Path(self._folder.name), part.files)
        arguments = [text.format(address=self._address, folder=self._folder.name) for text in part.arguments]
        self._program = Program(part.program, arguments, self._end)
        self._nodes: list[Any] = []  # actors; Ray ends them with this one, their owner
        if part.nodes:
            threading.Thread(target=self._add_nodes, args=(part.nodes,), name="nodes", daemon=True).start()

    def _add_nodes(self, parts: Sequence[Part]) -> None:
        """Once it is known where they shall connect: each in its bundle of this actor's placement group."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        host, _, port = self._program.wait_until_it_awaits().removeprefix("tcp://").rpartition(":")
        remote: Any = ray.remote(Host)
        group: Any = ray.util.get_current_placement_group()
        for bundle, part in enumerate(parts if host else (), 1):
            told = tuple(text.replace(FIRST_HOST, host).replace(FIRST_PORT, port) for text in part.arguments)
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            self._nodes.append(remote.options(**actor_options(part, strategy)).remote(replace(part, arguments=told)))

    def places(self) -> list[str]:
        """Where the program serves, once it does. Raises UnavailableError if it ends before."""
        places = self._program.wait_until_it_serves()
        for place in places:
            while place.startswith("http") and not _is_ready(place):
                self._program.check()
                time.sleep(_READY_PERIOD_S)
        return [place.replace("//0.0.0.0:", f"//{self._address}:") for place in places]

    def stop(self) -> None:
        """Drain and end the program. The actor is not needed any more."""
        self._program.stop(self._drain_s + _KILL_GRACE_S)
        self._folder.cleanup()

    def _end(self, code: int) -> None:
        """The program ended by itself: Ray shall start it anew, where there is room for it."""
        say(f"the program of this actor ended with exit code {code}")
        self._folder.cleanup()
        os._exit(1)


def _is_ready(place: str) -> bool:
    """Whether the HTTP server at this place has found a replica that serves."""
    try:
        with urllib.request.urlopen(place.removesuffix("/v1") + "/ready", timeout=5):
            return True
    except OSError:  # refused, or a status of 503
        return False


def write_private(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` by their paths into a folder, for this user only."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)


def main(argv: Sequence[str]) -> int:
    """The child: FD launch FLAG..., or FD process MODEL FLAG... with the model whose tokenizer the frontend needs."""
    lifeline, program, *arguments = argv
    die_with_parent(int(lifeline))
    if program == "launch":
        from frontend import launch

        return launch.main(arguments)
    from frontend import model_files, process

    model, *flags = arguments
    try:
        folder = model_files.find_model(model, weights=False)
    except ConfigError as error:
        return fail("engine-frontend", error)
    return process.main([*flags, "--tokenizer", str(folder)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
