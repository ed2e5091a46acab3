"""What was measured on this GPU at a first start, kept on disk for the next ones.

Used by the tuning of linear layers and by the decoder's choice of ways. An executor that starts again takes the same
choices, so it computes the same bits, and is ready sooner.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def cache_path(kind: str, device: torch.device, *measured: ModuleType) -> Path:
    """The file of one kind of choices: they hold for one model of GPU, one version of Triton and these kernels."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    for module in measured:
        digest.update(Path(str(module.__file__)).read_bytes())

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else "cpu"
    return root / "tandem-engine" / f"{kind}-{name}-{digest.hexdigest()[:12]}.json"


def read_choices(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}  # absent or broken: it is measured anew


def settle_choices(path: Path, seen: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Keep what was measured, or take what another engine has kept since the file read as `seen`.

    So engines that start at the same time choose alike, and alike again when one of them starts anew.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            now = read_choices(path)
            settled = {
                key: now[key] if key in now and now[key] != seen.get(key) else choice
                for key, choice in measured.items()
            }
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                json.dump(dict(sorted((now | settled).items())), file, indent=1)
            os.replace(file.name, path)  # who reads without the lock gets the old or the new one
            return settled
    except OSError:
        return measured  # a home that cannot be written costs the next start some seconds
