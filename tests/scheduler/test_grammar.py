"""The grammar worker with the real library and the demo model's tokenizer: masks follow the output of each request."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from ipc.doorbell import Doorbell
from ipc.errors import GrammarError
from ipc.frames import PlanFlag
from ipc.schema import ModelCard, SamplingParams
from scheduler.grammar import GrammarWorker, Job
from scheduler.request import Request, State

llguidance = pytest.importorskip("llguidance")

DEMO_MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
EOS = (0, 2)
CARD = ModelCard("demo", str(DEMO_MODEL), 4096, 2048, EOS, 20)
WAIT_S = 60.0


@pytest.fixture(scope="module")
def tokenizer() -> object:
    text = (DEMO_MODEL / "tokenizer.json").read_text()
    return llguidance.LLTokenizer(text, n_vocab=CARD.vocab_size, eos_token=list(EOS))


def request(grammar: str, number: int = 0) -> Request:
    return Request(
        peer=0,
        request_id=number,
        arrival=number,
        prompt_len=1,
        limit=64,
        params=SamplingParams(),
        priority=0,
        root=b"",
        tokens=np.zeros(1, np.int32),
        features=PlanFlag.NONE,
        stop_ids=frozenset(),
        grammar=grammar,
    )


class Driver:
    """Submits jobs and waits for as many outcomes."""

    def __init__(self, card: ModelCard = CARD) -> None:
        self.bell = Doorbell.create()
        self.worker = GrammarWorker(card, self.bell)

    def run(self, *jobs: Job) -> list[set[int] | GrammarError]:
        self.worker.submit(jobs)
        found: dict[int, set[int] | GrammarError] = {}
        while len(found) < len(jobs):
            for asked, outcome in self.worker.take():
                found[asked.request_id] = outcome if isinstance(outcome, GrammarError) else ids_of(outcome)
            if len(found) < len(jobs):
                assert self.bell.wait(timeout_s=WAIT_S), "no mask came"
        return [found[asked.request_id] for asked, _ in jobs]


def test_a_tokenizer_is_learned_before_anybody_asks_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = threading.Semaphore(0)

    def refuse(card: ModelCard) -> None:
        learned.release()
        raise GrammarError("no grammars here")

    monkeypatch.setattr("scheduler.grammar._Compiler", refuse)
    driver = Driver()
    assert learned.acquire(timeout=WAIT_S), "nothing was learned at start"
    for number in range(2):
        (error,) = driver.run((request(regex("a"), number), []))
        assert str(error) == "no grammars here"
    assert not learned.acquire(blocking=False)


def ids_of(mask: np.ndarray) -> set[int]:
    assert len(mask) == CARD.vocab_size // 32
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def regex(text: str) -> str:
    return str(llguidance.LLMatcher.grammar_from_regex(text))


def test_masks_follow_the_output_and_end_with_it(tokenizer: object) -> None:
    driver, asked = Driver(), request(regex("[0-9]{3}x"))
    (allowed,) = driver.run((asked, []))
    for text, ended in (("1", False), ("2", False), ("3", False), ("x", True)):
        assert not allowed & set(EOS), "the end of the sequence is allowed too early"
        (token,) = tokenizer.tokenize_str(text)  # type: ignore[attr-defined]
        assert token in allowed
        (allowed,) = driver.run((asked, [token]))
        assert (allowed == set(EOS)) == ended


def test_a_replayed_request_goes_on_where_it_was() -> None:
    driver = Driver()
    first, second = request(regex("(yes|no) please"), 1), request(regex("(yes|no) please"), 2)
    (slow,) = driver.run((first, []))
    tokens: list[int] = []
    while len(tokens) < 3:
        assert isinstance(slow, set)
        tokens.append(max(slow))
        (slow,) = driver.run((first, tokens[-1:]))
    (fast,) = driver.run((second, tokens))
    assert fast == slow


def test_requests_of_one_grammar_do_not_share_their_state(tokenizer: object) -> None:
    driver, grammar = Driver(), regex("a+b")
    both = request(grammar, 1), request(grammar, 2)
    start, same = driver.run((both[0], []), (both[1], []))
    assert start == same
    (a,) = tokenizer.tokenize_str("a")  # type: ignore[attr-defined]
    (b,) = tokenizer.tokenize_str("b")  # type: ignore[attr-defined]
    after_a, still_start = driver.run((both[0], [a]), (both[1], []))
    assert b in after_a
    assert b not in still_start
    assert still_start == start


def test_what_cannot_go_on_is_an_error_and_no_one_else_s(tokenizer: object) -> None:
    driver = Driver()
    (a,) = tokenizer.tokenize_str("a")  # type: ignore[attr-defined]
    (x,) = tokenizer.tokenize_str("x")  # type: ignore[attr-defined]
    nothing = llguidance.LLMatcher.grammar_from_json_schema({"$ref": "#"})
    for grammar, tokens, message in (
        (regex("(a"), [], "unclosed group"),
        ("start: %%%", [], "cannot be used"),
        (str(nothing), [], "NoExtension"),
        (regex("a+"), [x], "doesn't satisfy the grammar"),
    ):
        bad, good = driver.run((request(grammar, 1), tokens), (request(regex("ab"), 2), [a]))
        assert isinstance(bad, GrammarError)
        assert message in bad.message
        assert isinstance(good, set)


@pytest.mark.parametrize(("path", "eos", "lacks"), [("/nowhere", EOS, "tokenizer.json"), (str(DEMO_MODEL), (), "end")])
def test_a_model_without_what_grammars_need_says_so(path: str, eos: tuple[int, ...], lacks: str) -> None:
    driver = Driver(ModelCard("demo", path, 4096, 2048, eos, 20))
    (error,) = driver.run((request(regex("a")), []))
    assert isinstance(error, GrammarError)
    assert lacks in error.message


def test_the_grammar_of_an_aborted_request_is_not_compiled() -> None:
    driver = Driver()
    aborted, live = request(regex("a+"), 1), request(regex("b+"), 2)
    aborted.state = State.DONE
    driver.worker.submit([(aborted, []), (live, [])])
    found = []
    while not found:
        assert driver.bell.wait(timeout_s=WAIT_S), "no mask came"
        found = [asked for asked, _ in driver.worker.take()]
    assert found == [live]
    assert aborted.matcher is None
