"""What the method leaves open, tried on validation text: each choice in turn, for two owners on half the tokens."""

import os
from dataclasses import replace
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.flexmix_mini import training
from benchmarks.flexmix_mini.measuring import texts_of
from benchmarks.flexmix_mini.place import Place
from benchmarks.flexmix_mini.settings import Levers
from flexolmo_hf.evaluation.bits_per_byte import bits_per_byte

#: What is measured of each choice: a model, and how it is used.
MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    "merged": ("merged", {}),
    "router tuned": ("tuned", {}),
    "router tuned, two experts per token": ("tuned", {"num_experts_per_tok": 2}),
}
OWNERS = ("math", "code")
METHOD = "FlexOlmo"


def tried(levers: Levers) -> dict[str, dict[str, Any]]:
    """Return the choices that are tried, as changes of the study's own; the first is what it uses."""
    return {
        "as chosen": {},
        "experts learn slower": {"expert_rate": 2e-3},
        "hidden-state rows": {"rows": "hidden states"},
        "the router learns as fast as its expert": {"router_scale": 1.0},
        "biases start at 0": {"bias_start": 0.0},
        "biases start at -2": {"bias_start": -2.0},
        "router tuning on half the tokens": {"tuning_tokens": levers.tuning_tokens // 2},
        "router tuning on four times the tokens": {"tuning_tokens": 4 * levers.tuning_tokens},
        "router tuning at half the rate": {"tuning_rate": levers.tuning_rate / 2},
    }


def try_levers(place: Place, *, changes: dict[str, Any], folder: str) -> dict[str, dict[str, float]]:
    """Train two owners' experts with other settings, merge them, tune the router, and measure on validation text.

    Args:
        place: The study.
        changes: Of `Levers`.
        folder: Name of the place for what is trained.

    Returns:
        Bits per byte by domain, of each of `MEASURED`.
    """
    sizes = place.settings
    levers = replace(sizes.levers, **changes)
    apart = Place(place.root / "levers" / folder, replace(sizes, levers=levers, owner_tokens=sizes.owner_tokens // 2))
    _share(place, apart)
    owners = [owner for owner in OWNERS if owner in sizes.owners]
    for owner in owners:
        if not apart.model(f"expert-{METHOD}-{owner}-0").exists():
            training.expert(apart, owner=owner, seed=0, variant=METHOD)
    made = {"owners": owners, "seed": 0}
    if not apart.model("merged").exists():
        training.merge(apart, **made, variant=METHOD, into="merged")
    if not apart.model("tuned").exists():
        training.tune(apart, **made, merged="merged", into="tuned")
    texts = texts_of(place, "validation", owners)
    reads = AutoTokenizer.from_pretrained(place.tokenizer)
    found = {}
    for name, (folder_of, settings) in MEASURED.items():
        model = AutoModelForCausalLM.from_pretrained(apart.model(folder_of), **settings).eval()
        found[name] = {
            domain: float(bits_per_byte(model, reads, some, max_length=sizes.sequence, batch_size=16))
            for domain, some in texts.items()
        }
    return found


def _share(place: Place, apart: Place) -> None:
    """Let the trial see the study's texts, anchor, rows and proxies."""
    shared = [place.corpus_folder, place.tokenizer, place.file("proxies")]
    shared += [place.model("public"), *sorted((place.root / "models").glob("rows-*"))]
    for path in shared:
        link = apart.root / path.relative_to(place.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            os.symlink(path.resolve(), link)
