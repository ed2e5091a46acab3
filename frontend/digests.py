"""API keys as SHA-256 digests: where keys come from, at the start of a launcher or frontend.

A key ends where it is read; only its digest is kept, compared and passed on. Keys must never reach a child's argument
list or environment, a log or a message.
"""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Final

from ipc.errors import ConfigError

ENVIRONMENT: Final = "ENGINE_API_KEY"


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def collect_digests(given: Sequence[str], file: str | None, environment: MutableMapping[str, str]) -> tuple[str, ...]:
    """The digests of all keys: those `given` are digests already; `file` has a key a line.

    The variable is removed from `environment`, so that no child inherits it. Raises ConfigError for an unusable file.
    """
    digests = list(given)
    if key := environment.pop(ENVIRONMENT, "").strip():
        digests.append(digest(key))
    if file is not None:
        digests += map(digest, _read_keys(Path(file)))
    return tuple(dict.fromkeys(digests))


def _read_keys(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"cannot read {path}: {reason}", param="--api-key-file") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path} holds no key", param="--api-key-file")  # rather than an open service
    return keys
