"""The text of the demo model: read it, split it, tokenize it, lay it out for training.

Owns corpus, tokenizer and packing; called by train_demo_model.py and by nothing else.
It must read only the running interpreter's own standard library, and never let a held-out text into training.
"""

import ast
import hashlib
import importlib
import inspect
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from transformers import Qwen2Tokenizer

END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM_PROMPTS: Final = ("You are a helpful assistant.", "You answer questions about the Python standard library.")
QUESTIONS: Final = {
    "module": ("What is the module {0} for?", "Describe the module `{0}`.", "What does {0} provide?"),
    "class": ("What is {0}?", "Describe the class `{0}`.", "What does {0} do?", "When would I use {0}?"),
    "function": ("What does {0} do?", "Explain `{0}`.", "How do I use {0}?", "What is {0}?", "What does {0}() return?"),
    "topic": ("Explain {0} in Python.", "Tell me about {0} in Python.", "What does the language say about {0}?"),
}
SMALL_TALK: Final = (
    ("Hello", "Hello! Ask me about a module, a class or a function of the Python standard library."),
    ("Hi!", "Hi! What would you like to know about the Python standard library?"),
    ("Who are you?", "I am a small demo model, trained on the documentation strings of Python."),
    ("What can you do?", "I can describe parts of the Python standard library, for example json or os.path.join."),
    ("Thank you", "You are welcome."),
    ("How are you?", "I am a small program and I am running well. What would you like to know?"),
)
CHAT_VARIANTS: Final = 8
MIN_DOC_CHARS: Final = 24
MAX_ANSWER_CHARS: Final = 900


@dataclass(frozen=True)
class Entry:
    """One documentation string and the thing it documents."""

    kind: str  # a key of QUESTIONS
    names: tuple[str, ...]
    text: str


@dataclass
class Corpus:
    """Text by use. Held-out halves hold documentation only, and no training text repeats one of their entries."""

    train: list[Entry] = field(default_factory=list)
    dev: list[Entry] = field(default_factory=list)
    val: list[Entry] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Packed:
    """All training documents as one token array on the device."""

    tokens: torch.Tensor  # [T]
    starts: torch.Tensor  # [documents] offset of each in tokens
    lengths: torch.Tensor  # [documents]
    share: torch.Tensor  # [documents] chance to enter an epoch
    summary: dict[str, tuple[int, int, int]]  # use -> documents, tokens, tokens in an epoch


def source_files() -> Iterator[tuple[str, str, ast.Module]]:
    """Yield (dotted module name, source, tree) of every standard-library file that is not a test or a table."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = re.compile(r"-packages/|(^|/)(test|tests|idle_test|pydoc_data|config-[^/]*|_sysconfigdata[^/]*)(/|$)")
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skip.search(relative.with_suffix("").as_posix()):
            continue
        try:
            source = path.read_text(encoding="utf8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError) as error:
            print(f"skipped {relative}: {error}")
            continue
        parts = relative.with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), source, tree


def aliases(module: str, qualname: str) -> tuple[str, ...]:
    """Names a user may call it by: asyncio.queues.Queue.put, asyncio.Queue.put, Queue.put."""
    module = "os.path" if module in ("genericpath", "ntpath", "posixpath") else module
    package = "os.path" if module == "os.path" else module.split(".")[0].removeprefix("_py").lstrip("_")
    names = [f"{module}.{qualname}", f"{package}.{qualname}", *([qualname] if "." in qualname else [])]
    return tuple(dict.fromkeys(names))


def tree_entries(module: str, node: ast.AST, prefix: str = "") -> Iterator[Entry]:
    """Yield the documentation of a syntax tree, and remove it from the tree so that the rest is code alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            qualname = f"{prefix}.{child.name}" if prefix else child.name
            yield from tree_entries(module, child, qualname)
            text = ast.get_docstring(child)
            if text:
                kind = "class" if isinstance(child, ast.ClassDef) else "function"
                yield Entry(kind, aliases(module, qualname), text)
                child.body = child.body[1:] or [ast.Pass()]
        elif not isinstance(child, ast.expr):
            yield from tree_entries(module, child, prefix)


