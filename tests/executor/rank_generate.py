"""One rank of several that generate together, without an engine around them: `python -m tests.executor.rank_generate`.

Reads one JSON object from stdin: what `RankJob` says. Prints a line for each model: tokens, or why it was refused.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from executor.model import Model, load_model
from executor.ranks import Ranks
from ipc.errors import ModelError
from tests.executor.fused_model import fused_model
from tests.executor.paged_generate import engine_config, paged_generate

if TYPE_CHECKING:
    from executor.peer_start import Senders
    from executor.peers import Peers

LIMIT_S = 300
PEER_ROWS = 8  # steps of more tokens are summed in the other way
PATIENCE = 1 << 16  # a flag that never comes is a failure, not a hang

kept: list[object] = []  # memory that only addresses point to


@dataclass(frozen=True)
class RankJob:
    """What all ranks do: for each folder, load the model, generate greedily."""

    folders: list[str]
    prompts: list[list[int]]
    new_tokens: int
    size: int
    rendezvous: int
    device: str = "cpu"
    dtype: str = "float32"
    fused: bool = False  # by the fused decoder, once by each kind of product
    memories: tuple[int, ...] = ()  # a memory file for each rank, by which they sum rows; else by NCCL or gloo


def generate_on_ranks(job: RankJob) -> list[list[dict[str, Any]]]:
    """[rank][model] -> tokens, float32 logits, parameters held, KV heads; or the error. Every rank is a process."""

    def run(rank: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "tests.executor.rank_generate", str(rank)]
        done = subprocess.run(
            command,
            input=json.dumps(asdict(job)),
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[job.rendezvous, *job.memories],
            timeout=LIMIT_S,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(job.size) as pool:
        return list(pool.map(run, range(job.size)))


def main() -> None:
    rank = int(sys.argv[1])
    job = RankJob(**json.loads(sys.stdin.read()))
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if job.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    ranks = Ranks(rank, job.size, job.rendezvous, device)
    for folder in job.folders:
        try:
            with torch.inference_mode():
                answer = _generate(Path(folder), job, device, ranks)
        except ModelError as error:
            answer = {"error": f"{error.param}: {error.message}"}
        print(json.dumps(answer), flush=True)


def _generate(folder: Path, job: RankJob, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    if not job.fused:
        config = engine_config(folder, dtype=job.dtype, device=job.device, ranks=job.size)
        model = load_model(config, False, device, ranks)
        return _answer(model, *paged_generate(model, job.prompts, job.new_tokens, chunk=16))
    model = fused_model(folder, device, ranks)
    decoder = model.decoder
    assert decoder is not None
    if job.memories:
        decoder.peers = _peers(ranks, job.memories, decoder.senders)
    tokens: list[list[int]] = []
    logits: list[torch.Tensor] = []
    for ways in decoder.both_ways():
        decoder.ways = ways
        for both, found in zip((tokens, logits), paged_generate(model, job.prompts, job.new_tokens), strict=True):
            both += found  # type: ignore[operator]
    return _answer(model, tokens, logits)


def _peers(ranks: Ranks, memories: Sequence[int], senders: Senders) -> Peers:
    """Peers on memory that works, as is proven of it, and of other memory is not."""
    from executor.peer_start import prove
    from executor.peers import Peers, bytes_of

    width, share = senders.linear.n, senders.share
    size = bytes_of(PEER_ROWS, width, share, torch.float32, len(memories))
    maps = []
    for fd in memories:
        os.ftruncate(fd, size)
        maps.append(torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8))
    addresses = [memory.data_ptr() for memory in maps]
    own = maps[ranks.rank]
    sizes: dict[str, Any] = {"width": width, "share": share, "dtype": torch.float32}
    deaf = Peers(ranks.rank, own, [own.data_ptr()] * len(maps), rows=1, **sizes)
    assert "sums differ from NCCL's" in prove(deaf, ranks, senders, patience=10)
    own.zero_()  # rows have arrived in it
    ranks.agree(True)
    peers = Peers(ranks.rank, own, addresses, rows=PEER_ROWS, **sizes)
    assert prove(peers, ranks, senders) == ""
    peers.patience = PATIENCE
    kept.append(maps)
    return peers


def _answer(model: Model, tokens: list[list[int]], logits: list[torch.Tensor]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "logits": [each.tolist() for each in logits],
        "held": sum(parameter.numel() for parameter in model._module.parameters()),
        "kv_heads": _kv_heads(model),
    }


def _kv_heads(model: Model) -> list[int]:
    return [layer.spec.kv_heads for layer in model.layers]


if __name__ == "__main__":
    main()
    os._exit(0)  # as an executor does: threads of gloo that outlive the interpreter abort the process now and then
