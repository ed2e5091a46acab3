"""Plan frames: what the scheduler sends the executor once a step through shared memory, as columns.

The way back is results.py. A frame is a header of int64 words and then columns, each 16-byte aligned, each as long as
its count in the header says. Plans are packed tightly, so one copy of `TOTAL_BYTES` brings a step to the device. The
executor sees slots, positions and tokens, never a request.

What a plan means, in this order:
    admit     params of a slot are replaced; its position becomes `computed`
    bias      rows of the slot's bias table (logit_bias, and stop ids that min_tokens forbids)
    history   token counts of an admitted slot that uses penalties: zeroed, then set from these
    block     block_table[slot, index] = block
    row       `query_len` tokens of one slot run at its position, which advances; every row samples one token
    score     a token of the step whose successor in the prompt is known: how probable was that one
    grammar   the tokens that row `grammar_row` may sample: one bit of `grammar_word` for each id, lowest bit first
A decode row (the first NUM_DECODE rows) is only its slot: its input token is last_token[slot], which stays on the GPU.
A prefill row brings its tokens. A row whose `sample` is 0 ends inside the prompt: its token is ignored by everyone.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipc.errors import ProtocolError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

NULL_BLOCK: Final = 0  # never allocated: padding rows write there
SPARE_SCORES: Final = 32  # scores that a step has room for even when every slot runs
MAX_BIAS: Final = 320  # rows of a slot's bias table: OpenAI allows 300 biases, the rest is for stop ids
MAX_GRAMMAR_ROWS: Final = 128  # of one plan: a mask has a bit for each token of the vocabulary, 19 KB of 152k
INVALID_TOKEN: Final = -1  # in a result: the row's logits were NaN
_ALIGN: Final = 16


class PlanWord(IntEnum):
    """int64 words of a plan's header."""

    SEQ = 0
    EPOCH = 1
    TOTAL_BYTES = 2
    FLAGS = 3  # PlanFlag
    NUM_ROWS = 4
    NUM_DECODE = 5  # decode rows come first
    NUM_PREFILL_TOKENS = 6
    NUM_ADMITS = 7
    NUM_BLOCKS = 8
    NUM_BIAS = 9
    NUM_HISTORY = 10
    NUM_SCORES = 11
    NUM_GRAMMAR_ROWS = 12
    NUM_GRAMMAR_WORDS = 13
    OFFSETS = 14  # byte offset of each column, in the order of PLAN_COLUMNS


class PlanFlag(IntFlag):
    """What the rows of a plan need: the executor skips every stage that no row asks for."""

    NONE = 0
    SAMPLE = 1  # some row has temperature > 0
    FILTER = 2  # some row has top_k, top_p or min_p
    PENALTY = 4
    BIAS = 8
    LOGPROBS = 16
    CONTINUES = 32  # work has been waiting since the previous plan: a gap before this step is a bubble
    GRAMMAR = 64  # some row may sample only what its mask allows


class Param(IntEnum):
    """int32 columns of a slot's sampling parameters; those marked f32 hold the bits of a float32."""

    COMPUTED = 0  # first position to run: tokens before it are in the KV cache
    SEED_LOW = 1
    SEED_HIGH = 2
    FEATURES = 3  # PlanFlag bits this slot asks for
    TEMPERATURE = 4  # f32; 0 = greedy
    TOP_K = 5  # 0 = off
    TOP_P = 6  # f32; 1 = off
    MIN_P = 7  # f32; 0 = off
    REPETITION = 8  # f32; 1 = off
    PRESENCE = 9  # f32; 0 = off
    FREQUENCY = 10  # f32; 0 = off
    NUM_BIAS = 11
    COUNT = 16


