"""What router rows, biases and tuning are worth on real text: one public model, two owners, every choice in turn.

Run as ``python -m benchmarks.router_choices [--encoder FOLDER]``; writes docs/benchmarks/router_choices.md and .json.
Every owner trains alone; tuning sees public documents only, chosen by `select_proxy`.
"""

import argparse
import json
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, Olmo2ForCausalLM

from flexolmo_hf import (
    ExpertPackage,
    ExpertSFTConfig,
    ExpertSFTTrainer,
    FlexOlmoForCausalLM,
    RouterSFTConfig,
    RouterSFTTrainer,
    domain_embedding,
    merge_experts,
    select_proxy,
)
from flexolmo_hf.demo.corpus import Layout, write_corpus
from flexolmo_hf.demo.public_model import train_public_model
from flexolmo_hf.demo.settings import DOMAINS, OWNERS, QUICK, DemoSettings
from flexolmo_hf.demo.tokenizer import train_tokenizer
from flexolmo_hf.demo.training import training_fields
from flexolmo_hf.evaluation.bits_per_byte import bits_per_byte
from flexolmo_hf.evaluation.data.documents import read_documents
from flexolmo_hf.evaluation.data.packages import fetch_wheels

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"

STUDY = DemoSettings(
    heldout_bytes=60_000,
    wikipedia_bytes=1_500_000,
    public_share=0.05,
    owner_bytes=500_000,
    vocabulary=2048,
    hidden=128,
    intermediate=384,
    layers=3,
    heads=4,
    public_rate=4e-3,
    expert_rate=3e-3,
    owner_epochs=1,
)


@dataclass(frozen=True)
class Choice:
    """How an owner's router starts.

    Attributes:
        title: What the table calls it.
        rows: ``"neutral"``, ``"self"`` (the anchor's hidden states) or ``"encoder"``.
        bias: Start of the bias; None for a router without.
    """

    title: str
    rows: str
    bias: float | None


CHOICES = (
    Choice("neutral rows", "neutral", None),
    Choice("neutral rows, bias from -1", "neutral", -1.0),
    Choice("hidden-state rows", "self", None),
    Choice("hidden-state rows, bias from -1", "self", -1.0),
    Choice("encoder rows", "encoder", None),
    Choice("encoder rows, bias from -1", "encoder", -1.0),
)


