"""Answer people with different rights in one batch, and show which experts each answer came from.

Run: python examples/rights_per_row.py MODEL public:"One prompt" public+math:"Another prompt"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import flexolmo_hf  # noqa: F401 (registers the architecture)


def main(path: str, *requests: str) -> None:
    """Print one continuation per request, each written as names joined by +, a colon, and a prompt."""
    rights, prompts = zip(*(request.split(":", 1) for request in requests), strict=True)
    sets = [names.split("+") for names in rights]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer(list(prompts), padding=True, return_tensors="pt")
    answers = model.generate(**inputs, active_experts=sets, max_new_tokens=40, do_sample=False)
    routed = model.attribution(
        answers, attention_mask=(answers != tokenizer.pad_token_id).long(), active_experts=sets, per_token=False
    )
    for names, answer, shares in zip(rights, answers, routed.shares_per_row, strict=True):
        listened_to = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)
        print(f"[{names}] {tokenizer.decode(answer, skip_special_tokens=True)} ({listened_to})")


if __name__ == "__main__":
    main(*sys.argv[1:])