# name, dtype, trailing length (1 = a vector), header word that holds the count
_COLUMNS: Final[tuple[tuple[str, type, int, PlanWord], ...]] = (
    ("row_slot", np.int32, 1, PlanWord.NUM_ROWS),
    ("row_query_len", np.int32, 1, PlanWord.NUM_ROWS),
    ("row_sample", np.int32, 1, PlanWord.NUM_ROWS),
    ("prefill_token", np.int32, 1, PlanWord.NUM_PREFILL_TOKENS),
    ("block_slot", np.int32, 1, PlanWord.NUM_BLOCKS),
    ("block_index", np.int32, 1, PlanWord.NUM_BLOCKS),
    ("block_id", np.int32, 1, PlanWord.NUM_BLOCKS),
    ("admit_slot", np.int32, 1, PlanWord.NUM_ADMITS),
    ("admit_params", np.int32, int(Param.COUNT), PlanWord.NUM_ADMITS),
    ("bias_slot", np.int32, 1, PlanWord.NUM_BIAS),
    ("bias_index", np.int32, 1, PlanWord.NUM_BIAS),
    ("bias_token", np.int32, 1, PlanWord.NUM_BIAS),
    ("bias_value", np.float32, 1, PlanWord.NUM_BIAS),
    ("bias_until", np.int32, 1, PlanWord.NUM_BIAS),  # applies while the sampled token's position is below this
    ("history_slot", np.int32, 1, PlanWord.NUM_HISTORY),
    ("history_token", np.int32, 1, PlanWord.NUM_HISTORY),  # unique within a slot
    ("history_count", np.int32, 1, PlanWord.NUM_HISTORY),  # bit 0: in the prompt; count << 1: times generated
    ("score_index", np.int32, 1, PlanWord.NUM_SCORES),  # which token of the step, decode rows counted
    ("score_token", np.int32, 1, PlanWord.NUM_SCORES),  # the one that follows it in the prompt
    ("grammar_row", np.int32, 1, PlanWord.NUM_GRAMMAR_ROWS),
    ("grammar_word", np.int32, 1, PlanWord.NUM_GRAMMAR_WORDS),  # grammar rows x mask words
)
PLAN_COLUMNS: Final = tuple(name for name, *_ in _COLUMNS)
_HEADER_BYTES: Final = (int(PlanWord.OFFSETS) + len(_COLUMNS) + 7) // 8 * 64
_HEADER: Final = struct.Struct(f"={_HEADER_BYTES // 8}q")


