"""The sampler on the CPU against transformers' processors, one row at a time, and against itself in other batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from executor.sampler_cpu import UNIT, log_exponential, noise_keys, token_hash
from ipc.frames import INVALID_TOKEN, MAX_BIAS, PlanFlag
from tests.executor.sampler_rows import Bench, Row, expected_scores, gumbel, random_rows

VOCAB = 257
INF = float("inf")


def logits_for(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def expected_tokens(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    return [int(expected_scores(x, row).argmax()) for x, row in zip(logits, rows, strict=True)]


def check(rows: list[Row], seed: int = 0) -> None:
    logits = logits_for(len(rows), seed)
    before = logits.clone()
    assert Bench(VOCAB, rows).sample(logits).token.tolist() == expected_tokens(logits, rows)
    assert torch.equal(logits, before), "sampling must not change the logits"


FEATURES = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 1.2, "top_k": 7},
    "top_k of the vocabulary": {"temperature": 1.0, "top_k": VOCAB},
    "top_p": {"temperature": 1.0, "top_p": 0.6},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
    "all filters": {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    "repetition": {"repetition": 1.5, "prompt": (1, 2, 2, 9), "generated": (4, 4, 5)},
    "repetition below 1": {"repetition": 0.5, "prompt": (1, 2, 2, 9), "generated": (4, 4, 5)},
    "presence": {"presence": 1.5, "prompt": (1, 2), "generated": tuple(range(100, 200))},
    "frequency": {"frequency": 0.7, "prompt": (1, 2), "generated": tuple(range(100, 200)) * 3},
    "bias": {"bias": ((3, 5.0, 1 << 30), (7, -100.0, 1 << 30))},
    "everything": {
        "temperature": 1.1,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition": 1.2,
        "presence": 0.3,
        "frequency": 0.2,
        "bias": ((3, 2.0, 1 << 30), (5, -INF, 11)),
        "prompt": tuple(range(40)),
        "generated": tuple(range(20, 60)),
    },
}


@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_matches_its_reference(name: str) -> None:
    check([Row(slot, position=10 + slot, seed=1000 + slot, **FEATURES[name]) for slot in range(24)])


def test_the_features_under_test_change_tokens() -> None:
    """Guards the tests above: each feature must alter some row's token, or they could not fail."""
    plain = {"greedy": {}, "temperature": {"temperature": 1.0}}
    logits = logits_for(24)
    for name, feature in FEATURES.items():
        if name in ("greedy", "top_k of the vocabulary"):
            continue
        base = {"temperature": feature["temperature"]} if "temperature" in feature else plain["greedy"]
        base = base if name != "temperature" else {}
        rows = [Row(slot, position=10 + slot, seed=1000 + slot, **feature) for slot in range(24)]
        bases = [Row(slot, position=10 + slot, seed=1000 + slot, **base) for slot in range(24)]
        assert expected_tokens(logits, rows) != expected_tokens(logits, bases), name


@pytest.mark.parametrize("seed", range(20))
def test_random_mixtures_match_the_reference(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 16, VOCAB)
    logits = logits_for(16, seed)
    assert Bench(VOCAB, rows).sample(logits).token.tolist() == expected_tokens(logits, rows)


