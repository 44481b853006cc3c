"""A process that holds one model and runs one case when told to, so that several can take turns.

Requests and replies are lines of JSON on its standard input and output: ``{"do": "prefill", ...}`` gives
``{"value": ...}``.

Shape letters: B batch rows, T tokens.
"""

import copy
import gc
import json
import os
import sys
import time
from typing import Any

import torch
import transformers

from flexolmo_hf.modeling import few_rows

#: Runs prompts before stock decodes: its batched_mm would copy the chosen experts for each of their tokens.
PROMPT_IMPLEMENTATION = {"stock": "grouped_mm", "ours": "auto"}
#: Passes over memory of which the fastest is its bandwidth.
READS = 3


class Bench:
    """One model, stock's or ours, and the cases that can be run on it."""

    def __init__(self, who: str):
        self.who = who
        self.model: Any = None
        self.prompts: dict[Any, Any] = {}

    def load(self, folder: str, per_token: int, active: list[str] | None = None) -> None:
        """Load a checkpoint in place of the former one.

        Args:
            folder: Where it lies.
            per_token: Experts per token.
            active: The experts to load; None for all. Ours only.
        """
        if self.model is not None:
            self.clear()
        options: dict[str, Any] = {"num_experts_per_tok": per_token}
        if self.who == "stock":
            model_class: Any = transformers.FlexOlmoForCausalLM
        else:
            import flexolmo_hf

            model_class = flexolmo_hf.FlexOlmoForCausalLM
            options["active_experts"] = active
        self.model = model_class.from_pretrained(folder, **options).eval()
        if self.model.config.num_experts_per_tok != per_token:
            raise RuntimeError(f"{self.who} did not take over num_experts_per_tok={per_token}")

    def clear(self) -> None:
        """Let the former model go, and whatever the garbage collector finds."""
        self.model = None
        self.prompts.clear()
        gc.collect()

    @torch.no_grad()
    def prefill(self, tokens: int, batch: int, implementation: str) -> float:
        """Return the seconds of one forward pass over new prompts with an empty cache, one logit row each."""
        self.model.set_experts_implementation(implementation)
        ids_BT = self._tokens(batch, tokens)
        begin = time.perf_counter()
        self.model(ids_BT, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begin

    @torch.no_grad()
    def decode(
        self,
        prompt: int,
        batch: int,
        new_tokens: int,
        implementation: str,
        active: list[str] | None = None,
        rows: list[list[str]] | None = None,
    ) -> float:
        """Return the seconds per token of greedy decoding by hand, after a prompt that is not timed.

        Args:
            prompt: Tokens in the cache at the start.
            batch: Rows.
            new_tokens: Tokens to decode.
            implementation: How to run the experts.
            active: The set to put in force before; None for all. Ours only.
            rows: A set for each row, given to each call. Ours only.
        """
        if self.who == "ours":
            self.model.set_active_experts(active)
        sets = {} if rows is None else {"active_experts": rows}
        cache, token_B1 = copy.deepcopy(self._prompt(prompt, batch, repr((active, rows)), sets))
        self.model.set_experts_implementation(implementation)
        begin = time.perf_counter()
        for _ in range(new_tokens):
            logits = self.model(token_B1, past_key_values=cache, **sets).logits
            token_B1 = logits[:, -1].argmax(-1, keepdim=True)
        return (time.perf_counter() - begin) / new_tokens

    @torch.no_grad()
    def logits(self, tokens: int) -> list[float]:
        """Return the logits after a prompt, to show that all workers compute the same."""
        logits: list[float] = self.model(self._tokens(1, tokens), logits_to_keep=1).logits.flatten().tolist()
        return logits

    def switch(self, sets: list[list[str]], times: int) -> dict[str, float]:
        """Switch a live model from set to set, several times round; return the longest switch of each kind, in seconds.

        Returns:
            ``first``: to sets that were not in force before; ``again``: to sets that were.
        """
        taken: list[list[float]] = []
        for _ in range(1 + times):
            taken.append([])
            for names in sets:
                begin = time.perf_counter()
                self.model.set_active_experts(names)
                taken[-1].append(time.perf_counter() - begin)
        self.model.set_active_experts(None)
        return {"first": max(taken[0]), "again": max(max(round_) for round_ in taken[1:])}

    @staticmethod
    def bandwidth(size: int, inner: int, hidden: int) -> dict[str, float]:
        """Return bytes per second, reading `size` bytes as one tensor and as matrices of an expert's shape.

        The best of several times, since it is a limit.
        """
        # Ones and not zeros or nothing: memory that was never written is one page, read over and over.
        flat = torch.ones(size // 4)
        matrices = [torch.ones(inner, hidden) for _ in range(max(1, size // (4 * inner * hidden)))]
        vector = torch.ones(hidden)
        summed = multiplied = float("inf")
        for _ in range(READS):
            begin = time.perf_counter()
            flat.sum()
            summed = min(summed, time.perf_counter() - begin)
            begin = time.perf_counter()
            for matrix in matrices:
                torch.mv(matrix, vector)
            multiplied = min(multiplied, time.perf_counter() - begin)
        return {"sum": flat.numel() * 4 / summed, "mv": len(matrices) * inner * hidden * 4 / multiplied}

    def products(self, size: int, inner: int, hidden: int, rows: int) -> float:
        """Return the seconds per byte of multiplying so many rows by matrices of an expert's shapes, the best way."""
        pairs = max(1, size // (8 * inner * hidden))
        matrices = [torch.ones(*shape) for _ in range(pairs) for shape in ((inner, hidden), (hidden, inner))]
        inputs = {width: torch.ones(rows, width) for width in (inner, hidden)}
        ways = (
            lambda matrix: torch.nn.functional.linear(inputs[matrix.shape[1]], matrix),
            lambda matrix: matrix @ inputs[matrix.shape[1]].T,
            lambda matrix: few_rows.multiply(inputs[matrix.shape[1]], matrix),
        )
        best = float("inf")
        for multiply in ways:
            begin = time.perf_counter()
            for matrix in matrices:
                multiply(matrix)
            best = min(best, time.perf_counter() - begin)
        return best / (len(matrices) * inner * hidden * 4)

    def _prompt(self, tokens: int, batch: int, sets_key: str, sets: dict[str, Any]) -> Any:
        key = (tokens, batch, sets_key)
        if key not in self.prompts:
            self.model.set_experts_implementation(PROMPT_IMPLEMENTATION[self.who])
            output = self.model(self._tokens(batch, tokens), use_cache=True, logits_to_keep=1, **sets)
            self.prompts[key] = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        return self.prompts[key]

    def _tokens(self, batch: int, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(2, self.model.config.vocab_size, (batch, tokens), generator=generator)


def serve(bench: Bench) -> None:
    """Answer requests until standard input ends."""
    # Replies have the stream to themselves: what libraries print goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        value = getattr(bench, request.pop("do"))(**request)
        print(json.dumps({"value": value}), file=replies, flush=True)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    serve(Bench(sys.argv[1]))
