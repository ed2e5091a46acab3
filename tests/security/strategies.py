"""Hypothesis strategies for what a peer may send that means harm, or is broken."""

from __future__ import annotations

import os
import pickle
from typing import Any, Final

import msgspec
from hypothesis import HealthCheck
from hypothesis import strategies as st

from ipc.control import (
    ExecutorFaulty,
    ExecutorHello,
    ExecutorLost,
    ExecutorStuck,
    FrontendStuck,
    NodeHello,
    PlanAck,
    RanksLost,
    SchedulerReady,
)
from ipc.schema import (
    PROTOCOL_VERSION,
    Abort,
    Admit,
    GetStats,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
    Member,
    Message,
    SamplingParams,
    encode,
    pack_tokens,
)

QUIET: Final[dict[str, Any]] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
NESTED: Final = b"\x91" * 100_000 + b"\xc0"  # msgpack: an array in an array in an ...
EVIL_PICKLE: Final = pickle.dumps(type("", (), {"__reduce__": lambda self: (os.abort, ())}).__reduce__(None))

# numbers at and beyond the edges of every integer width, and floats that are none
EDGES: Final = [0, -1, 1, 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
integers = st.sampled_from(EDGES) | st.integers(-(2**63), 2**64 - 1)
numbers = integers | st.floats()
values = st.recursive(
    st.one_of(numbers, st.none(), st.booleans(), st.binary(max_size=40), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)

MESSAGES: Final[tuple[Message, ...]] = (
    Hello(PROTOCOL_VERSION, "frontend", "x", 1),
    Heartbeat(1),
    Admit(1, pack_tokens([1, 2]), SamplingParams(max_tokens=2, temperature=0.0)),
    Admit(2, pack_tokens([3]), SamplingParams(max_tokens=3, seed=1, logit_bias={1: 2.0}, stop_token_ids=(4,))),
    Abort([1, 2]),
    GetStats(),
    Goodbye(),
)
CONTROL_MESSAGES: Final[tuple[Message, ...]] = (
    Hello(PROTOCOL_VERSION, "launcher", "launcher", 1),
    ExecutorHello(PROTOCOL_VERSION, 1, 2, 17),
    ExecutorLost(1),
)
DIRECTORY_MESSAGES: Final[tuple[Message, ...]] = (
    Hello(PROTOCOL_VERSION, "frontend", "client", 1),
    Heartbeat(1),
    Join(PROTOCOL_VERSION, 1, [Member(0, "ipc:///somewhere", "tcp://127.0.0.1:1"), Member(7, "ipc:///elsewhere")]),
)
NODE_MESSAGES: Final[tuple[Message, ...]] = (
    NodeHello(PROTOCOL_VERSION, 1),
    ExecutorHello(PROTOCOL_VERSION, 0, 1, 17, 1),
    PlanAck(1),
    RanksLost("why"),
    Heartbeat(1),
)
LAUNCHER_MESSAGES: Final[tuple[Message, ...]] = (
    SchedulerReady(0, 64, 64, "tcp://127.0.0.1:1"),
    ExecutorStuck(0, 1.0),
    ExecutorFaulty(0, "why"),
    FrontendStuck(1),
)


def like(value: Any) -> st.SearchStrategy[Any]:
    """Other values of the same type, so that a message still decodes."""
    kinds: dict[type, st.SearchStrategy[Any]] = {
        int: integers,
        float: st.floats(),
        bytes: st.binary(max_size=40) | st.lists(st.integers(-(2**31), 2**31 - 1), max_size=80).map(pack_tokens),
        str: st.text(max_size=20),
        dict: st.dictionaries(integers, st.floats(), max_size=20),
        list: st.lists(integers, max_size=20),
    }
    return kinds.get(type(value), st.booleans())


@st.composite
def mutated(draw: st.DrawFn, messages: tuple[Message, ...] = MESSAGES) -> bytes:
    """A good message of which some fields, or fields of a field, have been replaced; most still decode."""
    fields = msgspec.msgpack.decode(encode(draw(st.sampled_from([m for m in messages if m.__struct_fields__]))))
    for _ in range(draw(st.integers(1, 3))):
        target = fields
        inner = [field for field in fields if isinstance(field, list) and field]
        if inner and draw(st.booleans()):
            target = draw(st.sampled_from(inner))
        at = draw(st.sampled_from(range(1 if target is fields else 0, len(target))))
        target[at] = draw(values if draw(st.integers(0, 9)) == 9 else like(target[at]))
    return msgspec.msgpack.encode(fields)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good message cut off, with a byte changed, or with bytes behind it."""
    payload = bytearray(encode(draw(st.sampled_from(MESSAGES))))
    at = draw(st.integers(0, len(payload) - 1))
    kind = draw(st.sampled_from(["cut", "flip", "longer"]))
    if kind == "cut":
        del payload[at:]
    elif kind == "flip":
        payload[at] ^= draw(st.integers(1, 255))
    else:
        payload += draw(st.binary(max_size=50))
    return bytes(payload)


payloads = st.one_of(
    mutated(),
    mutated(),
    damaged(),
    st.binary(max_size=200),
    st.sampled_from([b"", NESTED, EVIL_PICKLE, b"\xdd\xff\xff\xff\xff"]),
)
frames = st.one_of(st.lists(payloads, min_size=1, max_size=1), st.lists(payloads, max_size=4))
