"""Every bad parameter is a typed error that names its field, what was got and what is allowed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.request import GenerateParams, check_prompt, prepare
from ipc.errors import ContextLengthError, InvalidParameterError
from ipc.schema import encode, unpack_tokens
from tests.frontend.scripted_scheduler import card
from tests.frontend.tokenizers_for_tests import PATIENT

CARD = card(max_model_len=100, vocab_size=50, max_logprobs=5)
NAN, INF = float("nan"), float("inf")

BAD = [
    ("max_tokens", -5, "at least 0, got -5"),
    ("max_tokens", 1.5, "an integer"),
    ("max_tokens", True, "got True"),
    ("max_tokens", "10", "got '10'"),
    ("max_tokens", 10**5000, "thousands of digits"),
    ("stop_token_ids", [10**5000], "thousands of digits"),
    ("min_tokens", -1, "got -1"),
    ("temperature", NAN, "got nan"),
    ("temperature", INF, "got inf"),
    ("temperature", -0.1, r"a number in \[0.0, 100.0\], got -0.1"),
    ("temperature", None, "got None"),
    ("temperature", False, "got False"),
    ("temperature", "hot", "got 'hot'"),
    ("top_k", -2, "got -2"),
    ("top_k", 1.0, "an integer"),
    ("top_p", 0, r"\(0.0, 1.0\], got 0"),
    ("top_p", 1.01, "got 1.01"),
    ("min_p", -0.1, "got -0.1"),
    ("min_p", 1.5, "got 1.5"),
    ("repetition_penalty", 0.0, "got 0.0"),
    ("presence_penalty", 2.1, r"\[-2.0, 2.0\], got 2.1"),
    ("frequency_penalty", -2.1, "got -2.1"),
    ("seed", 2**63, "got 9223372036854775808"),
    ("seed", 1.0, "an integer"),
    ("logprobs", -1, "got -1"),
    ("logprobs", True, "got True"),
    ("n", 0, r"\[1, 128\], got 0"),
    ("n", 129, "got 129"),
    ("n", 10**9, "got 1000000000"),
    ("priority", 2**40, "got 1099511627776"),
    ("cache_salt", 5, "a string, got 5"),
    ("cache_salt", "x" * 2000, "at most 1024 characters, got 2000"),
    ("cache_salt", "\ud800", "surrogate"),
    ("stop", "", "at least 1 character, got 0"),
    ("stop", ["a", ""], "at least 1 character"),
    ("stop", [1], "list of strings"),
    ("stop", 7, "list of strings"),
    ("stop", None, "list of strings"),
    ("stop", ["x"] * 17, "at most 16 strings, got 17"),
    ("stop", "x" * 5000, "at most 4096 characters, got 5000"),
    ("stop_token_ids", [1] * 17, "at most 16 ids, got 17"),
    ("stop_token_ids", [-1], "a list of token ids"),
    ("stop_token_ids", [True], "a list of token ids"),
    ("stop_token_ids", 5, "a list of token ids"),
    ("stop_token_ids", "12", "a list of token ids"),
    ("logit_bias", [1], "a map of token ids"),
    ("logit_bias", {"1": 1.0}, "keys are token ids, got '1'"),
    ("logit_bias", {1: 101.0}, r"\[-100.0, 100.0\], got 101.0"),
    ("logit_bias", {1: NAN}, "got nan"),
    ("logit_bias", {1: "much"}, "got 'much'"),
    ("logit_bias", dict.fromkeys(range(301), 0.0), "at most 300 entries, got 301"),
    ("ignore_eos", 1, "true or false, got 1"),
    ("skip_special_tokens", None, "true or false"),
    ("include_stop_str_in_output", "yes", "true or false"),
]


@pytest.mark.parametrize(("field", "value", "text"), BAD, ids=[f"{case[0]}-{i}" for i, case in enumerate(BAD)])
def test_a_bad_field_is_named(field: str, value: Any, text: str) -> None:
    with pytest.raises(InvalidParameterError, match=text) as caught:
        GenerateParams(**{field: value})
    assert caught.value.param == field
    assert caught.value.status == 400
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("logprobs", 6, "at most 5 for this engine, got 6"),
        ("logit_bias", {50: 1.0}, r"\[0, 49\], got 50"),
        ("stop_token_ids", [3, 50], r"\[0, 49\], got 50"),
        ("min_tokens", 91, "at most 90.*got 91"),
    ],
)
def test_what_depends_on_the_model(field: str, value: Any, text: str) -> None:
    with pytest.raises(InvalidParameterError, match=text) as caught:
        prepare(GenerateParams(**{field: value}), CARD, 10)
    assert caught.value.param == field


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(InvalidParameterError, match="which is 3, got 4"):
        GenerateParams(max_tokens=3, min_tokens=4)


@pytest.mark.parametrize(("prompt", "max_tokens", "wanted"), [(100, None, 101), (99, 2, 101), (10**6, 5, 1000005)])
def test_too_long_says_both_numbers(prompt: int, max_tokens: int | None, wanted: int) -> None:
    completion = max_tokens or 1
    text = f"maximum context length is 100 tokens; you requested {wanted} ({prompt} prompt + {completion} completion)"
    with pytest.raises(ContextLengthError, match=re.escape(text)):
        prepare(GenerateParams(max_tokens=max_tokens), CARD, prompt)


def test_what_just_fits_is_taken() -> None:
    assert prepare(GenerateParams(max_tokens=1), CARD, 99)[0].max_tokens == 1
    assert prepare(GenerateParams(), CARD, 60)[0].max_tokens == 40
    assert prepare(GenerateParams(logprobs=5, stop_token_ids=[49], n=128), CARD, 1)[127].stop_token_ids == (49,)


def test_off_values_and_numpy_numbers() -> None:
    params = GenerateParams(
        top_k=np.int64(-1), temperature=np.float32(0.5), seed=np.int64(7), logit_bias={np.int32(3): np.float64(1)}
    )
    (told,) = prepare(params, CARD, 1)
    assert (told.top_k, told.temperature, told.seed, told.logit_bias) == (0, 0.5, 7, {3: 1.0})
    encode(told)
    assert prepare(GenerateParams(temperature=1e-6), CARD, 1)[0].temperature == 0.0
    assert prepare(GenerateParams(top_k=10**6), CARD, 1)[0].top_k == 50
    assert prepare(GenerateParams(), CARD, 1)[0].logprobs == -1


def test_seeds_of_choices_follow_each_other_and_wrap() -> None:
    assert [p.seed for p in prepare(GenerateParams(n=3, seed=5), CARD, 1)] == [5, 6, 7]
    assert [p.seed for p in prepare(GenerateParams(n=2, seed=2**63 - 1), CARD, 1)] == [2**63 - 1, -(2**63)]
    drawn = prepare(GenerateParams(n=2), CARD, 1)
    assert drawn[1].seed in (drawn[0].seed + 1, -(2**63))


def test_changes_by_keyword() -> None:
    base = GenerateParams(max_tokens=5)
    assert GenerateParams.of(base, {}) is base
    assert GenerateParams.of(base, {"seed": 3}) == GenerateParams(max_tokens=5, seed=3)
    assert GenerateParams.of(None, {"n": 2}).n == 2
    with pytest.raises(InvalidParameterError, match="unknown parameter 'best_of'") as caught:
        GenerateParams.of(base, {"best_of": 2})
    assert caught.value.param == "best_of"
    with pytest.raises(InvalidParameterError, match="n must be"):
        GenerateParams.of(base, {"n": 0})


@pytest.mark.parametrize("prompt", [[1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.uint16), range(1, 3)])
def test_prompts_of_any_integer_sequence(prompt: Any) -> None:
    assert unpack_tokens(check_prompt(prompt, CARD)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([], "at least 1 token, got 0"),
        (np.array([], np.int64), "got 0"),
        ([0, 50], "token id 50 is out of range: the model has ids 0 to 49"),
        ([-1], "token id -1 is out of range"),
        ([10**30], "out of range"),
        ([1, True], "integer token ids"),
        ([1, 2.0], "integer token ids"),
        ([[1]], "integer token ids"),
        (["a"], "integer token ids"),
        (np.array([1.0]), "vector of integer token ids"),
        (np.array([[1]]), "vector of integer token ids"),
        ({1, 2}, "integer token ids"),
        (b"ab", "integer token ids"),
        (5, "integer token ids"),
    ],
)
def test_bad_prompts(prompt: Any, text: str) -> None:
    with pytest.raises(InvalidParameterError, match=text) as caught:
        check_prompt(prompt, CARD)
    assert caught.value.param == "prompt"


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3)
)


@given(fields=st.dictionaries(st.sampled_from(sorted(GenerateParams.__dataclass_fields__)), ANYTHING, max_size=4))
@settings(max_examples=300, **PATIENT)
def test_whatever_is_given_is_taken_or_refused_by_name(fields: dict[str, Any]) -> None:
    try:
        told = prepare(GenerateParams(**fields), CARD, 10)
    except InvalidParameterError as error:
        refused = error.param
    except ContextLengthError:
        refused = "max_tokens"
    else:
        for each in told:
            encode(each)
        return
    assert refused in fields
