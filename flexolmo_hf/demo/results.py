"""The demo's question, asked of the merged model: what does each set of experts know about each domain?

Run as ``python -m flexolmo_hf.demo.results``. Every set is loaded by itself: an expert left out is not in memory.
"""

import argparse
import json
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import flexolmo_hf  # noqa: F401  (registers the architecture with the Auto classes)
from flexolmo_hf.demo.settings import DOMAINS, OWNERS
from flexolmo_hf.evaluation import bits_per_byte
from flexolmo_hf.evaluation.data.documents import read_documents

EXPERT_SETS = (("public",), *(("public", owner) for owner in OWNERS), ("public", *OWNERS))
PROMPTS = {"public": "The history of", "math": "Find the value of $x$", "code": "def "}


def measure(merged: Path, heldout: Path, *, sequence: int, batch_size: int = 16) -> dict[str, dict[str, dict]]:
    """Measure every set of experts on every domain, and let each write.

    Args:
        merged: The merged checkpoint.
        heldout: Folder with one file of held-out documents per domain.
        sequence: Tokens per window.
        batch_size: Windows per batch.

    Returns:
        ``bits_per_byte`` and ``samples``, each by set (names joined by "+") and domain.
    """
    tokenizer = AutoTokenizer.from_pretrained(merged)
    texts = {domain: read_documents(heldout / f"{domain}.jsonl") for domain in DOMAINS}
    found: dict[str, dict[str, dict]] = {"bits_per_byte": {}, "samples": {}}
    with tqdm(total=len(EXPERT_SETS) * len(DOMAINS), desc="measuring") as bar:
        for experts in EXPERT_SETS:
            name = "+".join(experts)
            model = AutoModelForCausalLM.from_pretrained(merged, active_experts=list(experts))
            found["samples"][name] = {
                domain: continue_text(model, tokenizer, prompt) for domain, prompt in PROMPTS.items()
            }
            found["bits_per_byte"][name] = {}
            for domain in DOMAINS:
                value = bits_per_byte(model, tokenizer, texts[domain], max_length=sequence, batch_size=batch_size)
                found["bits_per_byte"][name][domain] = float(value)
                bar.update()
    return found


def continue_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, tokens: int = 48) -> str:
    """Continue a prompt with the model's own words, the same ones on every run."""
    torch.manual_seed(0)
    # The end token stands before a document, as it did in training.
    ids = tokenizer(tokenizer.eos_token + prompt, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.9)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m flexolmo_hf.demo.results", description=__doc__)
    parser.add_argument("--merged", type=Path, required=True, help="the merged checkpoint")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of held-out documents")
    parser.add_argument("--sequence", type=int, required=True, help="tokens per window")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    found = measure(given.merged, given.heldout, sequence=given.sequence)
    given.output.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf8")


if __name__ == "__main__":
    main()
