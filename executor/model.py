"""A transformers causal LM, unmodified, whose attention runs over pages. Loaded, learned and checked before it serves.

Owns the weights and the KV cache of one device. Called by the executor's launch loop on the compute stream; `forward`
must never wait for the device. Weights come from safetensors only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers
from torch import nn

from executor import compilation, fusion, probe, products
from executor.attention import LayerSpec, PagedLayer, choose_backend
from executor.inputs import StepInputs
from executor.kv_cache import allocate_pages, bytes_per_block, choose_num_blocks
from executor.ranks import Ranks
from executor.weights import load_module
from ipc.config import EngineConfig
from ipc.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from executor.decoder import FusedDecoder

__all__ = ["Model", "choose_num_blocks", "load_model"]

_LOGGING: Final[Any] = transformers.utils.logging  # untyped

_FEW_TOKENS: Final = 4
_REASON_LETTERS: Final = 400  # of a compiler's complaint, which may go on for pages
_CHECK_TOKENS: Final = 17  # more than a block of the usual size
_FUSED_SHARE: Final = 0.5  # the fused decoder rounds where the model does, so it may differ less
# Of |paged - own| / |own|: a misplaced page is near 1, rounding grows with the depth of the model.
_CHECK_LIMIT: Final = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class Model:
    """A loaded model on its device. Has no KV blocks until `allocate_kv`."""

    def __init__(
        self, module: Any, layers: list[tuple[nn.Module, LayerSpec]], vocab_size: int, config: EngineConfig
    ) -> None:
        self.vocab_size = vocab_size
        parameter = next(module.parameters())
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        self.block_size = config.block_size
        self.max_model_len = config.card.max_model_len
        self._module = module
        specs = [spec for _, spec in layers]
        self._backend = choose_backend(
            specs, block_size=config.block_size, max_rows=config.max_num_seqs, device=self.device
        )
        self.layers = [PagedLayer(spec, *allocate_pages(spec, 0, config.block_size, self.device)) for spec in specs]
        for (attention, _), layer in zip(layers, self.layers, strict=True):
            setattr(attention, probe.LAYER, probe.PagedAttention(self._backend, layer))
        self.attentions = [attention for attention, _ in layers]
        self.implementation = probe.SERVE  # what the module attends by, in transformers' terms
        self.ranks: Ranks | None = None
        self.sums_by_peers = config.sums_by_peers
        self.notes: list[str] = []  # what was done to make it fast, or why not
        self.has_flash = False  # FlashAttention takes long prompts, outside CUDA graphs
        self.decoder: FusedDecoder | None = None  # runs in place of the module if it is recognized
        self._keeps_logits = "logits_to_keep" in inspect.signature(type(module).forward).parameters

    @property
    def backend(self) -> str:
        """Name of the attention backend, to be printed at start."""
        return self._backend.name

    def kv_bytes_per_block(self) -> int:
        """Bytes of one KV block over all layers."""
        return bytes_per_block([layer.spec for layer in self.layers], self.block_size)

    def allocate_kv(self, num_blocks: int) -> None:
        """Replace the KV cache by `num_blocks` zeroed blocks. Raises ConfigError if they do not fit the device."""
        for layer in self.layers:
            layer.k_cache = layer.v_cache = torch.empty(0)
        try:
            for layer in self.layers:
                layer.k_cache, layer.v_cache = allocate_pages(layer.spec, num_blocks, self.block_size, self.device)
        except (RuntimeError, MemoryError, ValueError) as error:  # of torch, of numpy
            raise ConfigError(
                f"{num_blocks} KV blocks do not fit: {error}", param="--num-gpu-blocks-override"
            ) from error

    @property
    def num_blocks(self) -> int:
        return len(self.layers[0].k_cache)

    @property
    def num_parameters(self) -> int:
        """Of this rank; with several, of the one with the fewest."""
        number = sum(parameter.numel() for parameter in self._module.parameters())
        return number if self.ranks is None else self.ranks.least(number)

    @torch.inference_mode()
    def compile_ahead(self, steps: Iterable[StepInputs]) -> None:
        """Compile on all cores what these steps will launch, if a fused decoder runs them: other code may look at what
        it computes."""
        if self.decoder is not None:
            self.decoder.compile_ahead(partial(self.forward, inputs) for inputs in steps)

    @torch.inference_mode()
    def run_products(self, max_logits: int, max_tokens: int) -> None:
        """As `executor.products` has it."""
        products.run_products(self._module, max_logits, max_tokens)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Run a step: writes K and V of its tokens, returns logits [rows + scores, vocab] at `inputs.last_index`.

        Capturable in a CUDA graph.
        """
        self._backend.begin(inputs)
        if self.decoder is not None:
            return self.decoder.forward(inputs)
        keep: dict[str, Any] = {"logits_to_keep": inputs.last_index} if self._keeps_logits else {}
        output = self._module(
            input_ids=inputs.token_ids[None], position_ids=inputs.positions[None], use_cache=False, **keep
        )
        logits: torch.Tensor = output.logits[0]
        return logits if self._keeps_logits else logits[inputs.last_index]


