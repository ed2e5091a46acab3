"""The columns of a plan that only admissions fill: a request's parameters, its bias table, its token history.

Called by the planner, for plans that admit.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ipc.frames import MAX_BIAS, PLAN_COLUMNS, Int32, Param, PlanFlag
from scheduler.admission import forbidden_ids
from scheduler.request import Request
from scheduler.state import SchedulerState

_FOREVER: Final = 2**31 - 1
NO_ADMITS: Final[dict[str, Any]] = {
    name: np.empty((0, Param.COUNT) if name == "admit_params" else 0, np.float32 if name == "bias_value" else np.int32)
    for name in PLAN_COLUMNS[PLAN_COLUMNS.index("admit_slot") : PLAN_COLUMNS.index("score_index")]
}


def admit_columns(state: SchedulerState, admits: list[Request]) -> dict[str, Any]:
    """The columns of a plan that admits these requests, which have their slots."""
    params = np.zeros((len(admits), Param.COUNT), np.int32)
    bias: list[tuple[int, int, int, float, int]] = []
    history = [np.empty((3, 0), np.int32)]
    for i, request in enumerate(admits):
        rows = _bias_rows(state, request)
        bias += rows
        _fill_params(params[i], request, int(state.slots.computed[request.slot]), len(rows))
        if request.features & PlanFlag.PENALTY:
            history.append(_history_of(request))
    columns = np.array([(slot, i, token, until) for slot, i, token, _, until in bias], np.int32).reshape(-1, 4).T
    counts = np.concatenate(history, axis=1)
    return {
        "admit_slot": np.array([request.slot for request in admits], np.int32),
        "admit_params": params,
        "bias_slot": columns[0],
        "bias_index": columns[1],
        "bias_token": columns[2],
        "bias_value": np.array([value for _, _, _, value, _ in bias], np.float32),
        "bias_until": columns[3],
        "history_slot": counts[0],
        "history_token": counts[1],
        "history_count": counts[2],
    }


def _bias_rows(state: SchedulerState, request: Request) -> list[tuple[int, int, int, float, int]]:
    """The slot's bias table: (slot, index, token, value, until position)."""
    params, slot = request.params, request.slot
    rows = [(slot, i, token, value, _FOREVER) for i, (token, value) in enumerate(sorted(params.logit_bias.items()))]
    until = request.prompt_len + params.min_tokens
    for token in forbidden_ids(params, state.config.card):
        rows.append((slot, len(rows), token, -np.inf, until))
    assert len(rows) <= MAX_BIAS, f"{len(rows)} bias rows were admitted, the table has {MAX_BIAS}"
    return rows


def _fill_params(row: Int32, request: Request, computed: int, num_bias: int) -> None:
    params, floats = request.params, row.view(np.float32)
    row[Param.COMPUTED] = computed
    row[Param.SEED_LOW : Param.SEED_HIGH + 1] = np.array([params.seed], np.int64).view(np.int32)
    row[Param.FEATURES] = int(request.features)
    floats[Param.TEMPERATURE] = params.temperature
    row[Param.TOP_K] = params.top_k
    floats[Param.TOP_P] = params.top_p
    floats[Param.MIN_P] = params.min_p
    floats[Param.REPETITION] = params.repetition_penalty
    floats[Param.PRESENCE] = params.presence_penalty
    floats[Param.FREQUENCY] = params.frequency_penalty
    row[Param.NUM_BIAS] = num_bias


def _history_of(request: Request) -> Int32:
    """[3, unique tokens]: slot, token, (in prompt) | (times generated) << 1."""
    prompt, output = request.tokens[: request.prompt_len], request.tokens[request.prompt_len :]
    generated, times = np.unique(output, return_counts=True)
    tokens = np.union1d(prompt, generated)
    counts = np.isin(tokens, prompt).astype(np.int32)
    counts[np.searchsorted(tokens, generated)] += times.astype(np.int32) << 1
    return np.stack((np.full(len(tokens), request.slot, np.int32), tokens.astype(np.int32), counts))
