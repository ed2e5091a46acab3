"""The model on disk: finds its folder, reads what a frontend must know, and checks the weights before anything loads.

Called by the launcher. Never imports torch, never unpickles, and reads no more of a weight file than its header.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, Final

from frontend.request import GenerateParams
from ipc.errors import ConfigError, InvalidParameterError, ModelError
from ipc.schema import ModelCard

_HEADER_LIMIT_BYTES: Final = 100 << 20  # safetensors' own limit
_CONTEXT_KEYS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
_SAMPLING_KEYS: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_PICKLED: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DOWNLOAD: Final = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_SKIP: Final = ["*/*", "consolidated*.safetensors"]  # copies of the same weights in another layout


def find_model(model: str, *, weights: bool = True, trust_remote_code: bool = False) -> Path:
    """The folder of `model`: itself if it is one, else the hub's snapshot of it, downloaded if needed.

    Raises ModelError with the reason: no such folder, no such hub id, gated, offline.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ModelError(f"{model} is a file, expected a folder or a hub id", param="--model")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise ModelError(f"no such folder: {model}", param="--model")
    patterns = _DOWNLOAD[0 if weights else 1 :] + (["*.py"] if trust_remote_code else [])
    return _download(model, patterns)


def _download(model: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns=_SKIP))
    except errors.GatedRepoError:
        reason = "is gated: accept its licence on the hub and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "is neither a folder here nor a model on the hub (a private one needs HF_TOKEN)"
    except errors.HFValidationError:
        reason = "is neither a folder here nor a well-formed hub id ORG/NAME"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "is no folder here and not in the hub cache, and the hub cannot be reached"
    except (errors.HfHubHTTPError, OSError) as error:
        reason = f"could not be downloaded: {str(error).splitlines()[0]}"
    raise ModelError(f"{model!r} {reason}", param="--model")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}", param="--model") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected an object", param="--model")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def read_sampling_defaults(folder: Path) -> dict[str, float]:
    """What the model's generation_config.json says of sampling. Raises ModelError for a value out of range."""
    path = folder / "generation_config.json"
    declared = _read_json(path) if path.exists() else {}
    found = {name: declared[name] for name in _SAMPLING_KEYS if declared.get(name) is not None}
    try:
        GenerateParams(**found)
    except InvalidParameterError as error:
        raise ModelError(f"{path}: {error}", param="--generation-config") from error
    return found


def _text_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of text; what it leaves to the defaults of its class, as nested ones do, transformers
    knows."""
    nested = config.get("text_config")
    text = {**config, **(nested if isinstance(nested, dict) else {})}
    if "vocab_size" in text and any(key in text for key in _CONTEXT_KEYS):
        return text
    from transformers import AutoConfig  # imported here: it takes half a second, and few models need it

    try:
        whole = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception:  # what is missing is said by who needs it
        return text
    return {**whole.get_text_config(decoder=True).to_dict(), **text}


def read_card(
    folder: Path,
    *,
    name: str,
    max_model_len: int | None,
    max_logprobs: int,
    sampling_defaults: dict[str, float] | None = None,
) -> ModelCard:
    """What frontends must know of the model in `folder`; `max_model_len` lowers the model's own context.

    Raises ModelError for a missing or unusable config.json, ConfigError when a flag asks for more than the model has.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder} has no config.json", param="--model")
    config = _read_json(path)
    text = _text_config(folder, config)
    vocab_size = text.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ModelError(f"{path} says vocab_size {vocab_size!r}, expected a whole number above 0", param="--model")
    context = next((text[key] for key in _CONTEXT_KEYS if isinstance(text.get(key), int)), None)
    if context is None and max_model_len is None:
        raise ConfigError(f"{path} states no context length; give one", param="--max-model-len")
    if context is not None and max_model_len is not None and max_model_len > context:
        raise ConfigError(f"{max_model_len} tokens, but the model's context is {context}", param="--max-model-len")
    generation = folder / "generation_config.json"
    declared = _read_json(generation).get("eos_token_id") if generation.exists() else None
    eos = dict.fromkeys(_token_ids(declared) + _token_ids(text.get("eos_token_id")))
    return ModelCard(
        name=name,
        path=str(folder),
        max_model_len=max_model_len or context or 0,
        vocab_size=vocab_size,
        eos_token_ids=tuple(token for token in eos if 0 <= token < vocab_size),
        max_logprobs=min(max_logprobs, vocab_size),
        sampling_defaults=sampling_defaults or {},
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`, as its index names them. Raises ModelError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map", param="--model")
        files = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(f"{folder} lacks {missing[0]}{more}, which its index names", param="--model")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = next((file.name for pattern in _PICKLED for file in sorted(folder.glob(pattern))), None)
    if pickled:
        raise ModelError(
            f"{folder} has only {pickled}: loading pickled weights runs code, so they are refused; use safetensors",
            param="--model",
        )
    raise ModelError(f"{folder} has no safetensors file", param="--model")


def check_weights(folder: Path) -> int:
    """Compare each weight file's size with what its header promises; returns the bytes of all.

    Raises ModelError naming the file, the bytes expected and the bytes found.
    """
    return sum(_check_safetensors(file) for file in weight_files(folder))


def _check_safetensors(file: Path) -> int:
    # Layout of the format: uint64 length of the header, the header as JSON, then the tensors back to back.
    found = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ModelError(f"{file} is a Git LFS pointer, not the file; run `git lfs pull`", param="--model")
        if len(start) < 8:
            raise ModelError(f"{file} is truncated: {found} bytes, a safetensors header alone needs 8", param="--model")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > _HEADER_LIMIT_BYTES:
            raise ModelError(f"{file} is not a safetensors file: header of {header_bytes} bytes", param="--model")
        if 8 + header_bytes > found:
            raise ModelError(
                f"{file} is truncated: its header needs {8 + header_bytes} bytes, found {found}", param="--model"
            )
        header = stream.read(header_bytes)
    try:
        tensors = json.loads(header)
        ends = [int(entry["data_offsets"][1]) for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} has a broken safetensors header: {error!r}", param="--model") from error
    expected = 8 + header_bytes + max(ends, default=0)
    if expected != found:
        word = "is truncated" if found < expected else "is damaged"
        raise ModelError(f"{file} {word}: expected {expected} bytes, found {found}", param="--model")
    return found


def served_name(model: str) -> str:
    """The name in the API when none is given: the last folder of a path, the whole of a hub id."""
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser().resolve().name
    return model.rstrip(os.sep)
