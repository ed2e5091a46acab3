"""Shared by the sampler tests: a row's wishes in plain Python, a sampler that holds them, and the row-wise oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from executor.sampler import Sampled, Sampler
from ipc.frames import Param, PlanFlag


@dataclass(frozen=True)
class Row:
    """One row of a step. `bias` holds (token, value, until); `prompt` and `generated` are token ids."""

    slot: int
    position: int = 10
    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: tuple[tuple[int, float, int], ...] = ()
    prompt: tuple[int, ...] = (0,)
    generated: tuple[int, ...] = ()
    logprobs: int = -1
    sample: bool = True

    @property
    def features(self) -> PlanFlag:
        flags = PlanFlag.NONE
        if self.temperature > 0:
            flags |= PlanFlag.SAMPLE
            if self.top_k or self.top_p < 1 or self.min_p:
                flags |= PlanFlag.FILTER
        if (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0):
            flags |= PlanFlag.PENALTY
        if self.bias:
            flags |= PlanFlag.BIAS
        if self.logprobs >= 0:
            flags |= PlanFlag.LOGPROBS
        return flags

    def params(self) -> np.ndarray:
        words = np.zeros(Param.COUNT, np.int32)
        words[[Param.SEED_LOW, Param.SEED_HIGH]] = np.array([self.seed], np.uint64).view(np.int32)
        words[Param.FEATURES] = int(self.features)
        words[Param.TOP_K] = self.top_k
        words[Param.NUM_BIAS] = len(self.bias)
        floats = words.view(np.float32)
        for column, value in (
            (Param.TEMPERATURE, self.temperature),
            (Param.TOP_P, self.top_p),
            (Param.MIN_P, self.min_p),
            (Param.REPETITION, self.repetition),
            (Param.PRESENCE, self.presence),
            (Param.FREQUENCY, self.frequency),
        ):
            floats[column] = value
        return words


@dataclass
class Bench:
    """A sampler whose slots hold the given rows."""

    vocab_size: int
    rows: list[Row]
    device: str = "cpu"
    num_slots: int = 64
    max_logprobs: int = 5
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(
            torch.ones(self.num_slots, dtype=torch.int64, device=self.device),
            self.vocab_size,
            self.max_logprobs,
            self.device,
        )
        self.admit(self.rows)

    def tensor(self, values: object, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def admit(self, rows: list[Row]) -> None:
        slot = self.tensor([r.slot for r in rows])
        self.sampler.admit(slot, torch.from_numpy(np.stack([r.params() for r in rows])).to(self.device))
        history = [(r.slot, token, count) for r in rows for token, count in _history(r).items()]
        self.sampler.set_history(slot, *(self.tensor(list(column)) for column in zip(*history, strict=True)))
        bias = [(r.slot, i, *entry) for r in rows for i, entry in enumerate(r.bias)]
        if bias:
            slot, index, token, value, until = zip(*bias, strict=True)
            self.sampler.set_bias(
                *(self.tensor(list(c)) for c in (slot, index, token)),
                self.tensor(list(value), torch.float32),
                self.tensor(list(until)),
            )

    def sample(self, logits: torch.Tensor, rows: list[Row] | None = None) -> Sampled:
        """One step over `rows` (all of them if not given), logits [rows, vocab]."""
        return self.sampler.sample(logits.to(self.device), *self.step(self.rows if rows is None else rows))

    def step(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PlanFlag]:
        """What `Sampler.sample` wants besides the logits."""
        flags = PlanFlag.NONE
        for row in rows:
            flags |= row.features
        return (
            self.tensor([r.slot for r in rows], torch.int64),
            self.tensor([r.position for r in rows]),
            self.tensor([int(r.sample) for r in rows]),
            flags,
        )


def _history(row: Row) -> dict[int, int]:
    counts = dict.fromkeys(row.prompt, 1)
    for token in row.generated:
        counts[token] = counts.get(token, 0) + 2
    return counts


def expected_scores(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """float32 [vocab]: what the row's token is the argmax of, stage by stage with transformers' own processors."""
    x = logits.to(torch.float32).clone()
    for token, value, until in row.bias:
        if row.position < until:
            x[token] += value
    if row.repetition != 1.0:
        seen = torch.tensor([row.prompt + row.generated])
        x = RepetitionPenaltyLogitsProcessor(row.repetition)(seen, x.unsqueeze(0))[0]
    for token in set(row.generated):
        x[token] -= row.frequency * row.generated.count(token) + row.presence
    if row.temperature == 0:
        return x
    x = x.unsqueeze(0)
    unused = torch.zeros(1, 1, dtype=torch.long)
    x = TemperatureLogitsWarper(row.temperature)(unused, x)
    if row.min_p:
        x = MinPLogitsWarper(row.min_p)(unused, x)
    if row.top_k:
        x = TopKLogitsWarper(row.top_k)(unused, x)
    if row.top_p < 1:
        x = TopPLogitsWarper(row.top_p)(unused, x)
    return x[0] + torch.from_numpy(gumbel(row.seed, row.position, len(logits))).to(torch.float32)


def gumbel(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """float64 [vocab]: the noise as its definition reads, in Python integers, independent of the code under test."""
    m64, m32 = 2**64 - 1, 2**32 - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & m64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & m64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & m64
    z ^= z >> 31
    k0, k1 = z & m32, z >> 32

    def arithmetic(x: int, shift: int) -> int:
        return ((x - 2**32 if x >> 31 else x) >> shift) & m32

    hashes = np.empty(vocab_size)
    for token in range(vocab_size):
        h = token * 0x9E3779B1 & m32
        h ^= h >> 15
        h = h * 0x85EBCA6B & m32
        h ^= h >> 13
        h = (h ^ k0) * 0x7FEB352D & m32
        h ^= arithmetic(h, 15)
        h = (h + k1) * 0x846CA68B & m32
        hashes[token] = h ^ arithmetic(h, 16)
    return -np.log(-np.log1p(-np.minimum((hashes + 0.5) / 2**31, 1 - 2.0**-24)))


def random_rows(rng: np.random.Generator, count: int, vocab_size: int) -> list[Row]:
    """Rows in distinct slots that ask for random mixtures of everything, one in four for nothing."""
    return [_random_row(rng, slot, vocab_size) for slot in rng.permutation(60)[:count].tolist()]


def _random_row(rng: np.random.Generator, slot: int, vocab_size: int) -> Row:
    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size, rng.integers(1, most)).tolist())

    def either(off: float, on: float) -> float:
        return round(float(on), 3) if rng.random() < 0.5 else off

    if rng.random() < 0.25:
        return Row(slot, position=int(rng.integers(1000)), prompt=tokens(30), generated=tokens(30))
    position = int(rng.integers(1000))
    biased = [(int(t), float(rng.normal() * 3), 1 << 30) for t in set(tokens(8))]
    forbidden = [(int(t), -np.inf, position + int(rng.integers(-1, 2))) for t in set(tokens(4))]
    return Row(
        slot,
        position=position,
        seed=int(rng.integers(0, 1 << 64, dtype=np.uint64)),
        temperature=either(0.0, rng.uniform(0.3, 1.6)),
        top_k=int(either(0, rng.integers(1, 50))),
        top_p=either(1.0, rng.uniform(0.3, 0.99)),
        min_p=either(0.0, rng.uniform(0.01, 0.3)),
        repetition=either(1.0, rng.uniform(0.7, 1.6)),
        presence=either(0.0, rng.uniform(-1, 1)),
        frequency=either(0.0, rng.uniform(-1, 1)),
        bias=tuple(biased + forbidden) if rng.random() < 0.5 else (),
        prompt=tokens(30),
        generated=tokens(30),
    )
