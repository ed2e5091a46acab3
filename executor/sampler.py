"""Chooses each row's next token on the device. Owns what sampling keeps for each slot.

Called on the compute stream only, by the step that unpacks a plan (`admit`, `set_bias`, `set_history`) and then by the
one that has the logits (`sample`). It must never wait for the device; no row may feel what other rows ask for.

The order of the stages is that of vLLM's sampler (vllm/v1/worker/gpu/sample/sampler.py), skipped where no row asks:
    grammar       -inf on what a row's mask does not allow
    bias          logit_bias, and -inf on the stop ids that min_tokens forbids
    penalties     repetition (prompt and generated), then frequency and presence (generated)
    temperature   logits / T
    filters       min_p, then top_k, then top_p over what the first two left
    choice        argmax(logits / T + gumbel(seed, position, token)); greedy rows: argmax(logits)
A filter keeps every token that ties with the last one kept. Log-probabilities are of the model's own logits, before all
of this, as vLLM's `raw_logprobs`. `sampler_cpu` defines the arithmetic; `sampler_kernels` is the same for CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from executor import sampler_cpu
from executor.sampler_cpu import MAX_COUNT, SlotTables
from ipc.frames import MAX_BIAS, Param, PlanFlag


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's choice, on the device, rows in the order of the plan. All but `token` need PlanFlag.LOGPROBS."""

    token: torch.Tensor  # int32 [rows]; INVALID_TOKEN where the logits hold a NaN
    logprob: torch.Tensor | None = None  # float32 [rows], of the chosen token
    rank: torch.Tensor | None = None  # int32 [rows], 1 = most probable
    top_token: torch.Tensor | None = None  # int32 [rows, max_logprobs], most probable first; -1 past the vocabulary
    top_logprob: torch.Tensor | None = None  # float32 [rows, max_logprobs]


@dataclass(frozen=True, slots=True)
class GrammarMask:
    """The tokens that some rows may sample, one bit for each id, the lowest bit of a word first."""

    row: torch.Tensor  # int32 [grammar rows]
    words: torch.Tensor  # int32 [grammar rows, at least vocab_size / 32]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy of logits [rows, vocab] with -inf where a mask has no bit. Plain torch: few steps need it."""
        bit = torch.arange(32, dtype=torch.int32, device=logits.device)
        forbidden = (self.words.unsqueeze(2) >> bit & 1) == 0  # [grammar rows, words, 32]
        forbidden = F.pad(forbidden.flatten(1), (0, logits.shape[1] - 32 * self.words.shape[1]), value=True)
        row = self.row.long()
        masked = logits.clone()
        masked[row] = logits[row].masked_fill_(forbidden, -torch.inf)
        return masked


