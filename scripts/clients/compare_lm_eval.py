"""Compares the samples that lm-eval logged with transformers on the same model, in float32.

python scripts/clients/compare_lm_eval.py OUTPUT_FOLDER MODEL_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TOLERANCE = 2e-3  # of a sum of log-probabilities


class Reference:
    def __init__(self, folder: str) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """(sum of log-probabilities of the continuation, whether it is the greedy one)."""
        start = len(self.tokenizer.encode(context))
        ids = torch.tensor([self.tokenizer.encode(context + continuation)])
        logits = self.model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        target = ids[0, start:]
        picked = logits.gather(-1, target[:, None]).sum().item()
        return picked, bool((logits.argmax(-1) == target).all())

    def generate(self, context: str, tokens: int) -> str:
        ids = torch.tensor([self.tokenizer.encode(context)])
        out = self.model.generate(ids, max_new_tokens=tokens, do_sample=False)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@torch.inference_mode()
def main() -> None:
    folder, reference = Path(sys.argv[1]), Reference(sys.argv[2])
    worst, count = 0.0, 0
    for sample in samples(folder, "tandem_choice"):
        for arguments, ((found, greedy),) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            wanted, wanted_greedy = reference.loglikelihood(arguments["arg_0"], arguments["arg_1"])
            worst, count = max(worst, abs(float(found) - wanted)), count + 1
            assert str(greedy) == str(wanted_greedy), (arguments, greedy, wanted_greedy)
    assert worst < TOLERANCE, f"log-likelihoods differ by {worst}"
    generated = samples(folder, "tandem_generate")
    for sample in generated:
        (arguments,) = sample["arguments"].values()
        ((found,),) = sample["resps"]
        wanted = reference.generate(arguments["arg_0"], arguments["arg_1"]["max_gen_toks"])
        assert found == wanted, (found, wanted)
    print(f"lm-eval: {count} log-likelihoods within {worst:.1e} of transformers, {len(generated)} generations equal")


if __name__ == "__main__":
    main()
