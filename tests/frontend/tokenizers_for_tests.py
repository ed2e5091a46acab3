"""Small tokenizers of the two kinds, made on the spot: byte-level BPE, and sentencepiece with byte fallback."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

from hypothesis import HealthCheck
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from frontend.tokenizer import Tokenizer

# The first draw of text on a fresh machine builds Unicode tables for seconds.
PATIENT: Final[dict[str, Any]] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
EOS = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "the quick brown fox jumps over the lazy dog and returns the value of the first argument",
    "naïve café über straße — “quoted” … 你好，世界 привет мир 😀😃👩‍👩‍👧 stop STOP the end",
]


def byte_level() -> PreTrainedTokenizerFast:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[EOS, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 4, trainer)
    backend.add_tokens([AddedToken("  ", normalized=False), AddedToken("<｜tool▁call｜>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, chat_template=TEMPLATE)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: pieces with ▁, bytes for what has no piece, one leading space stripped from a whole text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = "▁abcdefghijklmnopqrstuvwxyz.,é"
    words = ["▁t", "▁th", "▁the", "▁s", "st", "▁st", "op", "▁stop"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "s"), ("s", "t"), ("▁s", "t"), ("o", "p"), ("▁st", "op")]
    vocab = {piece: index for index, piece in enumerate([*pieces, *letters, *words])}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@cache
def byte_level_tokenizer() -> Tokenizer:
    return Tokenizer(byte_level())


@cache
def sentencepiece_tokenizer() -> Tokenizer:
    return Tokenizer(sentencepiece())


def save_byte_level(folder: Path) -> Path:
    byte_level().save_pretrained(folder)
    return folder