class Sampler:
    """The sampling state of all slots, and the one call that turns logits into tokens."""

    def __init__(
        self, last_token: torch.Tensor, vocab_size: int, max_logprobs: int, device: torch.device | str
    ) -> None:
        """`last_token` int64 [slots] is where a choice is carried over to the next step.

        The last slot is the null slot, which must never be admitted: its zeroed parameters mean greedy.
        """
        num_slots = len(last_token)
        self._max_logprobs = max_logprobs
        self.tables = SlotTables(
            params=torch.zeros(num_slots, int(Param.COUNT), dtype=torch.int32, device=device),
            bias_token=torch.zeros(num_slots, MAX_BIAS, dtype=torch.int32, device=device),
            bias_value=torch.zeros(num_slots, MAX_BIAS, dtype=torch.float32, device=device),
            bias_until=torch.zeros(num_slots, MAX_BIAS, dtype=torch.int32, device=device),
            token_counts=torch.zeros(num_slots, vocab_size, dtype=torch.int16, device=device),
            token_hash=sampler_cpu.token_hash(vocab_size).to(device),
            last_token=last_token,
        )
        self._choose = sampler_cpu.choose_tokens
        if torch.device(device).type == "cuda":
            from executor.sampler_kernels import choose_tokens  # Triton is not there on a machine without CUDA

            self._choose = choose_tokens

    def admit(self, admit_slot: torch.Tensor, admit_params: torch.Tensor) -> None:
        """Replace the parameters of slots. admit_slot: int [A], distinct; admit_params: int32 [A, Param.COUNT]."""
        self.tables.params[admit_slot.long()] = admit_params

    def set_bias(
        self,
        slot: torch.Tensor,  # int [B]
        index: torch.Tensor,  # int [B], row of the slot's table; (slot, index) distinct
        token: torch.Tensor,  # int32 [B]
        value: torch.Tensor,  # float32 [B], added to the logit; -inf forbids
        until: torch.Tensor,  # int32 [B], applies while the sampled token's position is below this
    ) -> None:
        flat = slot.long() * MAX_BIAS + index
        self.tables.bias_token.view(-1)[flat] = token
        self.tables.bias_value.view(-1)[flat] = value
        self.tables.bias_until.view(-1)[flat] = until

    def set_history(
        self,
        admit_slot: torch.Tensor,  # int [A]
        slot: torch.Tensor,  # int [H]
        token: torch.Tensor,  # int [H], distinct within a slot
        count: torch.Tensor,  # int32 [H], bit 0: in the prompt; count << 1: times generated
    ) -> None:
        """Forget the token counts of admitted slots, then set those given.

        Call it when a plan has history entries: a slot with penalties always has some, as its prompt is not empty.
        """
        counts = self.tables.token_counts
        # Slots without penalties too: picking the others out would cost more than 2 bytes per token.
        counts.index_fill_(0, admit_slot.long(), 0)
        flat = slot.long() * counts.shape[1] + token
        counts.view(-1)[flat] = count.clamp(max=MAX_COUNT).to(torch.int16)

    def sample(
        self,
        logits: torch.Tensor,  # [rows, vocab_size], float32, bfloat16 or float16; not modified
        row_slot: torch.Tensor,  # int [rows]
        position: torch.Tensor,  # int [rows], of the token to sample
        row_sample: torch.Tensor,  # int32 [rows], 0 = nobody will read this row's token
        flags: PlanFlag,  # the union of what the rows need
        grammar: GrammarMask | None = None,
    ) -> Sampled:
        """Choose a token for every row, carry it over, and count it for the rows with penalties. Capturable."""
        allowed = logits if grammar is None else grammar.apply(logits)
        token = self._choose(self.tables, allowed, row_slot, position, row_sample, flags)
        if not flags & PlanFlag.LOGPROBS:
            return Sampled(token)
        return _with_logprobs(token, logits, self._max_logprobs)

    def sample_greedy(self, logits: torch.Tensor, row_slot: torch.Tensor, address: torch.Tensor) -> None:
        """`sample` without flags, for CUDA graphs: nothing is returned, tokens go to where `address` int64 [1] says.

        That is an int32 column with room for all rows of `logits` [rows, vocab_size]. If it is 0, nothing is chosen or
        carried over.
        """
        from executor.sampler_kernels import choose_greedy  # Triton is not there on a machine without CUDA

        choose_greedy(self.tables, logits, row_slot, address)

    def score(self, logits: torch.Tensor, token: torch.Tensor) -> Sampled:
        """How probable `token` int32 [scores] was by `logits` [scores, vocab_size]."""
        return _with_logprobs(token, logits, self._max_logprobs)


def _with_logprobs(token: torch.Tensor, logits: torch.Tensor, max_logprobs: int) -> Sampled:
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    chosen = logprobs.gather(1, token.clamp(min=0).long().unsqueeze(1))
    rank = (logprobs > chosen).sum(dim=1, dtype=torch.int32) + 1
    available = min(max_logprobs, logits.shape[1])
    top_logprob, top_token = torch.topk(logprobs, available, dim=1)
    top_token = top_token.to(torch.int32)
    if available < max_logprobs:
        top_token = F.pad(top_token, (0, max_logprobs - available), value=-1)
        top_logprob = F.pad(top_logprob, (0, max_logprobs - available), value=-torch.inf)
    return Sampled(token, chosen.squeeze(1), rank, top_token, top_logprob)
