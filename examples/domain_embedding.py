"""Start an expert's router row from its owner's texts.

Run: python examples/domain_embedding.py DENSE PUBLIC_TEXTS OWN_TEXTS EXPERT OUT
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from flexolmo_hf import FlexOlmoForCausalLM, compare_rows, domain_embedding
from flexolmo_hf.routing.texts import read_texts


def main(dense: str, public_texts: str, own_texts: str, expert: str, out: str) -> None:
    """Embed both domains with the anchor itself, and write a model whose rows start there."""
    anchor, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
    rows = {}
    for name, place in {"public": public_texts, expert: own_texts}.items():
        rows[name] = domain_embedding(read_texts([place]), encoder="self", model=anchor, tokenizer=tokenizer)
        print(f"{name}: {rows[name].documents} documents, {rows[name].dropped} dropped")
    model = FlexOlmoForCausalLM.from_dense(anchor, expert=expert, router_embeddings=rows)
    print(compare_rows(model).table())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
