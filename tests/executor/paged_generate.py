"""Greedy generation straight through `Model.forward`: chunks, ragged batches, scattered pages, no scheduler."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from executor.inputs import StepInputs
from executor.model import Model
from ipc.config import EngineConfig
from ipc.schema import ModelCard


def engine_config(folder: Path, *, dtype: str = "float32", max_model_len: int = 256, **changes: object) -> EngineConfig:
    """An EngineConfig for the model in `folder`, on the GPU if there is one."""
    card = ModelCard("test", str(folder), max_model_len, 128, (), 5)
    settings: dict[str, object] = {"device": "cuda" if torch.cuda.is_available() else "cpu", "max_num_seqs": 16}
    return EngineConfig(card=card, dtype=dtype, **(settings | changes))  # type: ignore[arg-type]


@dataclass
class _Row:
    slot: int
    tokens: list[int]
    goal: int  # tokens at the end
    pages: list[int]
    computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


def paged_generate(
    model: Model, prompts: list[list[int]], new_tokens: int, *, chunk: int = 7, seed: int = 0
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """(new tokens, float32 logits [new_tokens, vocab]) of each prompt.

    Prompts advance by random chunks of up to `chunk` tokens and a random part of the rows sits each step out, so that
    decode rows and prefill rows of all lengths meet.
    """
    rng = random.Random(seed)
    size = model.block_size
    need = [-(-(len(p) + new_tokens) // size) for p in prompts]
    model.allocate_kv(1 + sum(need))
    order = list(range(1, 1 + sum(need)))
    rng.shuffle(order)
    table = torch.zeros(len(prompts) + 1, max(need), dtype=torch.int32)
    rows = []
    for slot, (prompt, pages) in enumerate(zip(prompts, need, strict=True)):
        mine = [order.pop() for _ in range(pages)]
        table[slot, :pages] = torch.tensor(mine, dtype=torch.int32)
        rows.append(_Row(slot, list(prompt), len(prompt) + new_tokens, mine))
    table = table.to(model.device)
    while active := [row for row in rows if len(row.tokens) < row.goal]:
        chosen = [row for row in active if rng.random() < 0.8] or active[:1]
        chosen.sort(key=lambda row: row.computed == 0 or row.pending > 1)
        num_decode = sum(row.computed > 0 and row.pending == 1 for row in chosen)
        lengths = [min(row.pending, rng.randint(1, chunk)) for row in chosen]
        logits = model.forward(_step(model, chosen, lengths, num_decode, table))
        assert logits.shape == (len(chosen), model.vocab_size)
        for row, length, row_logits in zip(chosen, lengths, logits.float().cpu(), strict=True):
            row.computed += length
            if row.pending == 0:
                row.tokens.append(int(row_logits.argmax()))
                row.logits.append(row_logits)
    return [row.tokens[-new_tokens:] for row in rows], [torch.stack(row.logits) for row in rows]


def _step(model: Model, rows: list[_Row], lengths: list[int], num_decode: int, table: torch.Tensor) -> StepInputs:
    size, device = model.block_size, model.device
    spans = [range(row.computed, row.computed + n) for row, n in zip(rows, lengths, strict=True)]
    starts = [sum(lengths[:i]) for i in range(len(rows) + 1)]

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return StepInputs(
        num_rows=len(rows),
        num_decode=num_decode,
        num_prefill=len(rows) - num_decode,
        num_tokens=starts[-1],
        counts=tensor([len(rows), num_decode], torch.int32),
        token_ids=tensor([row.tokens[i] for row, span in zip(rows, spans, strict=True) for i in span]),
        positions=tensor([i for span in spans for i in span]),
        slot_mapping=tensor(
            [row.pages[i // size] * size + i % size for row, span in zip(rows, spans, strict=True) for i in span]
        ),
        row_slot=tensor([row.slot for row in rows]),
        query_start=tensor(starts, torch.int32),
        kv_len=tensor([span.stop for span in spans], torch.int32),
        last_index=tensor([start - 1 for start in starts[1:]]),
        block_table=table,
    )