@pytest.mark.parametrize("seed", range(5))
def test_a_row_does_not_feel_its_batch(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    rows = random_rows(rng, 24, VOCAB)
    logits = logits_for(24, seed)
    together = Bench(VOCAB, rows).sample(logits).token
    order = rng.permutation(24)
    shuffled = Bench(VOCAB, rows).sample(logits[order], [rows[i] for i in order]).token
    assert torch.equal(shuffled, together[order])
    alone = Bench(VOCAB, rows)
    assert (
        torch.cat([alone.sample(logits[i : i + 1], [rows[i]]).token for i in range(24)]).tolist() == together.tolist()
    )


def test_greedy_rows_in_a_sampled_batch_are_the_plain_argmax() -> None:
    logits = torch.randn(6, VOCAB).to(torch.bfloat16)
    logits[:, 100] = logits[:, 40] = logits.max() + 1
    extras = {"temperature": 1.0, "top_k": 5, "top_p": 0.5, "repetition": 1.7, "bias": ((1, 9.0, 1 << 30),)}
    rows = [Row(slot, **(extras if slot % 2 else {})) for slot in range(6)]
    assert Bench(VOCAB, rows).sample(logits).token[::2].tolist() == [40, 40, 40]


def test_top_k_1_is_greedy_even_among_ties() -> None:
    logits = logits_for(32)
    logits[:, 200] = logits[:, 17] = logits[:, 99] = 50.0
    rows = [Row(slot, temperature=2.0, top_k=1, seed=slot) for slot in range(32)]
    assert Bench(VOCAB, rows).sample(logits).token.tolist() == [17] * 32


def test_filters_keep_all_ties() -> None:
    logits = torch.full((1, 8), -5.0)
    logits[0, [1, 4, 6]] = 2.0
    chosen = {
        int(Bench(8, [row]).sample(logits).token)
        for seed in range(60)
        for row in (Row(0, seed=seed, temperature=1.0, top_k=2), Row(0, seed=seed, temperature=1.0, top_p=0.4))
    }
    assert chosen == {1, 4, 6}


def test_top_p_ends_with_the_token_that_reaches_it() -> None:
    logits = torch.tensor([[0.0, -np.log(2), -np.log(2), -INF]])  # probabilities 1/2, 1/4, 1/4
    for top_p, kept in ((0.5, {0}), (0.5001, {0, 1, 2})):
        rows = [Row(0, seed=seed, temperature=1.0, top_p=top_p) for seed in range(60)]
        assert {int(Bench(4, [row]).sample(logits).token) for row in rows} == kept


def test_a_tiny_temperature_is_greedy() -> None:
    logits = logits_for(4)
    rows = [Row(slot, temperature=t, seed=slot) for slot, t in enumerate((1e-39, 1e-6, 1e-4, 0.0))]
    assert torch.equal(Bench(VOCAB, rows).sample(logits).token.long(), logits.argmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extra", [{}, FEATURES["everything"]], ids=["greedy", "everything"])
def test_nan_marks_its_row_only(dtype: torch.dtype, extra: dict[str, object]) -> None:
    logits = logits_for(5).to(dtype)
    rows = [Row(slot, seed=slot, logprobs=2, **extra) for slot in range(5)]
    clean = Bench(VOCAB, rows).sample(logits).token.tolist()
    logits[1, 250] = float("nan")
    logits[3] = float("nan")
    bench = Bench(VOCAB, rows)
    counts = bench.sampler.tables.token_counts.clone()
    assert bench.sample(logits).token.tolist() == [clean[0], INVALID_TOKEN, clean[2], INVALID_TOKEN, clean[4]]
    assert bench.sampler.tables.last_token[:6].tolist() == [clean[0], 0, clean[2], 0, clean[4], 1], "carried over"
    changed = (bench.sampler.tables.token_counts != counts).sum(dim=1)[:5].tolist()
    assert changed == ([1, 0, 1, 0, 1] if extra else [0] * 5)


def test_infinite_logits_are_numbers() -> None:
    logits = logits_for(3)
    logits[0] = -INF
    logits[1, 9] = INF
    logits[2, 1:] = -INF
    for extra in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1}):
        rows = [Row(slot, seed=5, **extra) for slot in range(3)]
        assert Bench(VOCAB, rows).sample(logits).token.tolist() == [0, 9, 0], extra


def test_bias_of_100_forces_and_minus_100_bans() -> None:
    logits = logits_for(2)
    best = int(logits[1].argmax())
    rows = [Row(0, bias=((13, 100.0, 1 << 30),)), Row(1, bias=((best, -100.0, 1 << 30),))]
    token = Bench(VOCAB, rows).sample(logits).token.tolist()
    assert token == [13, int(logits[1].topk(2).indices[1])]


def test_min_tokens_forbids_until_its_position_and_wins_over_bias() -> None:
    logits = logits_for(1)
    best = int(logits[0].argmax())
    for bias in (((best, 50.0, 1 << 30), (best, -INF, 12)), ((best, -INF, 12), (best, 50.0, 1 << 30))):
        bench = Bench(VOCAB, [Row(0, bias=bias)])
        tokens = [int(bench.sample(logits, [Row(0, position=p, bias=bias)]).token) for p in (10, 11, 12, 13)]
        assert best not in tokens[:2]
        assert tokens[2:] == [best, best]


