"""Rings: fixed-size slots in shared memory, one writer, N readers, each slot written once per lap.

The launcher creates the memory as a nameless file under /dev/shm and hands the fd down; nothing can be left behind.
Layout, in 64-byte lines of int64 so that no two processes write the same cache line:

    line 0          magic, version, slots, slot_bytes, readers
    line 1          head: sequence number of the last published slot (0 = none)
    line 2 + r      ack of reader r: last sequence number it is done with
    then            slots, each: one line of stamp, then slot_bytes of payload

Slot of sequence s is s % slots. The writer stamps it -s while it writes and s when done, so a torn read shows. Aligned
8-byte stores are atomic, and the doorbell's system call between store and load orders them on every architecture.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from ipc.errors import ProtocolError

MAGIC: Final = 0x54414E44454D0001
_LINE: Final = 64
_SLOT_ALIGN: Final = 4096  # a page: what cudaHostRegister pins
_MAX_READERS: Final = _SLOT_ALIGN // _LINE - 2

Bytes = npt.NDArray[np.uint8]


class RingFullError(ProtocolError):
    """The writer is a whole lap ahead of a reader: a rule of the protocol is broken."""

    code = "ring_full"


class TornFrameError(ProtocolError):
    """A slot changed while it was read, or holds another sequence number than expected."""

    code = "torn_frame"


def create_ring(slots: int, slot_bytes: int, readers: int = 1, *, head: int = 0) -> int:
    """Create the memory of a ring and return its fd. `head`: it goes on where another one stands.

    Raises OSError (ENOSPC) here, not SIGBUS later, if /dev/shm cannot hold it.
    """
    assert readers <= _MAX_READERS, f"{readers} readers, their acks have room for {_MAX_READERS}"
    slot_bytes = -(-slot_bytes // _SLOT_ALIGN) * _SLOT_ALIGN
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _SLOT_ALIGN + slots * (_SLOT_ALIGN + slot_bytes))
    except OSError:
        os.close(fd)
        raise
    with mmap.mmap(fd, _SLOT_ALIGN) as page:
        words = np.frombuffer(page, np.int64)
        words[:5] = MAGIC, 1, slots, slot_bytes, readers
        words[8] = words[16 : 16 + 8 * readers : 8] = head
        del words
    return fd


class Ring:
    """The mapping both ends share. Use RingWriter or RingReader."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self.memory: Bytes = np.frombuffer(self._map, np.uint8)  # [file bytes]; what an executor pins
        words = self.memory[:_SLOT_ALIGN].view(np.int64)
        if int(words[0]) != MAGIC or int(words[1]) != 1:
            raise ProtocolError(f"not a ring of this version: magic {int(words[0]):#x}, version {int(words[1])}")
        self.slots, self.slot_bytes, self.readers = int(words[2]), int(words[3]), int(words[4])
        self._head = words[8:9]
        self._acks = words[16 : 16 + 8 * self.readers : 8]  # [readers]
        stride = _SLOT_ALIGN + self.slot_bytes
        body = self.memory[_SLOT_ALIGN:]
        # The stamp sits at the end of the page before the payload, so the payload itself stays page-aligned.
        self._stamps = [body[i * stride + _SLOT_ALIGN - _LINE :][:8].view(np.int64) for i in range(self.slots)]
        self.payloads = [body[i * stride + _SLOT_ALIGN :][: self.slot_bytes] for i in range(self.slots)]

    @property
    def head(self) -> int:
        """Sequence number of the last published slot."""
        return int(self._head[0])

    @property
    def acked(self) -> int:
        """Sequence number up to which every reader has given its slots back."""
        return int(self._acks.min())


class RingWriter(Ring):
    """The single writer. `begin` gives the next slot's payload, `publish` makes it visible."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._slowest = self.acked  # when last looked at: readers only go on

    def has_room(self, seq: int) -> bool:
        """Whether slot `seq` may be written: no reader may still read its last lap."""
        if seq - self._slowest > self.slots:
            self._slowest = self.acked
        return seq - self._slowest <= self.slots

    def begin(self, seq: int) -> Bytes:
        """Payload of slot `seq` [slot_bytes]; raises RingFullError while a reader may still read its last lap."""
        if not self.has_room(seq):
            raise RingFullError(
                f"slot {seq} is {seq - self._slowest} ahead of the slowest reader; the ring has {self.slots}"
            )
        self._stamps[seq % self.slots][0] = -seq
        return self.payloads[seq % self.slots]

    def publish(self, seq: int) -> None:
        self._stamps[seq % self.slots][0] = seq
        self._head[0] = seq

    def restart(self) -> int:
        """Forget readers that died: all acks jump to the head, which is returned."""
        self._acks[:] = self._head[0]
        return self.head


class RingReader(Ring):
    """One of the readers, from the head on. A payload stays valid until it is acknowledged."""

    def __init__(self, fd: int, index: int = 0) -> None:
        super().__init__(fd)
        if not 0 <= index < self.readers:
            raise ProtocolError(f"reader {index} of a ring made for {self.readers}")
        self._index = index
        self.skip()  # what came before was meant for a reader that died

    def poll(self) -> Bytes | None:
        """Payload of the next slot if it is published, else None. Raises TornFrameError if it holds another frame."""
        if self.head < self.next:
            return None
        self.check(self.next)
        return self.payloads[self.next % self.slots]

    def check(self, seq: int) -> None:
        """Raise TornFrameError unless slot `seq % slots` holds exactly frame `seq`."""
        stamp = int(self._stamps[seq % self.slots][0])
        if stamp != seq:
            raise TornFrameError(f"slot {seq % self.slots} holds frame {stamp}, expected {seq}")

    def advance(self) -> None:
        """Go on to the next slot without giving this one back yet."""
        self.next += 1

    def skip(self) -> None:
        """Give back all that is published, unread."""
        head = self.head
        self.next = head + 1
        self._acks[self._index] = head

    def ack(self, seq: int) -> None:
        """Give back every slot up to `seq`."""
        self.check(seq)
        self._acks[self._index] = seq
