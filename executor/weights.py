"""The weights of a model: read from safetensors or drawn at random; all of them, or this rank's pieces.

Called by `executor.model` at load. A sharded model is built without memory, cut by its plan (`executor.shards`), and
filled parameter by parameter, so a rank never holds more than its pieces and one full module. Random weights are drawn
module by module from the module's own name: the same for any number of ranks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import torch
import transformers
from safetensors import safe_open
from torch import nn

from executor import probe
from executor.ranks import Ranks
from executor.shards import Cutter, Piece
from ipc.config import EngineConfig
from ipc.errors import ConfigError, ModelError

# transformers' loaders are untyped.
_CONFIGS: Final[Any] = transformers.AutoConfig
_MODELS: Final[Any] = transformers.AutoModelForCausalLM
_OPEN: Final[Any] = safe_open
_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # safetensors' names

Read = Callable[[str, Piece | None], torch.Tensor]  # (full name, this rank's piece of it; None: all of it)


def load_module(config: EngineConfig, device: torch.device, ranks: Ranks | None) -> Any:
    """transformers' module for the model of `config`, with its weights, on `device`.

    Raises ModelError if the folder, the architecture or its plan is at fault, ConfigError if the device is.
    """
    probe.register()
    try:
        if not config.random_weights:
            if not (Path(config.card.path) / "config.json").is_file():
                raise ModelError(f"{config.card.path} has no config.json", param="--model")
            if ranks is None:
                return _pretrained(config).to(device)
        return _build(config, device, ranks)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"the weights do not fit the device: {error}", param="--model") from error
    except ConfigError:
        raise
    except Exception as error:
        what = "build" if config.random_weights else "load"
        reason = f"{type(error).__name__}: {error}"
        if error.args == (probe.SERVE,):  # looked up in a table of its own
            reason = (
                "it does not attend through transformers' AttentionInterface (private attention code is not served)"
            )
        raise ModelError(f"cannot {what} {config.card.path}: {reason}", param="--model") from error


def _pretrained(config: EngineConfig) -> Any:
    """The whole model as transformers loads it, on the CPU."""
    module, report = _MODELS.from_pretrained(
        config.card.path,
        dtype=config.dtype,
        attn_implementation=probe.SERVE,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{config.card.path} lacks {len(missing)} weights, the first is {missing[0]}", param="--model")
    return module


def _build(config: EngineConfig, device: torch.device, ranks: Ranks | None) -> Any:
    folder, trust = config.card.path, config.trust_remote_code
    architecture = _CONFIGS.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    if ranks is not None and getattr(architecture, "quantization_config", None) is not None:
        raise ModelError("quantized weights are not shared out among ranks", param="--tensor-parallel-size")
    checkpoint = None if config.random_weights else _Checkpoint(Path(folder))
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else architecture.dtype
    if dtype is None:
        dtype = torch.float32 if checkpoint is None else checkpoint.dtype
    with torch.device("meta"):
        model = _MODELS.from_config(
            architecture, dtype=dtype, attn_implementation=probe.SERVE, trust_remote_code=trust
        ).eval()
    names: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)  # a tied parameter is stored under one name
    drawn = _Drawn(model, config.random_seed, device)
    pieces: dict[str, Piece] = {}
    if ranks is not None:
        cutter = Cutter(model, ranks)
        cutter.cut()
        pieces = cutter.pieces
    _fill_buffers(model, device)
    rank = 0 if ranks is None else ranks.rank
    read = drawn.reader(rank) if checkpoint is None else _reader(config, checkpoint, model, set(names.values()), rank)
    _fill(model, device, names, pieces, read)
    if checkpoint is not None:
        for name in model.state_dict().keys() - names.keys():
            model.get_buffer(name).copy_(read(name, None))
    _check_buffers(model)
    return model


def _fill(model: nn.Module, device: torch.device, names: dict[str, str], pieces: dict[str, Piece], read: Read) -> None:
    """Give every parameter its memory. `names`: under which full name each is stored."""
    made: dict[tuple[str, Piece | None], nn.Parameter] = {}
    for name, stored in names.items():
        piece = pieces.get(name)
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        if (parameter := made.get((stored, piece))) is None:
            tensor = read(stored, piece).to(device, owner.get_parameter(leaf).dtype)
            parameter = made[stored, piece] = nn.Parameter(tensor.contiguous(), requires_grad=False)
        setattr(owner, leaf, parameter)


def _fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers are computed by the model's own initialization, as in transformers' loader."""
    for name, module in model.named_modules():
        held = {leaf: buffer for leaf, buffer in module._buffers.items() if buffer is not None}
        for leaf, buffer in held.items():
            nothing = float("nan") if buffer.is_floating_point() else 0
            module._buffers[leaf] = torch.full_like(buffer, nothing, device=device)
        if held:
            _initialize(model, name, module)