def comment_blocks(source: str) -> Iterator[str]:
    """Yield runs of adjacent comment lines that are long enough to be prose."""
    for match in re.finditer(r"(?:^[ \t]*#[^\n]*\n)+", source, re.MULTILINE):
        text = re.sub(r"^[ \t]*#+ ?", "", match.group(), flags=re.MULTILINE).strip()
        letters = sum(c.isalpha() or c == " " for c in text)
        if len(text) > 80 and letters > 0.8 * len(text):
            yield text


def member_entries(module: str, owner: Any, prefix: str = "") -> Iterator[Entry]:
    """Yield documentation that lives in compiled objects: members of a module and of its classes."""
    for name, value in sorted(vars(owner).items(), key=lambda item: (item[0].startswith("_"), item[0])):
        if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.isdatadescriptor(value)):
            continue
        text, qualname = value.__doc__, f"{prefix}.{name}" if prefix else name
        if isinstance(text, str):
            kind = "class" if inspect.isclass(value) else "function"
            names = (qualname,) if module == "builtins" else aliases(module, qualname)
            yield Entry(kind, names, inspect.cleandoc(text))
        if inspect.isclass(value) and not prefix and value.__module__.split(".")[0].strip("_") == module.strip("_"):
            yield from member_entries(module, value, name)


def compiled_entries() -> Iterator[Entry]:
    """Yield documentation of modules written in C, public names first so that duplicates keep the public one."""
    untouchable = {"antigravity", "this", "idlelib", "turtledemo", "turtle"}
    for name in sorted(sys.stdlib_module_names - untouchable, key=lambda n: (n.startswith("_"), n)):
        try:
            module = importlib.import_module(name)
        except ImportError:  # another platform's module
            continue
        if isinstance(module.__doc__, str):
            yield Entry("module", (name,), inspect.cleandoc(module.__doc__))
        yield from member_entries(name, module)


def topic_entries() -> Iterator[Entry]:
    """Yield the language reference texts behind help()."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        print("this Python has no pydoc_data: training without the language topics")
        return
    for name, text in sorted(topics.items()):
        yield Entry("topic", (name.replace("-", " "),), inspect.cleandoc(text))


def repeat_keys(text: str) -> tuple[str, str, str]:
    """Two texts that share one of these keys count as the same: whole, first and last 100 letters, spaces folded."""
    folded = re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
    return folded, "head " + folded[:100], "tail " + folded[-100:]


def read_corpus(seed: int) -> Corpus:
    """Collect, deduplicate and split by document. The split is a hash of the text, so it survives new documents."""
    corpus, seen = Corpus(), set[str]()
    entries: list[Entry] = []
    comments: list[str] = []
    for module, source, tree in source_files():
        text = ast.get_docstring(tree)
        if text:
            entries.append(Entry("module", (module,), text))
            tree.body = tree.body[1:]
        entries.extend(tree_entries(module, tree))
        comments.extend(comment_blocks(source))
        if not module.startswith("encodings."):
            corpus.code.append(ast.unparse(tree))
    for entry in [*topic_entries(), *entries, *compiled_entries()]:
        keys = repeat_keys(entry.text)
        if len(entry.text) < MIN_DOC_CHARS or not seen.isdisjoint(keys):
            continue
        seen.update(keys)
        bucket = int.from_bytes(hashlib.sha256(f"{seed} {keys[0]}".encode()).digest()[:4], "big") % 100
        (corpus.val if bucket < 3 else corpus.dev if bucket < 5 else corpus.train).append(entry)
    for text in comments:
        keys = repeat_keys(text)
        if seen.isdisjoint(keys):
            seen.update(keys)
            corpus.comments.append(text)
    return corpus


def render(messages: list[tuple[str, str]], *, generation_prompt: bool = False) -> str:
    """CHAT_TEMPLATE in Python, so that training needs no template engine. messages: (role, content) pairs."""
    turns = "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in messages)
    return turns + (f"{TURN_START}assistant\n" if generation_prompt else "")


def answer_of(text: str) -> str:
    """The leading paragraphs of a documentation string that fit MAX_ANSWER_CHARS, at least one."""
    answer = ""
    for paragraph in re.split(r"\n\s*\n", text):
        if answer and len(answer) + len(paragraph) > MAX_ANSWER_CHARS:
            break
        answer += ("\n\n" if answer else "") + paragraph
    return answer


def conversations(entries: list[Entry], rng: random.Random) -> Iterator[str]:
    """Yield every askable entry once as a chat: random wording, at times a system prompt or two exchanges."""
    public = [e for e in entries if len(e.text) < 6000 and not re.search(r"\.__?[a-z]", e.names[0])]
    exchanges = [(rng.choice(QUESTIONS[e.kind]).format(rng.choice(e.names)), answer_of(e.text)) for e in public]
    exchanges += SMALL_TALK * 4
    rng.shuffle(exchanges)
    while exchanges:
        messages = [("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.25 else []
        for _ in range(2 if rng.random() < 0.2 and len(exchanges) > 1 else 1):
            question, answer = exchanges.pop()
            messages += [("user", question), ("assistant", answer)]
        yield render(messages)


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's splitting rules, so that every Qwen-aware loader reads it the same way."""
    texts = [e.text for e in corpus.train] + corpus.comments
    specials = [END_OF_TEXT, TURN_START, TURN_END]
    untrained: Any = Qwen2Tokenizer()
    tokenizer: Qwen2Tokenizer = untrained.train_new_from_iterator(
        texts, vocab_size, new_special_tokens=specials[1:], show_progress=False
    )
    assert all(len(tokenizer.encode(s)) == 1 for s in specials), "a special token is split"
    assert len(tokenizer) == vocab_size, f"vocabulary has {len(tokenizer)} entries, expected {vocab_size}"
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    templated = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert templated == render([("user", "a"), ("assistant", "b")], generation_prompt=True), "two chat templates"
    return tokenizer


