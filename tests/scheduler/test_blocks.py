"""The pool of KV blocks by itself: whose content is lost first, and what a hit brings back."""

from __future__ import annotations

import pytest

from scheduler.blocks import BlockPool


def filled(num_blocks: int) -> tuple[BlockPool, list[int]]:
    """A pool whose blocks all hold known content "0", "1", ... and are free again, released one after another."""
    pool = BlockPool(num_blocks + 1)
    blocks = pool.allocate(num_blocks)
    for i, block in enumerate(blocks):
        pool.register(block, b"%d" % i)
    for block in blocks:
        pool.release([block])
    return pool, blocks


def known(pool: BlockPool, count: int) -> list[int]:
    return [i for i in range(count) if pool.find_prefix([b"%d" % i])]


def test_the_content_unused_for_longest_is_lost_first() -> None:
    pool, blocks = filled(5)
    pool.share(blocks[0])  # used once more, so it becomes the youngest
    pool.release([blocks[0]])
    assert pool.allocate(2) == [blocks[1], blocks[2]]
    assert known(pool, 5) == [0, 3, 4]


def test_a_hit_takes_a_free_block_back_with_its_content() -> None:
    pool, blocks = filled(4)
    assert pool.num_free_in(blocks[1:3]) == 2
    for block in blocks[1:3]:
        pool.share(block)
    pool.share(blocks[1])
    assert (pool.num_free, pool.num_free_in(blocks[1:3])) == (2, 0)
    assert pool.allocate(2) == [blocks[0], blocks[3]], "a shared block was handed out"
    assert known(pool, 4) == [1, 2]
    pool.check([blocks[0], blocks[1], blocks[1], blocks[2], blocks[3]])


def test_the_end_of_a_sequence_is_lost_before_its_beginning() -> None:
    pool = BlockPool(5)
    sequence = pool.allocate(3)
    for i, block in enumerate(sequence):
        pool.register(block, b"%d" % i)
    pool.release(sequence)
    assert len(pool.allocate(2)) == 2
    assert known(pool, 3) == [0, 1], "the block without content goes first, then the end of the sequence"


def test_equal_content_is_found_once_and_outlives_its_double() -> None:
    pool = BlockPool(4)
    first, double = pool.allocate(2)
    pool.register(first, b"0")
    pool.register(double, b"0")
    pool.release([double])
    pool.allocate(2)  # the double among them
    assert pool.find_prefix([b"0", b"1"]) == [first]


def test_what_breaks_conservation_is_noticed() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.check(blocks)
    with pytest.raises(AssertionError, match="differ from the owners"):
        pool.check(blocks[:1])
    pool.release(blocks)
    with pytest.raises(AssertionError, match="once too often"):
        pool.release(blocks[:1])
    with pytest.raises(AssertionError, match="asked for 4 blocks, 3 are free"):
        BlockPool(4).allocate(4)