def aligned(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """Upper bounds of one step; they size the ring slots and the executor's buffers, the same on both sides."""

    max_rows: int  # slots, and rows of a step
    max_tokens: int  # tokens of a step: decode rows + prefill chunks
    max_seq_len: int  # tokens of one request
    block_size: int
    max_logprobs: int
    vocab_size: int = 0  # 0: no plan has grammar rows

    @property
    def max_grammar_rows(self) -> int:
        return min(self.max_rows, MAX_GRAMMAR_ROWS)

    @property
    def mask_words(self) -> int:
        """int32 words of one row's grammar mask."""
        return -(-self.vocab_size // 32)

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_seq_len // self.block_size)

    @property
    def max_plan_blocks(self) -> int:
        """Block deltas of a plan: one whole block table, or what the step's tokens can fill."""
        return self.max_blocks_per_seq + self.max_tokens // self.block_size + 2 * self.max_rows

    @property
    def max_results(self) -> int:
        """Rows and scores of a step: what the result's columns hold."""
        return self.max_rows + SPARE_SCORES

    @property
    def max_plan_bias(self) -> int:
        return 8 * MAX_BIAS

    @property
    def max_plan_history(self) -> int:
        return self.max_seq_len + self.max_tokens

    @property
    def plan_bytes(self) -> int:
        counts = {
            PlanWord.NUM_ROWS: self.max_rows,
            PlanWord.NUM_PREFILL_TOKENS: self.max_tokens,
            PlanWord.NUM_BLOCKS: self.max_plan_blocks,
            PlanWord.NUM_ADMITS: self.max_rows,
            PlanWord.NUM_BIAS: self.max_plan_bias,
            PlanWord.NUM_HISTORY: self.max_plan_history,
            PlanWord.NUM_SCORES: self.max_results,
            PlanWord.NUM_GRAMMAR_ROWS: self.max_grammar_rows,
            PlanWord.NUM_GRAMMAR_WORDS: self.max_grammar_rows * self.mask_words,
        }
        return _HEADER_BYTES + sum(aligned(4 * width * counts[word]) for _, _, width, word in _COLUMNS)


@dataclass(slots=True)
class Plan:
    """One step as the scheduler composes it and as the executor reads it; each array is a column of `_COLUMNS`."""

    seq: int
    epoch: int
    flags: PlanFlag
    num_decode: int
    # [rows] decode rows first
    row_slot: Int32
    row_query_len: Int32
    row_sample: Int32
    # [prefill tokens] of the prefill rows, in row order
    prefill_token: Int32
    # [block deltas]
    block_slot: Int32
    block_index: Int32
    block_id: Int32
    # [admits], [admits, Param.COUNT]
    admit_slot: Int32
    admit_params: Int32
    # [bias rows]
    bias_slot: Int32
    bias_index: Int32
    bias_token: Int32
    bias_value: Float32
    bias_until: Int32
    # [history entries]
    history_slot: Int32
    history_token: Int32
    history_count: Int32
    # [scores]
    score_index: Int32 = field(default_factory=lambda: np.empty(0, np.int32))
    score_token: Int32 = field(default_factory=lambda: np.empty(0, np.int32))
    # [grammar rows], [grammar rows * mask words]
    grammar_row: Int32 = field(default_factory=lambda: np.empty(0, np.int32))
    grammar_word: Int32 = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def num_rows(self) -> int:
        return len(self.row_slot)

    @property
    def num_tokens(self) -> int:
        """Tokens the model runs over in this step."""
        return self.num_decode + len(self.prefill_token)


def write_plan(payload: Bytes, plan: Plan) -> int:
    """Pack `plan` into a ring slot; returns TOTAL_BYTES. Raises ProtocolError if it does not fit."""
    words = [0] * (_HEADER_BYTES // 8)
    words[PlanWord.SEQ], words[PlanWord.EPOCH], words[PlanWord.FLAGS] = plan.seq, plan.epoch, int(plan.flags)
    words[PlanWord.NUM_DECODE] = plan.num_decode
    offset, memory = _HEADER_BYTES, payload.data
    for i, (name, dtype, _, count_word) in enumerate(_COLUMNS, int(PlanWord.OFFSETS)):
        column = getattr(plan, name)
        words[i] = offset
        if count := len(column):
            assert column.dtype == dtype, f"{name} is of {column.dtype}"
            values = column.tobytes()
            end = offset + len(values)
            if end > len(memory):
                raise ProtocolError(f"plan needs {end} bytes at {name}, the slot has {len(memory)}")
            words[count_word] = count
            memory[offset:end] = values
            offset = aligned(end)
    words[PlanWord.TOTAL_BYTES] = offset
    _HEADER.pack_into(memory, 0, *words)
    return offset


def plan_words(payload: Bytes) -> tuple[int, ...]:
    """Header of a packed plan, by PlanWord: in one call, since an executor reads it with cold caches in every step."""
    return _HEADER.unpack_from(payload.data)


def read_plan(payload: Bytes) -> Plan:
    """Views of the columns in a ring slot (no copy): valid until the slot is acknowledged.

    Raises ProtocolError for columns that do not lie within the slot.
    """
    words = plan_words(payload)
    columns: dict[str, Any] = {}
    for i, (name, dtype, width, count_word) in enumerate(_COLUMNS):
        count, offset = words[count_word], words[PlanWord.OFFSETS + i]
        column: npt.NDArray[Any] = payload[offset : offset + 4 * width * count]
        if column.nbytes != 4 * width * count:
            raise ProtocolError(f"{count} rows of {name} at byte {offset}, the slot has {len(payload)} bytes")
        columns[name] = column.view(dtype).reshape(count, width) if width > 1 else column.view(dtype)
    return Plan(
        seq=words[PlanWord.SEQ],
        epoch=words[PlanWord.EPOCH],
        flags=PlanFlag(words[PlanWord.FLAGS]),
        num_decode=words[PlanWord.NUM_DECODE],
        **columns,
    )
