"""The cluster simulator: its step times are those that were measured, its runs add up, and the same seed repeats."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    import cluster_model

    yield cluster_model
    sys.path.remove(str(ROOT / "scripts"))


def test_steps_take_what_was_measured(model: ModuleType) -> None:
    step = model.StepTime()
    for rows, context, ms in model.GRAPH_ALONE:
        assert step.decode_s(rows, context) * 1e3 == pytest.approx(ms, rel=0.01), (rows, context)
    rows = [step.decode_s(n, 0) for n in range(1, 2000)]
    assert all(a <= b for a, b in itertools.pairwise(rows)), "more rows never take less time"


@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
def test_arrivals_have_the_rate_asked_for(model: ModuleType, arrivals: str) -> None:
    scenario = model.Scenario(replicas=4, frontends=1, arrivals=arrivals, rate=50, seconds=200)
    times = model.arrival_times(scenario, np.random.default_rng(1))
    assert len(times) == pytest.approx(4 * 50 * 200, rel=0.1)
    assert (np.diff(times) >= 0).all()
    counts = np.bincount((times * 10).astype(int))
    assert (np.var(counts) > 3 * np.mean(counts)) == (arrivals == "bursty")  # equal for Poisson


def small(model: ModuleType, **changes: object) -> object:
    fields = dict(replicas=2, frontends=2, rate=10, seconds=2.0, warm_up=0.5, shared_len=256, output_len=32, groups=2)
    return model.Scenario(**{**fields, "num_blocks": 2000, **changes})


def test_a_run_adds_up_and_repeats(model: ModuleType) -> None:
    clusters = [model.Cluster(small(model)) for _ in range(2)]
    one, two = (cluster.run() for cluster in clusters)
    assert (one.tokens, one.first_token_s, one.hit_tokens) == (two.tokens, two.first_token_s, two.hit_tokens)
    assert one.tokens == len(one.first_token_s) + sum(map(len, one.gaps_s))
    assert one.requests * 32 * 0.5 < one.tokens < one.requests * 32 * 1.5
    assert 0.6 < one.hit_tokens / one.prompt_tokens < 256 / 384
    assert one.frames <= one.steps * 2
    for replica in clusters[0].replicas:
        replica.state.check()


def test_gaps_are_steps(model: ModuleType) -> None:
    """One request at a time: each token a step of one row."""
    outcome = model.Cluster(small(model, replicas=1, frontends=1, rate=0.5, seconds=9.0, seed=3)).run()
    gaps = np.concatenate(outcome.gaps_s)
    assert len(gaps) > 60
    assert np.median(gaps) == pytest.approx(model.StepTime().decode_s(1, 400), rel=0.01)


def test_the_table_its_end_and_its_picture(
    model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import simulate_cluster

    runs, picture = tmp_path / "runs.json", tmp_path / "picture.png"
    few = ["--seconds", "1.5", "--warm-up", "0.5", "--rate", "10", "--output-len", "16", "--shared-len", "256"]
    simulate_cluster.main(["--replicas", "1,3", *few, "--json", str(runs)])
    printed = capsys.readouterr().out
    assert [row["replicas"] for row in json.loads(runs.read_text())] == [1, 3, 1, 3]
    assert "At 3 replicas, bursty arrivals" in printed
    simulate_cluster.main(["--from", str(runs), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