def pack(
    corpus: Corpus, tokenizer: Qwen2Tokenizer, device: str, epoch_share: dict[str, float], rng: random.Random
) -> Packed:
    """Tokenize all training documents, each closed by END_OF_TEXT, and lay them out on the device.

    epoch_share: for docs, chat, comments and code, the share of their documents that enters one epoch, at most 1.
    """
    chats = [chat for _ in range(CHAT_VARIANTS) for chat in conversations(corpus.train, rng)]
    sources = {"docs": [e.text for e in corpus.train], "chat": chats, "comments": corpus.comments, "code": corpus.code}
    flat: list[int] = []
    lengths: list[int] = []
    shares: list[float] = []
    summary: dict[str, tuple[int, int, int]] = {}
    for name, texts in sources.items():
        share = epoch_share[name] / (CHAT_VARIANTS if name == "chat" else 1)
        before = len(flat)
        for ids in tokenizer([text + END_OF_TEXT for text in texts])["input_ids"]:
            flat += ids
            lengths.append(len(ids))
            shares.append(share)
        summary[name] = (len(texts), len(flat) - before, round((len(flat) - before) * share))
    length = torch.tensor(lengths, device=device)
    start = length.cumsum(0) - length
    return Packed(torch.tensor(flat, device=device), start, length, torch.tensor(shares, device=device), summary)


def epoch_stream(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw this epoch's documents in random order.

    Returns (tokens [E], document starts [documents in this epoch]), both on the device.
    """
    chosen = torch.nonzero(torch.rand_like(packed.share) < packed.share).squeeze(1)
    chosen = chosen[torch.randperm(len(chosen), device=chosen.device)]
    length = packed.lengths[chosen]
    start = length.cumsum(0) - length
    shift = torch.repeat_interleave(packed.starts[chosen] - start, length)
    return packed.tokens[torch.arange(len(shift), device=shift.device) + shift], start


def sample_rows(stream: torch.Tensor, starts: torch.Tensor, rows: int, context: int) -> torch.Tensor:
    """Cut [rows, context + 1] tokens: even rows begin at a document, as prompts do, odd ones anywhere."""
    last = len(stream) - context - 1
    anywhere = torch.randint(last, (rows,), device=stream.device)
    documents = starts[torch.randint(len(starts), (rows,), device=stream.device)].clamp(max=last)
    even = torch.arange(rows, device=stream.device) % 2 == 0
    begin = torch.where(even, documents, anywhere)
    return stream[begin[:, None] + torch.arange(context + 1, device=stream.device)]