def test_a_full_bias_table_and_its_shrinking() -> None:
    logits = logits_for(2, vocab=1000)
    logits[1, 100] = 50.0
    full = Row(1, bias=tuple((token, -INF, 1 << 30) for token in range(MAX_BIAS)))
    bench = Bench(1000, [Row(0, bias=((999, 90.0, 1 << 30),)), full])
    assert bench.sample(logits).token.tolist() == [999, int(logits[1, MAX_BIAS:].argmax()) + MAX_BIAS]
    fewer = Row(1, bias=full.bias[:1])
    other = Row(2, bias=full.bias)
    bench.admit([fewer, other])
    want = [int(logits[1, first:].argmax()) + first for first in (1, MAX_BIAS)]
    assert bench.sample(logits[[1, 1]], [fewer, other]).token.tolist() == want


def test_generated_tokens_are_counted_only_where_they_count() -> None:
    penalty = {"frequency": 5.0, "generated": (8,)}
    rows = [Row(0, **penalty), Row(1, sample=False, **penalty), Row(2)]
    bench = Bench(VOCAB, rows)
    logits = logits_for(3)
    token = bench.sample(logits).token.tolist()
    counts = bench.sampler.tables.token_counts
    assert counts[0, token[0]] == 2
    assert counts[0, 8] == 2
    assert counts[1:3].sum() == 1 + 2 + 1, "the prompts, and the token generated before"
    assert counts[3:].sum() == 0


def test_a_decode_of_many_steps_feels_its_own_tokens() -> None:
    row = Row(4, frequency=0.9, presence=0.5, repetition=1.3, prompt=(3, 5))
    bench = Bench(VOCAB, [row])
    generated: list[int] = []
    for step in range(40):
        logits = logits_for(1, seed=1)
        row = replace(row, position=2 + step, generated=tuple(generated))
        token = int(bench.sample(logits, [row]).token)
        assert token == expected_tokens(logits, [row])[0]
        generated.append(token)
    assert len(set(generated)) < 40, "some token must come twice for the frequency to matter"


def test_admission_forgets_the_slot_before() -> None:
    old = Row(2, frequency=3.0, generated=tuple(range(50)))
    new = Row(2, frequency=3.0, prompt=(7,), generated=(9, 9))
    bench = Bench(VOCAB, [old, replace(old, slot=3)])
    bench.admit([new])
    counts = bench.sampler.tables.token_counts
    assert counts[2].nonzero().flatten().tolist() == [7, 9]
    assert counts[3].count_nonzero() == 50


def test_token_counts_saturate() -> None:
    row = Row(0, frequency=1e-6, generated=(5,) * 20_000)
    bench = Bench(VOCAB, [row])
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 9.0
    for _ in range(3):
        assert int(bench.sample(logits).token) == 5
    assert int(bench.sampler.tables.token_counts[0, 5]) == 32767


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logprobs_are_of_the_raw_logits(temperature: float) -> None:
    rows = [Row(s, logprobs=3, temperature=temperature, top_k=9, bias=((1, 4.0, 99),)) for s in range(6)]
    logits = logits_for(6).to(torch.bfloat16)
    out = Bench(VOCAB, rows).sample(logits)
    reference = torch.log_softmax(logits.float(), dim=-1)
    chosen = reference[torch.arange(6), out.token.long()]
    assert out.logprob is not None
    assert out.rank is not None
    assert out.top_token is not None
    assert out.top_logprob is not None
    torch.testing.assert_close(out.logprob, chosen)
    assert out.rank.tolist() == [1 + int((r > c).sum()) for r, c in zip(reference, chosen, strict=True)]
    torch.testing.assert_close(out.top_logprob, reference.topk(5).values)
    torch.testing.assert_close(reference.gather(1, out.top_token.long()), out.top_logprob)
    assert {t.dtype for t in (out.token, out.rank, out.top_token)} == {torch.int32}


def test_logprobs_of_a_tiny_vocabulary_are_padded() -> None:
    out = Bench(3, [Row(0, logprobs=5)]).sample(torch.tensor([[1.0, 3.0, 2.0]]))
    assert out.top_token is not None
    assert out.top_token.tolist() == [[1, 2, 0, -1, -1]]


