"""Rings: wrap-around, random pauses in two processes, a reader that dies, frames that are not what they should be."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from ipc.doorbell import Doorbell
from ipc.errors import ProtocolError
from ipc.ring import RingFullError, RingReader, RingWriter, TornFrameError, create_ring

_READER = """
import random, sys
import numpy as np
from ipc.doorbell import Doorbell
from ipc.ring import RingReader
fd, bell, ack_bell, frames, seed = map(int, sys.argv[1:])
rng, reader, bell, acked = random.Random(seed), RingReader(fd), Doorbell(bell), Doorbell(ack_bell)
print("ready", flush=True)
seen = 0
while seen < frames:
    bell.wait(timeout_s=30) or sys.exit("no frame within 30 s")
    while (payload := reader.poll()) is not None:
        seq = reader.next
        for _ in range(rng.choice([0, 0, 0, 2000])):
            pass
        expected = np.random.default_rng(seq).integers(0, 255, len(payload), dtype=np.uint8)
        assert (payload == expected).all(), f"frame {seq} is torn"
        reader.advance()
        reader.ack(seq)
        acked.ring()
        seen = seq
print("done", flush=True)
"""


def fill(writer: RingWriter, seq: int) -> None:
    payload = writer.begin(seq)
    payload[:] = np.random.default_rng(seq).integers(0, 255, len(payload), dtype=np.uint8)
    writer.publish(seq)


def start_reader(fd: int, bell: Doorbell, acked: Doorbell, last: int, seed: int) -> subprocess.Popen[str]:
    """A process that reads and checks every frame from the next one to `last`; it has attached when this returns."""
    argv = [sys.executable, "-c", _READER, *map(str, (fd, bell.fd, acked.fd, last, seed))]
    reader = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=(fd, bell.fd, acked.fd))
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    return reader


def write_frames(writer: RingWriter, bell: Doorbell, acked: Doorbell, frames: range, rng: random.Random) -> None:
    for seq in frames:
        while seq - int(writer._acks.min()) > writer.slots:
            assert acked.wait(timeout_s=30), "the reader does not acknowledge"
        for _ in range(rng.choice([0, 0, 0, 2000])):
            pass
        fill(writer, seq)
        bell.ring()


@pytest.mark.parametrize("seed", range(3))
def test_frames_arrive_whole_between_processes(seed: int) -> None:
    frames, rng = 300, random.Random(seed)
    fd, bell, acked = create_ring(slots=3, slot_bytes=5000), Doorbell.create(), Doorbell.create()
    with start_reader(fd, bell, acked, frames, seed) as reader:
        write_frames(RingWriter(fd), bell, acked, range(1, frames + 1), rng)
        assert reader.stdout is not None
        assert reader.stdout.readline() == "done\n"
    assert reader.returncode == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_reader_killed_anywhere_is_followed_by_one_that_reads_whole_frames(seed: int) -> None:
    rng = random.Random(seed)
    fd, bell, acked = create_ring(slots=3, slot_bytes=5000), Doorbell.create(), Doorbell.create()
    writer, killed_after = RingWriter(fd), rng.randint(20, 60)
    with start_reader(fd, bell, acked, 1000, seed) as first:
        write_frames(writer, bell, acked, range(1, killed_after + 1), rng)
        first.send_signal(signal.SIGKILL)  # up to three frames are unread, one perhaps half read
    assert writer.restart() == killed_after
    with start_reader(fd, bell, acked, killed_after + 100, seed) as second:
        write_frames(writer, bell, acked, range(killed_after + 1, killed_after + 101), rng)
        assert second.stdout is not None
        assert second.stdout.readline() == "done\n"
    assert second.returncode == 0


def test_a_writer_never_overtakes_a_reader() -> None:
    fd = create_ring(slots=2, slot_bytes=64, readers=2)
    writer, first, second = RingWriter(fd), RingReader(fd, 0), RingReader(fd, 1)
    for seq in (1, 2):
        fill(writer, seq)
    first.ack(2)
    with pytest.raises(RingFullError, match="slot 3 is 3 ahead"):
        writer.begin(3)
    second.ack(1)
    fill(writer, 3)


def test_a_dead_reader_is_forgotten() -> None:
    fd = create_ring(slots=2, slot_bytes=64)
    writer = RingWriter(fd)
    RingReader(fd)
    for seq in (1, 2):
        fill(writer, seq)
    with pytest.raises(RingFullError):
        writer.begin(3)
    assert writer.restart() == 2
    fill(writer, 3)
    late = RingReader(fd)
    assert late.poll() is None, "a new reader must not see frames of its predecessor"
    fill(writer, 4)
    assert late.poll() is not None
    assert late.next == 4


def test_a_frame_that_is_being_written_is_not_read() -> None:
    fd = create_ring(slots=2, slot_bytes=64)
    writer, reader = RingWriter(fd), RingReader(fd)
    for seq in (1, 2):
        fill(writer, seq)
    assert reader.poll() is not None
    reader.advance()
    writer._acks[0] = 1
    writer.begin(3)
    with pytest.raises(TornFrameError, match="holds frame -3, expected 1"):
        reader.check(1)


def test_foreign_memory_is_refused() -> None:
    fd = os.memfd_create("not-a-ring")
    os.ftruncate(fd, 8192)
    with pytest.raises(ProtocolError, match="not a ring"):
        RingReader(fd)


def test_a_ring_lies_in_shared_memory_and_has_no_name() -> None:
    fd = create_ring(slots=2, slot_bytes=64)
    assert os.readlink(f"/proc/self/fd/{fd}").startswith("/dev/shm/")
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_a_bell_adds_up_and_times_out() -> None:
    bell = Doorbell.create()
    assert bell.wait(timeout_s=0) == []
    bell.ring()
    bell.ring()
    assert bell.wait(timeout_s=0) == [bell.fd]
    assert bell.wait(timeout_s=0) == []
