"""Train models/demo on text that every Python installation holds, and write its card.

Owns model, schedule, evaluation, samples and card; demo_corpus.py beside it owns the text. Run by hand.
It must state only numbers of the run it just made.

    python scripts/train_demo_model.py --device cuda --minutes 4 --out models/demo
"""

import argparse
import math
import platform
import random
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from demo_corpus import (
    END_OF_TEXT,
    TURN_END,
    Packed,
    epoch_stream,
    pack,
    read_corpus,
    render,
    sample_rows,
    train_tokenizer,
)
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

EVAL_CONTEXT_TOKENS: Final = 1024
PLAIN_PROMPTS: Final = ("Return the", "The file object", "Raise an exception", "This module provides", "Create a new")
CHAT_PROMPTS: Final = (
    "What does asyncio.Queue.put do?",
    "Describe the module `json`.",
    "What is threading.Lock?",
    "Who are you?",
)
CARD: Final = """\
---
language: en
license: other
license_name: psf-2.0
pipeline_tag: text-generation
---
# Tandem demo model

A Qwen3-architecture model of {parameters:.2f} M parameters that makes the engine serve real text without a download.
It recites and imitates the documentation of Python's standard library. It is not a source of facts.

## Data and licence
Only text that a Python installation itself holds, here Python {python}: documentation strings of the standard library
(Python and C), the language topics behind `help()`, and comments and code of the library without its tests.
Chats are made from the same strings: a question built from the documented name, the documentation as the answer.
The text is copyright of the Python Software Foundation under the PSF License Version 2
(<https://docs.python.org/3/license.html>).

| use | documents | tokens | tokens per epoch |
|---|---|---|---|
{data}

Held out by document, after removing repeats (same text, same first or same last 100 letters): {val_documents}
documents of {val_bytes} bytes in all for the result below, and {dev_documents} more to choose the checkpoint.

## Result
| measure | value |
|---|---|
| validation loss (nats per token) | {val_nats:.4f} |
| perplexity | {perplexity:.2f} |
| bits/byte | {bits_per_byte:.4f} |

Measured on the saved bfloat16 weights, windows of {eval_context} tokens.

## Recipe
`{command}`

{steps} steps, {tokens:.0f} M tokens ({epochs} epochs) in {seconds:.0f} s on {device_name}, torch {torch},
transformers {transformers}. The schedule follows the clock, so another machine takes another number of steps.
Muon for matrices and AdamW for the rest, peak learning rate {lr}, cosine to zero, weight decay {weight_decay}.
Dropout {dropout} on embeddings and residual branches, {attention_dropout} on attention.
Steps of {step_tokens} tokens in rows of {context}, every fourth step in rows of {long_context}.
Kept: the averaged weights with the lowest selection loss, {best_dev:.4f} after {best_percent:.0f} % of the run.

| seconds | step | training loss | selection loss |
|---|---|---|---|
{curve}

## Samples
As they came, unselected.

{samples}
"""


def build_model(options: argparse.Namespace, end_id: int) -> Any:
    """A random Qwen3 whose residual branches and embeddings drop out while training."""
    config = Qwen3Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        attention_dropout=options.attention_dropout,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    model: Any = Qwen3ForCausalLM(config)
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, out: functional.dropout(out, options.dropout, m.training))
    return model.to(options.device)


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy in nats of rows [B, context + 1], forward in bfloat16 on a GPU."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
        # A ready-made mask (none: plain causal) spares a per-step check that makes the host wait for the device.
        logits = model(input_ids=rows[:, :-1], attention_mask={"full_attention": None}, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Any, stream: torch.Tensor) -> float:
    """Mean loss in nats per token over stream [T], in windows that each predict EVAL_CONTEXT_TOKENS tokens."""
    model.eval()
    total = 0.0
    for begin in range(0, len(stream) - 1, EVAL_CONTEXT_TOKENS):
        window = stream[begin : begin + EVAL_CONTEXT_TOKENS + 1]
        total += loss_of(model, window[None]).item() * (len(window) - 1)
    return total / (len(stream) - 1)


def optimizers_of(model: Any, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": embeddings, "weight_decay": options.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(
            matrices, lr=options.lr, momentum=0.95, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95)),
    ]


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up over the first 2 % of the time, then a cosine to zero. progress: share of the time used."""
    return peak * min(1.0, progress / 0.02 + 0.02) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class Run:
    """What happened while training. The card is written from this alone."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    epochs: int = 0
    best_progress: float = 0.0
    best_dev_nats: float = math.inf
    curve: list[tuple[float, int, float, float]] = field(default_factory=list)  # s, steps, train nats, dev nats


