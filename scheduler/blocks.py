"""The pool of KV blocks: who holds each, which cached content it still has, and which is evicted next.

Free blocks form one doubly linked list, oldest content first; all operations are O(1) a block. A free block keeps the
hash of its content until it is handed out again, so a prefix hit can revive it. Block 0 is the null block, never given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ipc.frames import NULL_BLOCK


class BlockPool:
    """Invariant: every block but the null block is either free (ref 0, linked) or owned (ref > 0, not linked)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks  # null block included
        self.clear()

    def clear(self) -> None:
        """Forget owners and contents: the memory behind the blocks is new."""
        n = self.num_blocks
        self.refs = [0] * n
        self.hash_of: list[bytes | None] = [None] * n
        self.block_of: dict[bytes, int] = {}
        # The null block is the list's anchor: next[0] is the oldest free block, prev[0] the youngest.
        self._next = [*range(1, n), NULL_BLOCK]
        self._prev = [n - 1, *range(n - 1)]
        self.num_free = n - 1

    @property
    def capacity(self) -> int:
        """Blocks that requests can own at all."""
        return self.num_blocks - 1

    def allocate(self, count: int) -> list[int]:
        """Take the `count` oldest free blocks; their cached contents are forgotten."""
        assert count <= self.num_free, f"asked for {count} blocks, {self.num_free} are free"
        blocks = []
        block = self._next[NULL_BLOCK]
        for _ in range(count):
            blocks.append(block)
            self.refs[block] = 1
            block = self._next[block]
        self._next[NULL_BLOCK] = block
        self._prev[block] = NULL_BLOCK
        self.num_free -= count
        self.forget(blocks)
        return blocks

    def share(self, block: int) -> None:
        """One more owner for a block with known content, reviving it if it was free."""
        if self.refs[block] == 0:
            before, after = self._prev[block], self._next[block]
            self._next[before], self._prev[after] = after, before
            self.num_free -= 1
        self.refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each block of a sequence.

        The end of the sequence is freed first, so it is evicted first: a prefix is worth more than its continuation.
        Blocks without cached content go to the front, to be used before any content is lost.
        """
        for block in reversed(blocks):
            refs = self.refs[block] - 1
            assert refs >= 0, f"block {block} released once too often"
            self.refs[block] = refs
            if refs == 0:
                after = NULL_BLOCK if self.hash_of[block] is not None else self._next[NULL_BLOCK]
                before = self._prev[after]
                self._next[before] = self._prev[after] = block
                self._prev[block], self._next[block] = before, after
                self.num_free += 1

    def register(self, block: int, digest: bytes) -> None:
        """Make a block's content findable; the first block of equal content stays the one that is found."""
        if digest not in self.block_of:
            self.block_of[digest] = block
            self.hash_of[block] = digest

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody finds the content of these blocks any more; their owners keep them."""
        for block in blocks:
            digest = self.hash_of[block]
            if digest is not None:
                self.hash_of[block] = None
                del self.block_of[digest]

    def find_prefix(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of a hash chain."""
        blocks = []
        for digest in digests:
            block = self.block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_in(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` sharing would take out of the free list."""
        return sum(self.refs[block] == 0 for block in blocks)

    def check(self, owned: Sequence[int]) -> None:
        """Assert conservation: `owned` lists each block once per owner; free + owned must be all of them."""
        counts = [0] * self.num_blocks
        for block in owned:
            counts[block] += 1
        assert counts == self.refs, "reference counts differ from the owners"
        free, block = [], self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            free.append(block)
            block = self._next[block]
        assert len(free) == len(set(free)) == self.num_free, f"{len(free)} blocks linked, {self.num_free} counted"
        assert {b for b in range(1, self.num_blocks) if not counts[b]} == set(free), "a block is neither free nor owned"
        assert all(self.hash_of[b] == d for d, b in self.block_of.items()), "prefix index and block hashes differ"
