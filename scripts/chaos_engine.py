"""The engine under chaos: its processes, what befalls them, what they hold, and what its launcher says of recoveries.

Used by `chaos.py` and `chaos_streams.py`.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).resolve().parent.parent
WATCHDOG_S = 8.0
HEARTBEAT_LIMIT_S = 10.0  # a frontend that is silent for longer is replaced
GONE_S = 5.0
# what happens, and how often relative to the others
FAULTS = {
    ("kill", "scheduler"): 4,
    ("kill", "executor"): 2,
    ("kill", "frontend"): 2,
    ("stop", "scheduler"): 2,
    ("stop", "executor"): 2,
    ("stop", "frontend"): 2,
    ("hang", "executor"): 1,
    ("hang", "scheduler"): 1,
    ("hang", "frontend"): 1,
}
REPLICA_FAULTS = {("kill", "replica"): 3}  # a scheduler with its executor, where there are several
# A hang ends when the engine should have noticed it; a stop is shorter than that.
HANG_S = {"executor": WATCHDOG_S + 3, "scheduler": WATCHDOG_S + 3, "frontend": HEARTBEAT_LIMIT_S + 3}
NOTICE_S = 5.0  # a process that hung may be killed that much after it went on, and its connections break then


class Engine:
    """`engine-launch` in a temporary folder of its own, with what it prints to stderr in a file."""

    def __init__(self, model: list[str], device: str, folder: Path, replicas: int, only: str | None) -> None:
        """`only`: the one kind of fault that befalls it, as KIND:ROLE."""
        self.log = folder / "stderr"
        self.faults = FAULTS | (REPLICA_FAULTS if replicas > 1 else {})
        if only is not None:
            kind, role = only.split(":")
            self.faults = {(kind, role): 1}
        flags = ["--device", device, "--frontends", "2", "--port", "0", "--max-restarts", "100000"]
        flags += ["--watchdog-timeout", str(WATCHDOG_S), "--enable-debug-endpoints"]
        flags += ["--data-parallel-size", str(replicas)]
        start_s = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "frontend.launch", *model, *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(folder)},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        url, endpoint = re.search(r"http://\S+/v1", line), re.search(r"ipc://\S+\.sock", line)
        if url is None or endpoint is None:
            sys.exit(f"the engine did not start: {line!r}\n{self.log.read_text()}")
        self.url, self.endpoint = url.group(), endpoint.group()
        self.ready_s = time.monotonic() - start_s

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """(role, process) of the launcher and its children that are alive."""
        found = [("launcher", psutil.Process(self.process.pid))]
        for child in found[0][1].children():
            try:
                if match := re.search(r"engine-launch: (\w+)", " ".join(child.cmdline())):
                    found.append((match[1], child))
            except psutil.Error:
                continue  # it ended just now
        return found

    def victims(self, role: str) -> list[list[psutil.Process]]:
        """The processes that a fault of this role may befall, each with those that go with it."""
        if role != "replica":
            return [[process] for name, process in self.processes() if name == role]
        by_replica: dict[str, list[psutil.Process]] = {}
        for _, process in self.processes():
            try:
                if match := re.search(r" of replica (\d+)", " ".join(process.cmdline())):
                    by_replica.setdefault(match[1], []).append(process)
            except psutil.Error:
                continue  # it ended just now
        return list(by_replica.values())

    def resources(self) -> dict[str, tuple[int, int]]:
        """role -> (fds, threads), the most of any process of the role."""
        seen: dict[str, tuple[int, int]] = {}
        for role, process in self.processes():
            fds, threads = seen.get(role, (0, 0))
            seen[role] = max(fds, process.num_fds()), max(threads, process.num_threads())
        return seen

    def leaks(self, before: dict[str, tuple[int, int]]) -> list[str]:
        """What is held beyond `before`, once connections that clients closed have had time to go."""
        limit_s = time.monotonic() + GONE_S
        while True:
            after = self.resources()
            found = [
                f"{role} leaks: {fds} -> {after[role][0]} fds, {threads} -> {after[role][1]} threads"
                for role, (fds, threads) in before.items()
                if after[role][0] > fds + 4 or after[role][1] > threads + 2
            ]
            if not found or time.monotonic() > limit_s:
                return found
            time.sleep(0.2)

    def report(self) -> None:
        """What the launcher says of each recovery, from the end of a process until the engine serves; and the starts
        of executors, of which the first may have had to compile."""
        log = self.log.read_text(errors="replace")
        pauses: dict[str, list[float]] = {}
        for role, pause_s in re.findall(r"(\w+) restarted, .* after ([\d.]+) s", log):
            pauses.setdefault(role, []).append(float(pause_s))
        for role, found in pauses.items():
            print(f"{role} recovered {len(found)} times: median {median(found):.2f} s, max {max(found):.2f} s")
        starts = [dict(table) for table in map(phase_table, log.split("start-up")[1:])]
        for phase in starts[0] if len(starts) > 1 else ():
            # A line may be missing: processes share the log, and one may write into another's line.
            if again := [start[phase] for start in starts[1:] if phase in start]:
                print(f"  executor's start, {phase}: {starts[0][phase]:.1f} s at first, then {median(again):.1f} s")

    def end(self, shared_memory: set[str], gpu_mib: int) -> list[str]:
        """Kill the launcher; returns what is left of the engine that should not be."""
        children = [process for _, process in self.processes()][1:]
        port = int(self.root.rpartition(":")[2])
        self.process.send_signal(signal.SIGKILL)
        start_s = time.monotonic()
        _, alive = psutil.wait_procs(children, timeout=GONE_S)
        self.process.wait()
        print(f"launcher killed: {len(children)} processes gone after {time.monotonic() - start_s:.2f} s")
        wrong = [f"still alive {GONE_S:.0f} s after the launcher was killed: {process}" for process in alive]
        if any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in psutil.net_connections("tcp")):
            wrong.append(f"something listens on port {port}")
        if left := {name for name in os.listdir("/dev/shm") if "tandem" in name} - shared_memory:
            wrong.append(f"left in /dev/shm: {left}")
        if gpu_mib >= 0:
            while (held := gpu_memory_mib()) > gpu_mib + 64 and time.monotonic() < start_s + GONE_S:
                time.sleep(0.1)
            print(f"GPU memory: {gpu_mib} MiB before, {held} MiB {time.monotonic() - start_s:.1f} s after")
            if held > gpu_mib + 64:
                wrong.append(f"{held - gpu_mib} MiB of GPU memory are still held")
        return wrong


def phase_table(text: str) -> list[tuple[str, float]]:
    """(phase, seconds) of an executor's start, as its log shows them behind the word start-up."""
    rows = re.findall(r"^executor:   (\S.*?) +([\d.]+) +[\d.]+$", text.partition("ready in")[0], re.MULTILINE)
    return [(name, float(seconds)) for name, seconds in rows]


