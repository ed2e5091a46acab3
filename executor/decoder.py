"""A recognized transformers decoder, run by as few kernels as its data flow allows. CUDA and bfloat16 only.

Owns the order of launches of a step. Called by `executor.model` in place of the module's own forward, with the module's
own weights; must compute the same function, which is checked at load.

    few rows (linear_kernel)                           many rows (cuBLAS)
    embed                                              embed, norm
    each layer:
      norm·qkv                                         qkv
      head norms, rotary, K and V into their pages;    the same
        attention: one kernel for decode rows
      o + residual                                     o; residual, norm
      norm·gate, up, SiLU                              gate and up; SiLU
      down + residual                                  down; residual, norm
    norm·head                                          head

The head of more than MAX_HEAD_ROWS rows, and the product before it, are always as in the right column.

Several ranks: as many rows, but by either kind of product. The sum over ranks stands between o, or down, and the
residual, which therefore is added once, to the sum; the head's shares are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, Final

import torch
import torch.nn.functional as F
import triton
from tqdm import tqdm

from executor import layer_kernels, linear_kernels
from executor.attention import LayerSpec, PagedLayer, decode_kernels, work_kernels
from executor.attention import heads as head_kernels
from executor.attention import kernels as attention_kernels
from executor.attention.triton import Heads, TritonBackend
from executor.compile_ahead import compiling_ahead, launch
from executor.inputs import StepInputs
from executor.layer_kernels import add_norm_kernel, embed_kernel, gate_kernel, rotate_kernel
from executor.layer_launch import LayerLaunch
from executor.linear import (
    MAX_HEAD_ROWS,
    MAX_ROWS,
    ROW_CLASSES,
    Linear,
    Scaled,
    SkinnyLinears,
    has_pdl,
    row_class,
    time_graph,
)
from executor.measured import cache_path, read_choices, settle_choices
from executor.peer_start import Senders
from executor.peers import LOGIT_ROWS, Peers, Place
from executor.recognition import DecoderWeights, LayerWeights, Norm, NotRecognizedError, require
from executor.shards import ShardedEmbedding

_MANY: Final = 0  # the class of steps of more than MAX_ROWS tokens
_MANY_TIMED: Final = 512
DTYPES: Final = (torch.bfloat16,)  # float16 has no room for rows before their norm, float32 needs exact products
_GATE_BLOCK: Final = 1024
_KERNELS: Final = (layer_kernels, linear_kernels, decode_kernels, work_kernels, head_kernels, attention_kernels)
_ALIGNMENT: Final = 16  # bytes, of every address that Triton takes for a multiple of them
_HEADS: Final = 8  # of one program of `rotate_kernel`, where there are many tokens
_FEW_TOKENS: Final = 64  # up to here there are not


@dataclass(frozen=True, slots=True)
class Way:
    """How steps of one class are run. `few`: by `linear_kernel`, for at most MAX_ROWS tokens; `pdl`: kernels are
    launched while the one ahead ends."""

    few: bool
    pdl: bool


class FusedDecoder:
    """The forward of a model, from token ids to logits."""

    def __init__(
        self, weights: DecoderWeights, layers: list[PagedLayer], backend: TritonBackend, max_model_len: int
    ) -> None:
        """Raises NotRecognizedError if the kernels cannot run this model."""
        device, dtype = weights.embedding.device, weights.embedding.dtype
        require(dtype in DTYPES, f"its dtype is {dtype}")
        for layer in layers:
            spec = layer.spec
            require(spec.k_dim == spec.v_dim and spec.k_dim & (spec.k_dim - 1) == 0, f"its heads are {spec.k_dim} wide")
            require(spec.softcap is None and not spec.has_sinks, "its attention has a soft cap or sinks")
        self._weights, self._layers, self._backend, self._ranks = weights, layers, backend, weights.ranks
        self.peers: Peers | None = None  # sums of few rows, if they can be written to the other GPUs
        self._has_pdl = self._pdl = has_pdl(device)  # `_pdl` and `_few`: of the step that is launched
        self._few = False
        _, self.ways = self.both_ways()
        self._qkv = [Linear(layer.qkv, layer.qkv_bias, early=True) for layer in weights.layers]
        self._o = [Linear(layer.o) for layer in weights.layers]
        self._gate_up = [Linear(layer.gate_up, gated=True) for layer in weights.layers]
        self._down = [Linear(layer.down) for layer in weights.layers]
        self._head = Linear(weights.head, max_rows=MAX_HEAD_ROWS)
        self._rotate_kernel, self._add_norm_kernel = LayerLaunch(rotate_kernel), LayerLaunch(add_norm_kernel)
        self._gate_kernel = LayerLaunch(gate_kernel)
        self._linears = [*self._qkv, *self._o, *self._gate_up, *self._down, self._head]
        table = weights.rotary_table(layers[0].spec.k_dim, max_model_len)
        self._heads = [_heads(table, layer) for layer in weights.layers]
        self._name = _name(self._linears, layers)
        aligned = device.type != "cuda" or all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in self._per_layer())
        require(aligned, f"its weights are not all at multiples of {_ALIGNMENT} bytes")
        # The gain of the norm that follows each layer.
        norms = [layer.input_norm for layer in weights.layers] + [weights.norm]
        self._next_norm = norms[1:]
        try:
            self._skinny = SkinnyLinears(self._linears, device)
        except ValueError as error:
            raise NotRecognizedError(str(error)) from error

    def _per_layer(self) -> Iterator[torch.Tensor]:
        """What kernels get other ones of in each layer."""
        for linear in self._linears:
            yield from (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)
        for layer in self._weights.layers:
            norms = layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm
            yield from (norm.gain for norm in norms if norm is not None)

    @property
    def senders(self) -> Senders:
        return Senders(self._skinny, self._down[0], self._head, self._weights.gathers)

    def tune(self) -> None:
        """Choose the tiles of all linear layers for this GPU: seconds the first time, then read from disk."""
        self._skinny.tune(
            self._linears, lambda shapes: iter(tqdm(shapes, desc="tuning linear layers", unit="shape", disable=None))
        )

    def both_ways(self) -> tuple[dict[int, Way], dict[int, Way]]:
        """All classes by cuBLAS, and those by `linear_kernel` that can be."""
        classes = (*ROW_CLASSES, _MANY)
        return (
            {size: Way(False, self._has_pdl) for size in classes},
            {size: Way(size != _MANY, self._has_pdl) for size in classes},
        )

    def choose_ways(self, forward: Callable[[int], torch.Tensor], max_rows: int, context: int) -> None:
        """Take the fastest way for each class; `forward(rows)` runs a step of rows with such a context, capturable.

        What was measured for such a model before is read from disk.
        """
        ranks, sums_by = self._ranks, "NCCL" if self.peers is None else "peers"
        name = self._name if ranks is None else f"{self._name}, {ranks.size} ranks, sums by {sums_by}"
        timed = {size: min(size or _MANY_TIMED, max_rows) for size in self.ways}
        # The other classes have no steps of decode rows.
        keys = {
            size: f"{name}, {rows} rows of {context} tokens" for size, rows in timed.items() if _row_class(rows) == size
        }
        path = cache_path("decoder", self._head.weight.device, *_KERNELS)
        known = read_choices(path)
        missing = []
        for size, key in keys.items():
            is_known = self._take(size, known.get(key))
            if not (is_known if ranks is None else ranks.agree(is_known)):  # timing is done by all of them or by none
                missing.append(size)
        if missing:
            self._measure(forward, {size: timed[size] for size in missing})
            settled = settle_choices(path, known, {keys[size]: asdict(self.ways[size]) for size in missing})
            for size in missing:
                self._take(size, settled[keys[size]])
        if ranks is not None:  # each may have found another one the fastest, or read it on another host
            for size in keys:
                options = self._options(size)
                self.ways[size] = options[ranks.least(options.index(self.ways[size]))]

    def _measure(self, forward: Callable[[int], torch.Tensor], rows: dict[int, int]) -> None:
        """Take the fastest way for each class, timed with so many rows."""
        self.compile_ahead(
            partial(self._forward_as, way, size, forward, rows[size]) for size in rows for way in self._options(size)
        )
        for size in rows:
            self.ways[size] = self._fastest(forward, size, rows[size])

    def compile_ahead(self, forwards: Iterable[Callable[[], torch.Tensor]]) -> None:
        """Compile on all cores what these will launch. On one rank only: several wait for each other's rows."""
        if self._ranks is not None:
            return
        with compiling_ahead():
            for forward in forwards:
                forward()

    def _take(self, size: int, choice: Any) -> bool:
        """Take the way that is written down for a class, if it is one."""
        way = next((way for way in self._options(size) if asdict(way) == choice), None)
        if way is not None:
            self.ways[size] = way
        return way is not None

    def _fastest(self, forward: Callable[[int], torch.Tensor], size: int, rows: int) -> Way:
        def seconds(way: Way) -> float:
            return time_graph(partial(self._forward_as, way, size, forward, rows))

        return min(self._options(size), key=seconds)

    def _forward_as(self, way: Way, size: int, forward: Callable[[int], torch.Tensor], rows: int) -> torch.Tensor:
        self.ways[size] = way
        return forward(rows)

    def _options(self, size: int) -> list[Way]:
        """The ways that steps of a class can be run."""
        kinds = (False,) if size == _MANY else (True, False)
        return [Way(few, pdl) for few in kinds for pdl in {self._has_pdl, False}]

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Write K and V of a step's tokens; logits [rows + scores, vocab] at `inputs.last_index`.

        The backend has begun the step.
        """
        last = None if inputs.decode_only else inputs.last_index
        # Rows and scores may be more than tokens.
        way = self.ways[_row_class(max(inputs.num_tokens, len(inputs.last_index)))]
        self._few, self._pdl = way.few, way.pdl
        self._skinny.pdl = way.pdl
        for part in (self._rotate_kernel, self._add_norm_kernel, self._gate_kernel, self._skinny, self.peers):
            if part is not None:
                part.begin()
        if way.few and self._ranks is None:
            return self._forward_few(inputs, last)
        return self._forward_many(inputs, last)

    def _forward_few(self, inputs: StepInputs, last: torch.Tensor | None) -> torch.Tensor:
        skinny = self._skinny
        x, scaled = self._embed_scaled(inputs)
        is_wide = len(x if last is None else last) > MAX_HEAD_ROWS
        for i, layer in enumerate(self._weights.layers):
            attended = self._attend(i, skinny(self._qkv[i], scaled), inputs)
            x, scaled = skinny.add(self._o[i], attended, x, layer.mlp_norm.gain, layer.mlp_norm.eps)
            hidden = skinny(self._gate_up[i], scaled)
            norm, down = self._next_norm[i], self._down[i]
            if is_wide and down is self._down[-1]:
                normed = torch.empty_like(x)
                self._add_norm(x, F.linear(hidden, down.weight), norm, normed)
                return self._logits(normed if last is None else normed[last])
            x, scaled = skinny.add(down, hidden, x, norm.gain, norm.eps)
        if last is not None:
            scaled = Scaled(scaled.value[last], scaled.square[:, last].contiguous(), scaled.eps)
        return skinny(self._head, scaled)

    def _forward_many(self, inputs: StepInputs, last: torch.Tensor | None) -> torch.Tensor:
        x, normed = self._embed_normed(inputs)
        for i, layer in enumerate(self._weights.layers):
            attended = self._attend(i, self._multiply(self._qkv[i], normed), inputs)
            self._add(Place.ATTENTION, self._o[i], attended, x, layer.mlp_norm, normed)
            hidden = self._multiply(self._gate_up[i], normed)
            self._add(Place.MLP, self._down[i], hidden, x, self._next_norm[i], normed)
        return self._logits(normed if last is None else normed[last])

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        peers, features = self.peers, self._weights.gathers
        if self._ranks is None or features is None:
            return self._multiply(self._head, x)
        if self._few and peers is not None and len(x) <= LOGIT_ROWS:
            self._skinny.send(self._head, x, peers.logits)
            return peers.gather(len(x), features, self._pdl)
        return self._ranks.gather(self._multiply(self._head, x), features)

    def _multiply(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T; silu(gate) * up if gated."""
        if self._few and len(x) <= linear.max_rows:
            return self._skinny(linear, x)
        y = F.linear(x, linear.weight, linear.bias)
        return self._gate(y) if linear.gated else y

    def _add(
        self, place: Place, linear: Linear, y: torch.Tensor, x: torch.Tensor, norm: Norm, normed: torch.Tensor
    ) -> None:
        """x += y @ weight.T, summed over all ranks; normed = the norm of that."""
        peers = self.peers
        if peers is None or len(x) > peers.max_rows:
            partial = self._multiply(linear, y)
            self._add_norm(x, partial if self._ranks is None else self._ranks.sum(partial), norm, normed)
            return
        if self._few:
            self._skinny.send(linear, y, peers.sink(place))
        else:
            torch.mm(y, linear.weight.t(), out=peers.rows(len(x)))
        peers.add_norm(place, x, norm.gain, norm.eps, normed, sends=not self._few, pdl=self._pdl)

    def _attend(self, index: int, qkv: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """[tokens, q_heads * dim]"""
        layer, backend = self._layers[index], self._backend
        if inputs.decode_only:
            return backend.decode_fresh(layer, qkv, self._heads[index], pdl=self._pdl).view(len(qkv), -1)
        query = self._turn(layer, self._heads[index], qkv, inputs)
        return backend.read(layer, query, pdl=self._pdl).view(len(qkv), -1)

    def _turn(self, layer: PagedLayer, heads: Heads, qkv: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """Queries [tokens, q_heads, dim], ready for attention; keys and values go into their pages."""
        spec, tokens = layer.spec, len(qkv)
        query = qkv.new_empty(tokens, spec.q_heads, spec.k_dim)
        block = math.gcd(spec.q_heads, spec.kv_heads, 1 if tokens <= _FEW_TOKENS else _HEADS)
        arguments = (
            qkv, inputs.positions, inputs.slot_mapping, query, layer.k_cache, layer.v_cache, *heads.arguments
        )  # fmt: skip
        options = _rotate_options(spec, block, heads.q_gain is not None, self._pdl)
        self._rotate_kernel((tokens, (spec.q_heads + 2 * spec.kv_heads) // block, 1), arguments, options)
        return query

    def _embed_scaled(self, inputs: StepInputs) -> tuple[torch.Tensor, Scaled]:
        x, scaled, square = self._embed(inputs, normed=False)
        return x, Scaled(scaled, square[None], self._weights.layers[0].input_norm.eps)

    def _embed_normed(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        embed, norm, peers = self._weights.embed, self._weights.layers[0].input_norm, self.peers
        if not isinstance(embed, ShardedEmbedding):
            x, normed, _ = self._embed(inputs, normed=True)
            return x, normed
        # Zeroed first: a kernel that starts while the one ahead ends must have a kernel ahead, not a memset.
        x = embed.weight.new_zeros(inputs.num_tokens, embed.weight.shape[1])
        normed = torch.empty_like(x)
        if peers is not None and len(x) <= peers.max_rows:
            rows, inside = embed.find(inputs.token_ids)
            torch.where(inside, rows, x, out=peers.rows(len(x)))
            peers.add_norm(Place.EMBEDDING, x, norm.gain, norm.eps, normed, sends=True, pdl=self._pdl)
        else:
            self._add_norm(x, embed(inputs.token_ids), norm, normed)
        return x, normed

    def _embed(self, inputs: StepInputs, normed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        table, norm = self._weights.embedding, self._weights.layers[0].input_norm
        width, rows = table.shape[1], inputs.num_tokens
        x, scaled = table.new_empty(rows, width), table.new_empty(rows, width)
        square = torch.empty(rows, dtype=torch.float32, device=table.device)
        width_pad = triton.next_power_of_2(width)
        options = {"width": width, "width_pad": width_pad, "normed": normed, "pdl": False, "num_warps": 4}
        arguments = inputs.token_ids, table, norm.gain, x, scaled, square, norm.eps
        launch(embed_kernel, (rows, 1, 1), arguments, options)
        return x, scaled, square

    def _add_norm(self, x: torch.Tensor, y: torch.Tensor, norm: Any, normed: torch.Tensor) -> None:
        options = _row_options(x.shape[1], self._pdl)
        self._add_norm_kernel((len(x), 1, 1), (x, y, norm.gain, normed, norm.eps), options)

    def _gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        grid = (rows, -(-width // _GATE_BLOCK), 1)
        self._gate_kernel(grid, (gate_up, out), _gate_options(width, self._pdl))
        return out


@cache
def _rotate_options(spec: LayerSpec, block_h: int, has_norm: bool, pdl: bool) -> dict[str, Any]:
    return {
        "q_heads": spec.q_heads,
        "kv_heads": spec.kv_heads,
        "dim": spec.k_dim,
        "block_h": block_h,
        "has_norm": has_norm,
        "pdl": pdl,
        "num_warps": 1 if block_h * spec.k_dim <= 512 else 4,
        "launch_pdl": pdl,
    }


@cache
def _row_options(width: int, pdl: bool) -> dict[str, Any]:
    num_warps = 4 if width <= 2048 else 8
    return {
        "width": width,
        "width_pad": triton.next_power_of_2(width),
        "pdl": pdl,
        "num_warps": num_warps,
        "launch_pdl": pdl,
    }


@cache
def _gate_options(width: int, pdl: bool) -> dict[str, Any]:
    return {"width": width, "block": _GATE_BLOCK, "pdl": pdl, "num_warps": 4, "launch_pdl": pdl}


def _name(linears: list[Linear], layers: list[PagedLayer]) -> str:
    """What the time of a step depends on."""
    shapes = ", ".join(dict.fromkeys(f"{linear.n}x{linear.k}" for linear in linears))
    return f"{len(layers)} layers, {shapes}, {layers[0].spec.q_heads} on {layers[0].spec.kv_heads} heads"


def _row_class(tokens: int) -> int:
    return row_class(tokens) if tokens <= MAX_ROWS else _MANY


def _heads(table: tuple[torch.Tensor, torch.Tensor], weights: LayerWeights) -> Heads:
    q_norm, k_norm = weights.q_norm, weights.k_norm
    if q_norm is None or k_norm is None:
        return Heads(*table)
    return Heads(*table, q_norm.gain, k_norm.gain, q_norm.eps)
