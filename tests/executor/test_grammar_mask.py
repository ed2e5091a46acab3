"""Grammar masks in the sampler: what they forbid is never chosen, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from executor.sampler import GrammarMask
from tests.executor.sampler_rows import Bench, Row, expected_scores


def masks(rows: list[int], words: int, seed: int = 0) -> GrammarMask:
    rng = np.random.default_rng(seed)
    bits = rng.integers(-(2**31), 2**31, (len(rows), words), dtype=np.int32)
    return GrammarMask(torch.tensor(rows, dtype=torch.int32), torch.from_numpy(bits))


def allowed_ids(mask: GrammarMask, index: int, vocab: int) -> np.ndarray:
    bits = np.unpackbits(mask.words[index].numpy().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[:vocab])


@pytest.mark.parametrize(("vocab", "words"), [(64, 2), (257, 9), (257, 8), (250, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_forbids_what_has_no_bit_and_touches_no_other_row(vocab: int, words: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1)).to(dtype)
    before, mask = logits.clone(), masks([3, 0], words)
    masked = mask.apply(logits)
    assert torch.equal(logits, before), "the model's logits are kept for log-probabilities"
    for row in (1, 2, 4):
        assert torch.equal(masked[row], logits[row])
    for index, row in enumerate((3, 0)):
        ids = allowed_ids(mask, index, vocab)
        assert torch.equal(masked[row, ids], logits[row, ids])
        others = np.setdiff1d(np.arange(vocab), ids)
        assert bool((masked[row, others] == -torch.inf).all())


@pytest.mark.parametrize(
    "wishes", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"bias": ((3, 9.0, 99),)}]
)
def test_the_choice_is_that_of_the_masked_logits_alone(wishes: dict[str, object]) -> None:
    vocab, rows = 257, [Row(slot, seed=slot, logprobs=2, **wishes) for slot in range(16)]  # type: ignore[arg-type]
    logits = torch.randn(16, vocab, generator=torch.Generator().manual_seed(2)) * 3
    mask = masks([0, 2, 4, 9, 15], 9)
    bench, plain = Bench(vocab, rows), Bench(vocab, rows).sample(logits)
    flags = rows[0].features
    slot = torch.arange(16)
    position = torch.tensor([row.position for row in rows])
    got = bench.sampler.sample(logits, slot, position, torch.ones(16, dtype=torch.int32), flags, mask)
    expected = [int(expected_scores(x, row).argmax()) for x, row in zip(mask.apply(logits), rows, strict=True)]
    assert got.token.tolist() == expected
    assert got.token.tolist() != plain.token.tolist(), "the masks change nothing"
    assert got.logprob is not None
    raw = torch.log_softmax(logits, -1).gather(1, got.token.long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got.logprob, raw)