def gpu_memory_mib() -> int:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


@dataclass
class Faults:
    """What has befallen the engine: what may excuse a stream that failed."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    ended_s: dict[str, list[float]] = field(default_factory=dict)  # role -> when each was over

    def begin(self, kind: str, role: str) -> int:
        """Returns the number that `end` wants."""
        self.counts[kind, role] += 1
        ends = self.ended_s.setdefault(role, [])
        ends.append(float("inf"))
        return len(ends) - 1

    def end(self, role: str, number: int) -> None:
        self.ended_s[role][number] = time.monotonic()

    def since(self, role: str, start_s: float) -> int:
        """Faults of this role that were not over at `start_s`."""
        return sum(end_s > start_s for end_s in self.ended_s.get(role, ()))


async def strike(engine: Engine, faults: Faults, rng: random.Random, deadline_s: float) -> None:
    """Every few seconds something befalls a process: each kind of fault once, in any order, then at random."""
    possible = engine.faults
    first = rng.sample(list(possible), len(possible))
    while True:
        await asyncio.sleep(rng.uniform(1.0, 5.0))
        if time.monotonic() > deadline_s:
            return
        kind, role = first.pop() if first else rng.choices(list(possible), list(possible.values()))[0]
        alive = engine.victims(role)
        if not alive:
            continue
        victims, number = rng.choice(alive), faults.begin(kind, role)
        for victim in victims:
            try:
                if kind == "kill":
                    victim.kill()
                else:
                    victim.suspend()
                    await asyncio.sleep(HANG_S[role] if kind == "hang" else rng.uniform(0.2, 2.0))
                    victim.resume()
            except psutil.NoSuchProcess:
                pass  # the launcher was quicker
        faults.end(role, number)
