"""Model folders for tests of the launcher and the server: a tokenizer, a config, and weights of the right shape."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tests.frontend.tokenizers_for_tests import save_byte_level

VOCAB_SIZE = 440
CONTEXT_TOKENS = 2048


def write_config(folder: Path, **changes: Any) -> Path:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": CONTEXT_TOKENS,
        "eos_token_id": 0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def write_safetensors(path: Path, nbytes: int = 16) -> Path:
    """A well-formed file of one tensor."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(nbytes))
    return path


def fake_tokens(prompt_tokens: int, seed: int, count: int) -> list[int]:
    """What the fake executor makes of the tiny model, whatever happens meanwhile: see executor/fake.py."""
    ids = range(1, VOCAB_SIZE)  # 0 ends a sequence
    return [ids[(seed + prompt_tokens + i) % len(ids)] for i in range(count)]


def tiny_model(folder: Path) -> Path:
    """What `engine-launch --fake-executor` can serve under the name of the folder."""
    save_byte_level(folder)
    return write_config(folder)
