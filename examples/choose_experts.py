"""Generate with different experts of one model.

Run: python examples/choose_experts.py MODEL "A prompt" public public+math
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import flexolmo_hf  # noqa: F401 (registers the architecture)


def main(path: str, prompt: str, *expert_sets: str) -> None:
    """Print one continuation per set of experts, written as names joined by +."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer(prompt, return_tensors="pt")
    for names in expert_sets:
        with model.use_experts(*names.split("+")):
            tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        print(f"[{names}] {tokenizer.decode(tokens[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