def load_model(
    config: EngineConfig, progress: bool, device: torch.device | None = None, ranks: Ranks | None = None
) -> Model:
    """Load the model of `config`, or this rank's shards of it, onto its device, learn its layers, and check that paging
    leaves its logits alone.

    Raises ModelError with the reason if the folder or the architecture is at fault, ConfigError if the device is.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device", param="--device")
    if not progress:
        _LOGGING.disable_progress_bar()
    module = load_module(config, device or torch.device(config.device), ranks)
    module.eval().requires_grad_(False)
    text_config = module.config.get_text_config(decoder=True)
    max_model_len = config.card.max_model_len
    try:
        probe.fix_rope(module, getattr(text_config, "rope_parameters", None) or {}, max_model_len)
        with torch.inference_mode():
            fused, unfused_reason = fusion.fuse_linears(module, partial(_own_logits, module), _limit(module.dtype))
            layers, vocab_size = probe.learn_layers(module, text_config.num_hidden_layers, max_model_len)
        model = Model(module, layers, vocab_size, config)
        model.ranks = ranks
        if ranks is not None:
            model.notes.append(f"{ranks.size} ranks")
        model.notes.append(f"{fused} groups of linear layers fused" if fused else f"not fused: {unfused_reason}")
        check_paging(model)
        _try_flash(model)
    except ConfigError:
        raise
    except Exception as error:
        reason = f"{type(module).__name__} cannot be served: {type(error).__name__}: {error}"
        raise ModelError(reason, param="--model") from error
    return model


def _try_flash(model: Model) -> None:
    """Let FlashAttention-3 take long prompts if it is there and leaves the logits alone; on one rank only."""
    # A rank that failed the check alone would leave the others waiting for its sums.
    if model.device.type != "cuda" or model.ranks is not None:
        return
    from executor.attention.flash import find_flash_attention
    from executor.attention.triton import TritonBackend  # Triton is not there on a machine without CUDA

    backend, found = model._backend, find_flash_attention(model.device)
    assert isinstance(backend, TritonBackend), f"backend {backend.name} on CUDA"
    if found is None:
        return
    backend.use_flash(found, always=True)
    try:
        check_paging(model)
        backend.use_flash(found)
        model.has_flash = True
        model.notes.append("long prompts by FlashAttention-3")
    except Exception as error:
        backend.use_flash(None)
        model.notes.append(f"no FlashAttention-3: {_one_line(error)}")


def optimize_model(model: Model) -> None:
    """Make a loaded model on CUDA fast: run it by fused kernels if its code is known to them, else compile its layers.

    Either is checked against the model's own logits; what fails the check is served as it was.
    """
    from triton.runtime.errors import OutOfResources  # Triton is not there on a machine without CUDA

    from executor.attention.triton import TritonBackend
    from executor.decoder import FusedDecoder
    from executor.recognition import NotRecognizedError, recognize

    backend = model._backend
    assert isinstance(backend, TritonBackend), f"backend {backend.name} on CUDA"
    try:
        decoder = FusedDecoder(recognize(model._module), model.layers, backend, model.max_model_len)
        model.decoder = decoder
        _open_peers(model, decoder)
        for ways in decoder.both_ways():
            decoder.ways = ways
            check_paging(model, share=_FUSED_SHARE)
        decoder.tune()
        model.notes.append("fused decoder")
    except (NotRecognizedError, ModelError, OutOfResources) as error:  # the last: a GPU with less shared memory
        model.decoder = None
        model.notes.append(f"no fused decoder: {error}")
        compile_model(model)


def _open_peers(model: Model, decoder: FusedDecoder) -> None:
    from executor.peer_start import open_peers

    if model.ranks is not None:
        reason = "as asked, or on several hosts"
        if model.sums_by_peers:
            decoder.peers, reason = open_peers(model.ranks, decoder.senders)
        model.notes.append(f"sums by NCCL: {reason}" if decoder.peers is None else "sums by peer memory")


def compile_model(model: Model, backend: str = "inductor") -> None:
    """Compile the layers of a loaded model, for one token and for several, and check it again.

    Takes seconds to minutes. A model that cannot be compiled, or computes something else then, is left as it was.
    """
    try:
        compilation.compile_layers(model._module, model.attentions, backend)
        model.implementation = compilation.COMPILED
        check_paging(model)
        model.notes.append("layers compiled")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        compilation.restore(model._module, model.attentions)
        model.implementation = probe.SERVE
        model.notes.append(f"not compiled: {type(error).__name__}: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_REASON_LETTERS]


def _own_logits(module: Any) -> torch.Tensor:
    """float32 logits [tokens, vocab] of a few tokens through the model's own attention."""
    probe.set_implementation(module, "eager")
    tokens = torch.arange(_FEW_TOKENS, device=module.device)[None]
    logits: torch.Tensor = module(input_ids=tokens, use_cache=False).logits[0].float()
    return logits