class Study:
    """The texts, the public model, and what was measured so far."""

    def __init__(self, folder: Path, settings: DemoSettings, encoder: str | None, cache: Path | None):
        self.folder, self.settings, self.encoder = folder, settings, encoder
        self.layout = Layout(folder)
        self.public = folder / "public_model"
        write_corpus(folder, fetch_wheels(cache), settings)
        texts = read_documents(self.layout.public)
        train_tokenizer(texts, vocabulary=settings.vocabulary, longest=2 * settings.sequence).save_pretrained(
            self.public
        )
        self.timed("public model", lambda: train_public_model(self.layout.public, self.public, settings))
        self.tokenizer = AutoTokenizer.from_pretrained(self.public)
        self.heldout = {name: list(read_documents(self.layout.heldout(name))) for name in DOMAINS}
        self.results: dict[str, dict[str, float]] = {}

    def timed(self, title: str, work: Callable[[], Any]) -> Any:
        """Do something, and say how long it took."""
        begin = time.monotonic()
        result = work()
        print(f"{title}: {time.monotonic() - begin:.0f} s", flush=True)
        return result

    def measure(self, title: str, model: Any) -> None:
        """Measure a model on every domain."""
        length = self.settings.sequence
        found = {
            name: bits_per_byte(model, self.tokenizer, texts, max_length=length) for name, texts in self.heldout.items()
        }
        self.results[title] = {name: round(float(value), 4) for name, value in found.items()}
        print(title, self.results[title], flush=True)

    def rows(self, kind: str, owner: str) -> dict[str, Any]:
        """Return the router rows of the public expert and one owner's."""
        texts = {"public": read_documents(self.layout.public), owner: read_documents(self.layout.owner_data(owner))}
        if kind == "neutral":
            return {}
        if kind == "self":
            dense = Olmo2ForCausalLM.from_pretrained(self.public)
            options = {"encoder": "self", "model": dense, "tokenizer": self.tokenizer}
        else:
            options = {"encoder": self.encoder, "hidden_size": self.settings.hidden}
        return {name: domain_embedding(documents, sample=300, **options) for name, documents in texts.items()}

    def train(self, choice: Choice, owner: str) -> ExpertPackage:
        """Do what an owner does, and return the package."""
        biased = {} if choice.bias is None else {"router_bias": True, "bias_start": choice.bias}
        model = FlexOlmoForCausalLM.from_dense(
            self.public, expert=owner, router_embeddings=self.rows(choice.rows, owner), **biased
        )
        settings = self.settings
        fields = training_fields(self.folder / "run", settings, rate=settings.expert_rate, epochs=settings.owner_epochs)
        trainer = ExpertSFTTrainer(
            model=model,
            args=ExpertSFTConfig(expert=owner, **fields),
            train_dataset=Dataset.from_dict({"text": list(read_documents(self.layout.owner_data(owner)))}),
            processing_class=self.tokenizer,
        )
        trainer.train()
        return ExpertPackage.from_model(model, owner)

    def run(self, choice: Choice) -> Path:
        """Train both owners' experts, merge them, and measure with and without biases."""
        packages = self.timed(choice.title, lambda: {owner: self.train(choice, owner) for owner in OWNERS})
        merged = self.folder / f"merged-{choice.rows}-{choice.bias}"
        merge_experts(self.public, packages, merged)
        self.measure(choice.title, FlexOlmoForCausalLM.from_pretrained(merged))
        if choice.bias is not None:
            without = merged.with_name(merged.name + "-dropped")
            merge_experts(self.public, packages, without, router_bias=False)
            self.measure(f"{choice.title}, dropped at inference", FlexOlmoForCausalLM.from_pretrained(without))
        return merged

    def tune(self, title: str, merged: Path) -> None:
        """Tune a merged model's router on proxies, chosen among public documents."""
        public = list(read_documents(self.layout.public))
        proxies = {"public": public}
        for owner in OWNERS:
            private = list(read_documents(self.layout.owner_data(owner)))
            chosen = select_proxy(public, private, n=min(60, len(private) // 2), encoder=self._encode())
            proxies[owner] = list(chosen.texts)
        trainer = RouterSFTTrainer(
            model=str(merged),
            args=RouterSFTConfig(
                **{
                    **training_fields(self.folder / "tuned", self.settings, rate=2e-3, epochs=1),
                    "max_steps": 120 if self.settings is STUDY else 4,
                }
            ),
            train_dataset={name: Dataset.from_dict({"text": texts}) for name, texts in proxies.items()},
            processing_class=self.tokenizer,
        )
        self.timed(f"{title}: tuning", trainer.train)
        self.measure(f"{title}, router tuned on proxies", trainer.model)

    def _encode(self) -> Any:
        if self.encoder is not None:
            return self.encoder
        return lambda texts: [[float(text.count(letter)) for letter in "aeiou$\\_(){}=. \n"] for text in texts]


def page(study: Study) -> str:
    """Write the page from what was measured."""
    settings = study.settings
    encoder = "a sentence encoder" if study.encoder else "no encoder, so encoder rows are left out"
    intro = f"""
        A public model of hidden size {settings.hidden} and {settings.layers} layers, trained on
        {settings.wikipedia_bytes / 1e6:.1f} MB of public text, and two experts, each trained alone on
        {settings.owner_bytes / 1e6:.1f} MB of its owner's. Only the start of the owners' routers differs. Held-out bits
        per byte of the merged model with all experts active; lower is better. Written by
        `python -m benchmarks.router_choices` with {encoder}; one seed, so small differences mean nothing."""
    end = "Biases that are dropped at inference were there in training. "
    if any("tuned" in title for title in study.results):
        end += """Tuning sees public documents only: for each owner, `select_proxy` chooses those that look like its
        texts."""
    else:
        end += "What tuning the router brings is measured by [the mini study](../study.md)."
    rows = [
        f"| {title} | {' | '.join(f'{row[name]:.3f}' for name in DOMAINS)} | {sum(row.values()) / len(row):.3f} |"
        for title, row in study.results.items()
    ]
    head = [f"| merged model | {' | '.join(DOMAINS)} | mean |", f"|---|{'---|' * (len(DOMAINS) + 1)}"]
    parts = ["# Where a router starts", _prose(intro), "\n".join([*head, *rows]), _prose(end)]
    return "\n\n".join(parts) + "\n"


def _prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """Read the command line and run the study."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_choices", description=__doc__)
    parser.add_argument("--encoder", help="folder of a sentence-transformers model")
    parser.add_argument("--cache", type=Path, help="where the two packages with public texts are kept")
    parser.add_argument("--smoke", action="store_true", help="the demo's quick sizes and one choice, written nowhere")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        study = Study(Path(scratch), QUICK if given.smoke else STUDY, given.encoder, given.cache)
        study.measure("public model alone", Olmo2ForCausalLM.from_pretrained(study.public))
        best, title = None, ""
        for choice in CHOICES:
            if (choice.rows == "encoder" and given.encoder is None) or (given.smoke and choice.rows == "encoder"):
                continue
            merged = study.run(choice)
            mean = sum(study.results[choice.title].values())
            if best is None or mean < best[0]:
                best, title = (mean, merged), choice.title
            if given.smoke:
                break
        assert best is not None
        study.tune(title, best[1])
        if given.smoke:
            print(page(study))
            return
        (PAGE / "router_choices.json").write_text(json.dumps(study.results, indent=2) + "\n", encoding="utf-8")
        (PAGE / "router_choices.md").write_text(page(study), encoding="utf-8")


if __name__ == "__main__":
    main()