def test_no_logprobs_unless_asked() -> None:
    out = Bench(VOCAB, [Row(0)]).sample(logits_for(1))
    assert (out.logprob, out.rank, out.top_token, out.top_logprob) == (None, None, None, None)


def keys(seed: int, positions: np.ndarray) -> torch.Tensor:
    low, high = np.array([seed], np.uint64).view(np.int32)
    count = len(positions)
    return torch.from_numpy(noise_keys(np.full(count, low), np.full(count, high), positions))


def test_the_noise_is_what_its_definition_says() -> None:
    hashes = token_hash(500)
    for seed, position in ((0, 0), (1, 0), (0, 1), (2**64 - 1, 131071), (0x123456789ABCDEF0, 77)):
        got = -log_exponential(hashes, keys(seed, np.array([position])))[0].double().numpy()
        want = gumbel(seed, position, 500)
        likely = want > -1  # below, where a token can hardly win, v is close to 1 and its float32 is coarse
        np.testing.assert_allclose(got[likely], want[likely], rtol=0, atol=2e-6)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-2)


def test_the_ends_of_the_hash_range_map_strictly_inside_the_unit_interval() -> None:
    v = torch.tensor([0, 1, 2**31 - 2, 2**31 - 1], dtype=torch.int32).to(torch.float32).add_(0.5).mul_(UNIT)
    assert 0 < v.min() < v.max() < 1


def test_token_hash_is_a_bijection() -> None:
    assert len(token_hash(300_000).unique()) == 300_000


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations by which the chi-square statistic exceeds its mean (normal approximation)."""
    freedom = len(observed) - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("vary", ["position", "seed", "seed_high"])
def test_samples_follow_the_softmax(vary: str) -> None:
    vocab, draws = 50, 20_000
    logits = logits_for(1, seed=3, vocab=vocab)[0] / 2
    if vary == "position":
        noise_key = keys(12345, np.arange(draws))
    else:
        index = np.arange(draws, dtype=np.int32)
        zero = np.zeros(draws, np.int32)
        noise_key = torch.from_numpy(
            noise_keys(*((index, zero) if vary == "seed" else (zero, index)), np.zeros(draws, np.int64))
        )
    token = (logits - log_exponential(token_hash(vocab), noise_key)).argmax(dim=1)
    expected = torch.softmax(logits.double(), dim=0).numpy() * draws
    observed = torch.bincount(token, minlength=vocab).numpy()
    assert expected.min() > 3
    assert abs(chi_square(observed, expected)) < 4.5


def test_noise_is_uniform_and_independent_across_tokens_positions_and_seeds() -> None:
    hashes = token_hash(4096)
    rows = torch.cat([-log_exponential(hashes, keys(seed, np.arange(64))) for seed in (0, 1, 2, 1 << 32)])
    u = torch.exp(-torch.exp(-rows.double()))  # [256, 4096], uniform if the noise is Gumbel
    histogram = torch.histc(u, bins=256, min=0, max=1).numpy()
    assert abs(chi_square(histogram, np.full(256, u.numel() / 256))) < 4.5
    z = (u - 0.5) * 12**0.5
    for other in (z.roll(1, 0), z.roll(64, 0), z.roll(1, 1), z.roll(256, 1), z.roll(2048, 1), z.roll((1, 1), (0, 1))):
        assert abs(float((z * other).sum()) / z.numel() ** 0.5) < 4.5
    columns = z.sum(dim=0) / z.shape[0] ** 0.5  # a token that is favoured everywhere would show here
    assert abs(float((columns**2).mean()) - 1) < 4.5 * (2 / 4096) ** 0.5


def test_flags_alone_change_nothing_for_a_row_that_did_not_ask() -> None:
    bench = Bench(VOCAB, [Row(0)])
    logits = logits_for(1)
    out = bench.sampler.sample(
        logits, torch.tensor([0]), torch.tensor([9], dtype=torch.int32), torch.tensor([1], dtype=torch.int32),
        PlanFlag.SAMPLE | PlanFlag.FILTER | PlanFlag.PENALTY | PlanFlag.BIAS,
    )  # fmt: skip
    assert int(out.token) == int(logits.argmax())
