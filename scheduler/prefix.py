"""Prefix hashes: a block is identified by its tokens and everything before them, within one tenant's salt.

hash(i) = BLAKE2b-128(hash(i - 1) + tokens of block i), hash(-1) = BLAKE2b-128(salt). A cryptographic hash, because a
collision would show one request another's context.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

_DIGEST_BYTES: Final = 16


def root_hash(salt: str) -> bytes:
    """What the chain of a tenant starts from; another salt shares nothing."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def extend_chain(
    chain: list[bytes], root: bytes, tokens: npt.NDArray[np.int32], block_size: int, limit_tokens: int
) -> None:
    """Append the hashes of the full blocks among `tokens[:limit_tokens]` that `chain` lacks.

    About 1 us a block.
    """
    first, last = len(chain), limit_tokens // block_size
    if first >= last:
        return
    parent = chain[-1] if chain else root
    step = 4 * block_size
    data = tokens[first * block_size : last * block_size].tobytes()
    for offset in range(0, len(data), step):
        parent = blake2b(parent + data[offset : offset + step], digest_size=_DIGEST_BYTES).digest()
        chain.append(parent)