def _limit(dtype: torch.dtype) -> float:
    return _CHECK_LIMIT.get(dtype, 2e-1)


@torch.inference_mode()
def check_paging(model: Model, share: float = 1.0) -> None:
    """Run a random prompt through the pages, in two chunks and a decode row, and in one go through eager attention.

    Raises ModelError if the last logits differ by more than `share` of what rounding in the model's dtype explains.
    """
    module = model._module
    num_tokens = min(_CHECK_TOKENS, model.max_model_len)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (num_tokens,), generator=random).to(model.device)
    pages = -(-num_tokens // model.block_size)
    table = torch.arange(pages, 0, -1, dtype=torch.int32, device=model.device)[None]  # [1, pages]
    model.allocate_kv(pages + 1)
    probe.set_implementation(module, model.implementation)
    ends = sorted({num_tokens * 2 // 3, num_tokens - 1, num_tokens})
    chunks = [(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True) if end > start]
    steps = [_one_row(tokens, start, end, table, model.block_size) for start, end in chunks]
    model.compile_ahead(steps)
    logits = torch.empty(0)
    for step in steps:
        logits = model.forward(step)[0].float()
    model.allocate_kv(0)
    probe.set_implementation(module, "eager")
    # Only if something is compiled: the stance imports the compiler, which takes a second.
    compiled = model.implementation != probe.SERVE
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        expected = module(input_ids=tokens[None], use_cache=False).logits[0, -1].float()
    probe.set_implementation(module, model.implementation)
    difference = ((logits - expected).norm() / expected.norm().clamp_min(1e-6)).item()
    limit = share * _limit(model.dtype)
    if not difference <= limit:
        raise ModelError(
            f"{type(module).__name__} cannot be served: paged logits differ from its own by {difference:.2g} of their "
            f"norm (limit {limit:g} in {model.dtype})",
            param="--model",
        )


def _one_row(tokens: torch.Tensor, start: int, end: int, table: torch.Tensor, block_size: int) -> StepInputs:
    """A step of one row: tokens [start, end) of `tokens`, pages from `table` [1, pages]."""
    device, length = tokens.device, end - start
    positions = torch.arange(start, end, device=device)

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return StepInputs(
        num_rows=1,
        num_decode=int(length == 1),
        num_prefill=int(length > 1),
        num_tokens=length,
        counts=int32(1, length == 1),
        token_ids=tokens[start:end],
        positions=positions,
        slot_mapping=table[0, positions // block_size].to(torch.int64) * block_size + positions % block_size,
        row_slot=torch.zeros(1, dtype=torch.int64, device=device),
        query_start=int32(0, length),
        kv_len=int32(end),
        last_index=torch.tensor([length - 1], device=device),
        block_table=table,
    )
