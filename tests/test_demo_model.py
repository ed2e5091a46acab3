"""The demo model in the repository: it loads with plain transformers, is small, writes English and ends by itself.

Reads models/demo alone; must never train, download or need a GPU.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "models" / "demo"
QUESTIONS = (
    "What does asyncio.Queue.put do?",
    "Describe the module `json`.",
    "Who are you?",
    "What does math.sqrt do?",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return loaded.eval()


def continue_greedily(model: Any, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    prompt = torch.tensor([prompt_ids])  # [1, prompt tokens]
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False)
    return [int(token) for token in out[0, prompt.shape[1] :]]


def test_size_fits_the_repository(model: Any) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    assert 2e6 <= parameters <= 6e6
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 12_000_000


def test_config_names_both_ends_and_the_stored_type() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 4096
    assert len(generation["eos_token_id"]) == 2
    assert generation["pad_token_id"] == config["eos_token_id"]


def test_special_tokens_are_single_and_the_ends_of_sequence(tokenizer: Any, model: Any) -> None:
    ends = [tokenizer.encode(text) for text in ("<|endoftext|>", "<|im_end|>")]
    assert ends == [[token] for token in model.generation_config.eos_token_id]
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize("text", ["Return the\n\n    value", "naïve 東京 👩‍🚀", "\ttabs\r\nand  spaces  ", "a" * 300])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template(tokenizer: Any) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("prompt", ["Return the", "The file object", "This module provides"])
def test_greedy_text_is_readable(model: Any, tokenizer: Any, prompt: str) -> None:
    text = prompt + tokenizer.decode(
        continue_greedily(model, tokenizer.encode(prompt), max_new_tokens=60), skip_special_tokens=True
    )
    words = re.findall(r"[A-Za-z]+", text)
    assert text.isascii(), text
    assert sum(c.isalpha() or c == " " for c in text) > 0.7 * len(text), text
    assert len(words) >= 5, text
    assert len(set(words)) >= 0.4 * len(words), text


def test_answers_end_by_themselves(model: Any, tokenizer: Any) -> None:
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in QUESTIONS
    ]
    last = [continue_greedily(model, prompt, max_new_tokens=400)[-1] for prompt in prompts]
    assert any(token in model.generation_config.eos_token_id for token in last)


def test_loss_does_not_rise_at_long_positions(model: Any, tokenizer: Any) -> None:
    text = (FOLDER / "README.md").read_text()
    ids = torch.tensor([(tokenizer.encode(text) * 8)[:2048]])  # [1, 2048], the card repeated
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert loss[1536:].mean() < loss[:512].mean() + 0.5


def test_card_states_a_good_result() -> None:
    match = re.search(r"\| bits/byte \| ([0-9.]+) \|", (FOLDER / "README.md").read_text())
    assert match, "the card has no bits/byte row"
    assert 0.5 < float(match.group(1)) < 1.5
