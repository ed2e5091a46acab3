"""engine-bench: its loads and its numbers; what it does to a server is tested in e2e."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from frontend.bench import cli
from frontend.bench.load import Answer
from frontend.bench.report import Slo, summarize
from frontend.bench.workloads import LOADS, with_arrivals


@pytest.mark.parametrize("name", sorted(LOADS))
def test_a_load_has_about_the_lengths_asked_for_and_is_the_same_again(name: str) -> None:
    asks = LOADS[name](np.random.default_rng(1), 2000, 100, 40)
    assert asks == LOADS[name](np.random.default_rng(1), 2000, 100, 40)
    words = np.array([len(ask.prompt.split()) for ask in asks])
    assert words.mean() == pytest.approx(100, rel=0.15)
    assert np.mean([ask.max_tokens for ask in asks]) == pytest.approx(40, rel=0.15)
    assert len({ask.prompt for ask in asks}) > 1990


def test_prompts_of_the_prefix_load_share_their_beginnings() -> None:
    asks = LOADS["prefix"](np.random.default_rng(1), 100, 100, 40)
    assert len({tuple(ask.prompt.split()[:75]) for ask in asks}) == 8


def test_arrivals_are_poisson_or_all_at_once() -> None:
    asks = LOADS["random"](np.random.default_rng(1), 4000, 4, 4)
    gaps = np.diff([ask.at_s for ask in with_arrivals(asks, 20.0, np.random.default_rng(2))])
    assert gaps.mean() == pytest.approx(0.05, rel=0.1)
    assert gaps.std() == pytest.approx(0.05, rel=0.1)
    assert {ask.at_s for ask in with_arrivals(asks, float("inf"), np.random.default_rng(2))} == {0.0}


def test_the_numbers_of_two_answers_and_a_failure() -> None:
    answers = [
        Answer(due_s=10.0, sent_s=10.5, text_s=[11.0, 11.1, 11.3], end_s=11.4, prompt_tokens=7, output_tokens=4),
        Answer(due_s=10.0, sent_s=10.0, text_s=[12.0], end_s=12.0, prompt_tokens=3, output_tokens=1),
        Answer(due_s=10.0, end_s=10.1, error="HTTP 429: busy"),
    ]
    summary = summarize(answers, 2.0, workload="random", load="x", slo=Slo(ttft_ms=1500, tpot_ms=150))
    assert (summary.requests, summary.failed, summary.errors) == (3, 1, {"HTTP 429: busy": 1})
    assert (summary.prompt_tokens, summary.output_tokens, summary.output_tokens_per_s) == (10, 5, 2.5)
    assert summary.goodput_per_s == 0.5  # the second came too late
    assert summary.ttft_ms is not None and summary.ttft_ms.max == pytest.approx(2000)
    assert summary.ttft_ms.mean == pytest.approx(1500)  # from when it was due, not from when it left
    assert summary.tpot_ms is not None and summary.tpot_ms.mean == pytest.approx(100)
    assert summary.itl_ms is not None and summary.itl_ms.p50 == pytest.approx(150)
    assert summary.e2e_ms is not None and summary.e2e_ms.max == pytest.approx(2000)


def test_an_answer_without_a_text_has_no_time_between_tokens() -> None:
    answers = [Answer(due_s=10.0, sent_s=10.0, text_s=[], end_s=11.0, prompt_tokens=3, output_tokens=8)]
    summary = summarize(answers, 1.0, workload="random", load="x", slo=Slo())
    assert summary.tpot_ms is None
    assert summary.ttft_ms is not None and summary.ttft_ms.max == pytest.approx(1000)


@pytest.mark.parametrize("flag", ["--json", "--report"])
def test_a_file_that_cannot_be_written_is_known_before_the_load(
    tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name)  # matplotlib is an optional part
    monkeypatch.setattr(cli, "_target", lambda options: pytest.fail("the server was asked"))
    path = tmp_path / "no" / "such" / "folder.html"
    with pytest.raises(SystemExit) as ended:
        cli.main([flag, str(path)])
    assert ended.value.code == 2
    assert f"argument {flag}: cannot write {path}: No such file or directory" in capsys.readouterr().err


def test_a_load_that_fails_leaves_the_files_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(options: object) -> None:
        raise OSError("no server")

    monkeypatch.setattr(cli, "_target", refuse)
    before, new = tmp_path / "before.json", tmp_path / "new.json"
    before.write_text("{}")
    assert [cli.main(["--json", str(path)]) for path in (before, new)] == [1, 1]
    assert "no server" in capsys.readouterr().err
    assert before.read_text() == "{}"
    assert not new.exists()
