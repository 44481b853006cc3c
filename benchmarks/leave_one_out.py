"""What leaving every expert out in turn costs, against as many separate evaluations.

Run as ``python -m benchmarks.leave_one_out``; writes docs/benchmarks/leave_one_out.md and .json. Models have random
weights and texts are random words: neither changes how much there is to compute. Time is the processor's, on one
thread; the two ways take turns. That both find the same bits is checked first.
"""

import argparse
import json
import tempfile
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from flexolmo_hf.evaluation.bits_per_byte import bits_per_byte
from flexolmo_hf.evaluation.optout.matrix import opt_out_matrix, opt_out_sets

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
WORDS = [f"w{number}" for number in range(254)]


@dataclass(frozen=True)
class Case:
    """One model and its texts: how many experts, layers, documents, and words in each."""

    experts: int
    layers: int
    documents: int
    words: int = 200


CASES = (Case(4, 4, 16), Case(8, 6, 6), Case(8, 6, 24), Case(8, 2, 24))


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leave_one_out", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    results = [asdict(case) | compare(case, rounds) for case in CASES]
    page = ["# Leaving every expert out in turn", _about(rounds), *_table(results)]
    (PAGE / "leave_one_out.md").write_text("\n\n".join(page) + "\n", encoding="utf8")
    (PAGE / "leave_one_out.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Time the matrix, separate evaluations that each load their experts alone, and these without the loading."""
    words = Tokenizer(models.WordLevel({word: id for id, word in enumerate(["<pad>", "<eos>", *WORDS])}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    drawn = Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=case.words)) for _ in range(case.documents)]
    names = ["public", *(f"owner{number}" for number in range(1, case.experts))]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        FlexOlmoForCausalLM(_config(names, case)).save_pretrained(folder)

        def matrix() -> tuple[float, list[float]]:
            begin = time.process_time()
            model = FlexOlmoForCausalLM.from_pretrained(folder)
            found = opt_out_matrix(model, tokenizer, {"text": texts}, max_length=256)
            taken = time.process_time() - begin
            return taken, [float(found.bits(label, "text")) for label in found.sets]

        def separately() -> tuple[float, float, list[float]]:
            loading, begin, found = 0.0, time.process_time(), []
            for experts in opt_out_sets(names).values():
                started = time.process_time()
                model = FlexOlmoForCausalLM.from_pretrained(folder, active_experts=experts)
                loading += time.process_time() - started
                found.append(float(bits_per_byte(model, tokenizer, texts, max_length=256)))
            return time.process_time() - begin, loading, found

        assert matrix()[1] == separately()[2]
        together, apart, loads = [], [], []
        for _ in range(rounds):
            together.append(matrix()[0])
            whole, loading, _ = separately()
            apart.append(whole)
            loads.append(loading)
    return {
        "matrix_s": median(together),
        "separate_s": median(apart),
        "loading_s": median(loads),
        "share": median(a / b for a, b in zip(together, apart, strict=True)),
    }


def _config(names: list[str], case: Case) -> FlexOlmoConfig:
    return FlexOlmoConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_experts=len(names),
        num_experts_per_tok=len(names),
        expert_names=names,
        pad_token_id=0,
        eos_token_id=1,
    )


def _about(rounds: int) -> str:
    return textwrap.fill(
        "Processor seconds of one thread for the whole matrix (all experts, and all but each one), loading included, "
        "against separate evaluations that each load their experts and nothing else. Models of hidden size 128 with "
        f"random weights, {rounds} rounds in turns, medians. Both find the same bits. Written by "
        "`python -m benchmarks.leave_one_out`.",
        120,
        break_on_hyphens=False,
    )


def _table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| experts | layers | documents | matrix (s) | separately (s) | of that, loading (s) | matrix / separately |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        sizes = [row["experts"], row["layers"], row["documents"]]
        seconds = [f"{row[name]:.2f}" for name in ("matrix_s", "separate_s", "loading_s")]
        lines.append(f"| {' | '.join(map(str, [*sizes, *seconds, format(row['share'], '.0%')]))} |")
    return ["\n".join(lines)]


if __name__ == "__main__":
    main()