def train(model: Any, packed: Packed, dev: torch.Tensor, options: argparse.Namespace) -> Run:
    """Train until the clock runs out, and leave in model the averaged weights that did best on dev [T]."""
    optimizers, run = optimizers_of(model, options), Run()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))  # type: ignore[no-untyped-call]
    best: dict[str, torch.Tensor] = {}
    stream, starts = epoch_stream(packed)
    next_average, epoch_end, begun = 0.0, len(stream), time.perf_counter()
    while (progress := (time.perf_counter() - begun) / (60 * options.minutes)) < 1 or len(run.curve) < options.evals:
        if run.tokens >= epoch_end:
            stream, starts = epoch_stream(packed)
            epoch_end += len(stream)
            run.epochs += 1
        # Every fourth step sees long rows, so that positions up to the long context are trained.
        context = options.long_context if run.steps % 4 == 3 else options.context
        rows = sample_rows(stream, starts, max(1, options.step_tokens // context), context)
        for group in [g for optimizer in optimizers for g in optimizer.param_groups]:
            group["lr"] = learning_rate(options.lr, progress)
        model.train()
        loss = loss_of(model, rows)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.steps, run.tokens = run.steps + 1, run.tokens + rows.shape[0] * context
        if progress >= next_average:
            average.update_parameters(model)
            next_average = progress + 0.001
        if progress >= (len(run.curve) + 1) / options.evals:
            record(run, average.module, loss.item(), dev, time.perf_counter() - begun, progress)
            if run.best_progress == progress:
                best = {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
    run.seconds = time.perf_counter() - begun
    model.load_state_dict(best)
    return run


def record(run: Run, model: Any, train_nats: float, dev: torch.Tensor, seconds: float, progress: float) -> None:
    """Evaluate model on dev [T], add a point to the curve and note whether it is the best so far."""
    dev_nats = evaluate(model, dev)
    run.curve.append((seconds, run.steps, train_nats, dev_nats))
    if dev_nats < run.best_dev_nats:
        run.best_dev_nats, run.best_progress = dev_nats, progress
    print(
        f"{seconds:6.1f} s  step {run.steps:6d}  epoch {run.epochs:4d}  {run.tokens / seconds:9.0f} tok/s"
        f"  train {train_nats:.3f}  dev {dev_nats:.3f}",
        flush=True,
    )


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the folder in bfloat16, with both ends of sequence in the generation config."""
    end_ids = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    model.config.attention_dropout = 0.0
    model.generation_config.eos_token_id = end_ids
    model.generation_config.pad_token_id = end_ids[0]
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)


@torch.no_grad()
def sample(model: Any, tokenizer: Any, text: str, *, greedy: bool) -> tuple[str, str]:
    """Continue text. Returns (continuation, note on its end and on the greedy margins in logits)."""
    prompt = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=160, **how)
    fresh = out[0, prompt.shape[1] :]
    ended = int(fresh[-1]) in model.generation_config.eos_token_id
    note = f"{len(fresh)} tokens, {'ended by itself' if ended else 'cut'}"
    if greedy:
        top = model(out).logits[0, prompt.shape[1] - 1 : -1].float().topk(2).values
        margin = top[:, 0] - top[:, 1]
        note += f", margin median {margin.median():.2f} min {margin.min():.3f}"
    return tokenizer.decode(fresh, skip_special_tokens=True).strip(), note


def samples_of(model: Any, tokenizer: Any) -> list[tuple[str, str, str]]:
    """(heading, continuation, note) for the fixed prompts: plain greedy, plain sampled, chat greedy."""
    rendered = [(p, render([("user", p)], generation_prompt=True)) for p in CHAT_PROMPTS]
    asked = [(f"greedy: {p}", p, True) for p in PLAIN_PROMPTS]
    asked += [(f"sampled (temperature 0.7, top_p 0.9): {p}", p, False) for p in PLAIN_PROMPTS[:3]]
    asked += [(f"chat, greedy: {p}", text, True) for p, text in rendered]
    return [(heading, *sample(model, tokenizer, text, greedy=greedy)) for heading, text, greedy in asked]


def card_of(options: argparse.Namespace, run: Run, packed: Packed, facts: dict[str, Any]) -> str:
    """The model card, from what this run did. facts: the remaining fields of CARD."""
    fence = "`" * 4
    on_cuda = options.device.startswith("cuda")
    recipe = {name: value for name, value in vars(options).items() if name != "out"}
    flags = (f"--{name.replace('_', '-')}={value}" for name, value in recipe.items())
    return CARD.format(
        **recipe,
        **facts,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device_name=torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} CPU threads",
        command=" ".join(["python scripts/train_demo_model.py", *flags]),
        steps=run.steps,
        tokens=run.tokens / 1e6,
        epochs=run.epochs,
        seconds=run.seconds,
        best_dev=run.best_dev_nats,
        best_percent=100 * min(1.0, run.best_progress),
        eval_context=EVAL_CONTEXT_TOKENS,
        data="\n".join(f"| {use} | {d} | {t} | {e} |" for use, (d, t, e) in packed.summary.items()),
        curve="\n".join(f"| {s:.0f} | {n} | {a:.3f} | {b:.3f} |" for s, n, a, b in run.curve),
        samples="\n\n".join(
            f"**{head}** ({note})\n{fence}text\n{text}\n{fence}" for head, text, note in facts["shown"]
        ),
    )


def parse_options() -> argparse.Namespace:
    """Command line; the defaults are the recipe of models/demo, except that a CPU takes smaller steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time; corpus and samples come on top")
    for name, default in {
        "vocab": 2048, "hidden": 256, "layers": 6, "heads": 8, "kv-heads": 4, "head-dim": 32, "ffn": 704,
        "context": 512, "long-context": 2048, "evals": 20, "seed": 0,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step-tokens", type=int, help="tokens per step (default 32768 on cuda, 4096 on a CPU)")
    for name, value in {
        "lr": 3e-3, "weight-decay": 0.1, "dropout": 0.2, "attention-dropout": 0.1,
        "docs-share": 1.0, "chat-share": 0.5, "comments-share": 0.7, "code-share": 0.25,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=float, default=value)
    options = parser.parse_args()
    if options.step_tokens is None:
        options.step_tokens = 32768 if options.device.startswith("cuda") else 4096
    return options


def main() -> None:
    """Read, train, save, reload what was saved, measure it, and write the card."""
    options = parse_options()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # old standard-library modules warn when imported
    torch.manual_seed(options.seed)
    corpus = read_corpus(options.seed)
    tokenizer: Any = train_tokenizer(corpus, options.vocab)
    share = {use: getattr(options, f"{use}_share") for use in ("docs", "chat", "comments", "code")}
    packed = pack(corpus, tokenizer, options.device, share, random.Random(options.seed))
    print(f"use -> documents, tokens, tokens in an epoch: {packed.summary}", flush=True)
    dev, val = (
        torch.tensor(tokenizer("".join(e.text + END_OF_TEXT for e in half))["input_ids"], device=options.device)
        for half in (corpus.dev, corpus.val)
    )
    model = build_model(options, tokenizer.convert_tokens_to_ids(END_OF_TEXT))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(dev)} dev tokens, {len(val)} val tokens", flush=True)
    run = train(model, packed, dev, options)
    save(model, tokenizer, options.out)
    saved = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32).to(options.device)
    val_nats = evaluate(saved, val)
    val_bytes = sum(len(e.text.encode()) for e in corpus.val)
    bits_per_byte = val_nats * len(val) / math.log(2) / val_bytes
    torch.manual_seed(options.seed)
    shown = samples_of(saved, AutoTokenizer.from_pretrained(options.out))
    for heading, text, note in shown:
        print(f"--- {heading} ({note})\n{text}")
    facts = {
        "parameters": parameters / 1e6,
        "val_nats": val_nats,
        "perplexity": math.exp(val_nats),
        "bits_per_byte": bits_per_byte,
        "val_bytes": val_bytes,
        "val_documents": len(corpus.val),
        "dev_documents": len(corpus.dev),
        "shown": shown,
    }
    (options.out / "README.md").write_text(card_of(options, run, packed, facts), encoding="utf8")
    print(
        f"FINAL steps {run.steps} seconds {run.seconds:.0f} tok/s {run.tokens / run.seconds:.0f} epochs {run.epochs}"
        f" best at {100 * min(1.0, run.best_progress):.0f} % dev {run.best_dev_nats:.4f}"
        f" val loss {val_nats:.4f} ppl {math.exp(val_nats):.2f} bits/byte {bits_per_byte:.4f}"
    )


if __name__ == "__main__":
    main()
