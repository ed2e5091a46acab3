"""What was measured on this GPU at a first start, kept on disk for the next ones.

Used by the tuning of linear layers and by the decoder's choice of ways. An executor that starts again takes the same
choices, so it computes the same bits, and is ready sooner.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton


def cache_path(kind: str, device: torch.device) -> Path:
    """The file of one kind of choices: they hold for one model of GPU and one version of Triton."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else "cpu"
    return root / "tandem-engine" / f"{kind}-{name}-triton-{triton.__version__}.json"


def read_choices(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}  # absent or broken: it is measured anew


def write_choices(path: Path, choices: dict[str, Any]) -> None:
    """Replace the file in one step, so that an engine that starts meanwhile reads the old or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(dict(sorted(choices.items())), file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass  # a home that cannot be written costs the next start some seconds
