"""Messages survive the wire, anything else is a ProtocolError; plan and result frames keep every column."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.errors import ProtocolError
from ipc.frames import (
    PLAN_COLUMNS,
    FrameLimits,
    Param,
    Plan,
    PlanFlag,
    PlanWord,
    plan_words,
    read_plan,
    write_plan,
)
from ipc.results import ResultLayout, read_result, write_result_header
from ipc.schema import Abort, Admit, SamplingParams, Tokens, decode_frontend, decode_scheduler, encode, unpack_tokens

LIMITS = FrameLimits(max_rows=8, max_tokens=32, max_seq_len=64, block_size=4, max_logprobs=3, vocab_size=33)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_random_bytes_never_decode_silently(payload: bytes) -> None:
    try:
        message = decode_frontend(payload)
    except ProtocolError:
        return
    assert encode(message) is not None


@pytest.mark.parametrize("payload", [b"", b"\x80\x04\x95.", b"\xff" * 64, b"\x91" * 5000, encode(["admit", "x"])])
def test_foreign_bytes_are_protocol_errors(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"undecodable message of {len(payload)} bytes"):
        decode_frontend(payload)


def test_a_message_keeps_its_type_and_its_direction() -> None:
    admit = Admit(7, b"\x01\x00\x00\x00", SamplingParams(max_tokens=3, logit_bias={5: -1.0}, stop_token_ids=(2,)))
    assert decode_frontend(encode(admit)) == admit
    assert decode_frontend(encode(Abort([1, 2]))) == Abort([1, 2])
    with pytest.raises(ProtocolError):
        decode_scheduler(encode(admit))
    with pytest.raises(ProtocolError):
        decode_frontend(encode(Tokens(b"", b"", b"")))


def test_token_bytes_of_a_wrong_length_are_refused() -> None:
    with pytest.raises(ProtocolError, match="5 bytes"):
        unpack_tokens(b"12345")


def random_plan(rng: np.random.Generator, rows: int, prefill: int, blocks: int, admits: int, extras: int) -> Plan:
    def column(n: int) -> np.typing.NDArray[np.int32]:
        return rng.integers(-(2**31), 2**31, n, dtype=np.int32)

    sizes = {"row": rows, "prefill": prefill, "block": blocks, "admit": admits, "bias": extras, "history": extras}
    sizes["score"] = rows
    sizes["grammar"] = 0
    columns = {name: column(sizes[name.split("_")[0]]) for name in PLAN_COLUMNS}
    columns["admit_params"] = column(admits * Param.COUNT).reshape(admits, Param.COUNT)
    columns["bias_value"] = rng.random(extras, np.float32)
    columns["grammar_row"] = column(extras % (LIMITS.max_grammar_rows + 1))
    columns["grammar_word"] = column(len(columns["grammar_row"]) * LIMITS.mask_words)
    return Plan(7, 3, PlanFlag.SAMPLE | PlanFlag.CONTINUES, rows, **columns)  # type: ignore[arg-type]


@given(st.integers(0, 8), st.integers(0, 32), st.integers(0, 24), st.integers(0, 8), st.integers(0, 40), st.integers(0))
@settings(deadline=None)
def test_a_plan_keeps_every_column(rows: int, prefill: int, blocks: int, admits: int, extras: int, seed: int) -> None:
    plan = random_plan(np.random.default_rng(seed), rows, prefill, blocks, admits, extras)
    payload = np.full(LIMITS.plan_bytes, 0xEE, np.uint8)
    used = write_plan(payload, plan)
    words = plan_words(payload)
    assert used == words[PlanWord.TOTAL_BYTES] <= LIMITS.plan_bytes
    copy = read_plan(payload)
    for name in Plan.__slots__:
        np.testing.assert_array_equal(getattr(copy, name), getattr(plan, name), err_msg=name)
    for i, name in enumerate(PLAN_COLUMNS):
        offset, column = words[PlanWord.OFFSETS + i], getattr(plan, name)
        assert payload[offset : offset + column.nbytes].tobytes() == column.tobytes()


def test_a_plan_that_does_not_fit_is_refused() -> None:
    plan = random_plan(np.random.default_rng(0), 8, 32, 24, 8, 40)
    with pytest.raises(ProtocolError, match=r"plan needs \d+ bytes at row_slot, the slot has 256"):
        write_plan(np.zeros(256, np.uint8), plan)


def test_a_result_has_its_columns_where_the_layout_says() -> None:
    layout = ResultLayout(max_results=5, max_logprobs=3)
    payload = np.random.default_rng(0).integers(0, 255, layout.nbytes, dtype=np.uint8)
    payload[layout.token : layout.token + 8].view(np.int32)[:] = 11, 12
    payload[layout.top_token : layout.top_token + 24].view(np.int32)[:] = range(6)
    write_result_header(payload, seq=9, epoch=2, num_rows=2, has_logprobs=True, gap_ns=77, hidden=True, compilations=3)
    result = read_result(payload, layout)
    assert (result.seq, result.epoch, result.gap_ns, result.hidden, result.compilations) == (9, 2, 77, True, 3)
    assert result.token.tolist() == [11, 12]
    assert result.top_token is not None
    assert result.top_token.tolist() == [[0, 1, 2], [3, 4, 5]]
    write_result_header(payload, seq=9, epoch=2, num_rows=6, has_logprobs=False)
    with pytest.raises(ProtocolError, match="result of 6 rows and scores, the ring was made for 5"):
        read_result(payload, layout)