def _check_buffers(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise ModelError(f"buffer {name} is neither stored nor initialized by {type(model).__name__}")


@torch.no_grad()
def _initialize(model: nn.Module, name: str, module: nn.Module) -> None:
    """Initialize the own tensors of `module`, which stands at `name`, as the model nearest to it would."""
    while not hasattr(nearest := model.get_submodule(name), "_init_weights"):
        name = name.rpartition(".")[0]
    initialize: Callable[[nn.Module], None] = nearest._init_weights  # type: ignore[assignment]
    initialize(module)


class _Drawn:
    """Full parameters at random, a module at a time, whatever the model is cut into later."""

    def __init__(self, model: nn.Module, seed: int, device: torch.device) -> None:
        self._model, self._seed, self._device = model, seed, device
        self._modules = {name: copy.copy(module) for name, module in model.named_modules()}
        for module in self._modules.values():
            module._parameters = dict(module._parameters)
        self._drawn = ""  # the module whose tensors are at hand
        self._tensors: dict[str, torch.Tensor] = {}

    def reader(self, rank: int) -> Read:
        def read(name: str, piece: Piece | None) -> torch.Tensor:
            module, _, leaf = name.rpartition(".")
            if self._drawn != module or leaf not in self._tensors:
                self._draw(module)
            full = self._tensors[leaf]
            return full if piece is None else piece.of(full, full.ndim, rank)

        return read

    def _draw(self, name: str) -> None:
        self._tensors = {}  # before others take memory
        module = copy.copy(self._modules[name])
        module._parameters = {
            leaf: None if p is None else nn.Parameter(torch.zeros_like(p, device=self._device), requires_grad=False)
            for leaf, p in self._modules[name]._parameters.items()
        }
        module._buffers = dict(module._buffers)
        torch.manual_seed(crc32(f"{self._seed} {name}".encode()))
        _initialize(self._model, name, module)
        self._drawn, self._tensors = name, {leaf: p for leaf, p in module._parameters.items() if p is not None}


class _Checkpoint:
    """The tensors of a folder's safetensors files, of which only what is asked for is read."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
            files = {name: _OPEN(folder / name, framework="pt") for name in set(placed.values())}
            self._files = {key: files[name] for key, name in placed.items()}
        else:
            file = _OPEN(folder / "model.safetensors", framework="pt")
            self._files = dict.fromkeys(file.keys(), file)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor of floating point."""
        stored = (file.get_slice(key).get_dtype() for key, file in self._files.items())
        return next((_DTYPES[dtype] for dtype in stored if dtype in _DTYPES), torch.float32)

    def key(self, name: str, prefix: str) -> str | None:
        """What the tensor `name` of a model is called here; the base model's `prefix` may be there or not."""
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((key for key in names if key in self._files), None)

    def read(self, key: str, piece: Piece | None, rank: int) -> torch.Tensor:
        file = self._files[key]
        if piece is None:
            whole: torch.Tensor = file.get_tensor(key)
            return whole
        stored = file.get_slice(key)
        return piece.of(stored, len(stored.get_shape()), rank)


def _reader(config: EngineConfig, checkpoint: _Checkpoint, model: Any, names: set[str], rank: int) -> Read:
    """Reads pieces from the files; or, where those are not stored as the model names them, cuts the whole model."""
    stored = names | (model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys())
    keys = {name: checkpoint.key(name, model.base_model_prefix) for name in stored}
    if all(keys.values()) and not getattr(model, "_keep_in_fp32_modules", None):

        def read(name: str, piece: Piece | None) -> torch.Tensor:
            return checkpoint.read(keys[name] or name, piece, rank)

        return read
    whole = _pretrained(config).state_dict()

    def cut(name: str, piece: Piece | None) -> torch.Tensor:
        full: torch.Tensor = whole[name]
        return full if piece is None else piece.of(full, full.ndim, rank)

    return cut
