"""What the study trains: the public model, dense models, experts, mixtures, routers. Each writes one folder, whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Olmo2ForCausalLM

from benchmarks.flexmix_mini.place import Place
from flexolmo_hf import (
    ExpertPackage,
    ExpertSFTConfig,
    ExpertSFTTrainer,
    FlexOlmoForCausalLM,
    RouterSFTConfig,
    RouterSFTTrainer,
    contrast_embedding,
    domain_embedding,
    load_embedding,
    merge_experts,
)
from flexolmo_hf._folder import new_folder
from flexolmo_hf.demo.public_model import new_model
from flexolmo_hf.demo.settings import FULL as DEMO
from flexolmo_hf.demo.tokenizer import train_tokenizer
from flexolmo_hf.evaluation.baselines.ablations import ABLATIONS, Ablation
from flexolmo_hf.evaluation.baselines.btx import build_btx, train_btx
from flexolmo_hf.evaluation.baselines.budgets import compute_matched, data_matched
from flexolmo_hf.evaluation.baselines.dense import train_dense
from flexolmo_hf.evaluation.baselines.no_coordination import build_no_coordination
from flexolmo_hf.evaluation.baselines.soup import average_models
from flexolmo_hf.evaluation.baselines.training import TrainingSettings
from flexolmo_hf.evaluation.baselines.unrestricted_moe import build_unrestricted_moe, train_unrestricted_moe
from flexolmo_hf.evaluation.data.mini import build_mini

PUBLIC = "public"
#: Kinds of router rows: an encoder's, the anchor's hidden states, and what tells an owner's tokens from public ones.
ENCODER, HIDDEN_STATES, CONTRAST = "encoder", "hidden states", "contrast"
#: Whose experts are trained: the method, and what is left out of it.
VARIANTS = {**ABLATIONS, "encoder rows": Ablation(rows="domain", bias=True)}


def _settings(place: Place, *, rate: float, tokens: int, seed: int) -> TrainingSettings:
    sizes = place.settings
    return TrainingSettings(
        rate=rate,
        sequence=sizes.sequence,
        batch=sizes.batch,
        tokens=tokens,
        warmup=0.05,
        seed=seed,
        on_cpu=True,
    )


def public_texts(place: Place) -> list[str]:
    """Return what the public model reads: public text, and a few percent of every domain, as a web crawl holds."""
    corpus = place.corpus
    return corpus.documents(PUBLIC, "train") + [
        text for owner in place.settings.owners for text in corpus.documents(owner, "web")
    ]


def corpus(place: Place, *, cache: str | None) -> dict[str, Any]:
    """Build the texts."""
    sizes = place.settings
    built = build_mini(
        place.corpus_folder,
        domains=(PUBLIC, *sizes.owners),
        budgets=sizes.budgets,
        two_packages=sizes.two_packages,
        # The lock file is of the usual budgets.
        lock=not sizes.two_packages,
        cache_dir=cache,
    )
    return {"domains": built.record["domains"], "tokens": built.record["settings"]["tokens"]}


def tokenizer(place: Place) -> dict[str, Any]:
    """Learn the tokenizer from what the public model reads."""
    sizes = place.settings
    made = train_tokenizer(public_texts(place), vocabulary=sizes.vocabulary, longest=4 * sizes.sequence)
    made.save_pretrained(place.tokenizer)
    return {"vocabulary": len(made)}


def public(place: Place) -> dict[str, Any]:
    """Train the public model from nothing."""
    sizes, reads = place.settings, AutoTokenizer.from_pretrained(place.tokenizer)
    start = place.model("untrained")
    if not start.exists():
        untrained = new_model(reads, DEMO.__class__(**{**vars(DEMO), **_sizes_of_model(place)}))
        with new_folder(start) as partial:
            untrained.save_pretrained(partial)
            reads.save_pretrained(partial)
    training = _settings(place, rate=sizes.public_rate, tokens=sizes.public_tokens, seed=0)
    train_dense(start, public_texts(place), place.model(PUBLIC), training)
    return {"tokens": sizes.public_tokens, "parameters": _parameters(place.model(PUBLIC))}


def _sizes_of_model(place: Place) -> dict[str, Any]:
    sizes = place.settings
    names = ("vocabulary", "hidden", "intermediate", "layers", "heads")
    return {name: getattr(sizes, name) for name in names} | {"sequence": 2 * sizes.sequence, "seed": 0}


def _parameters(folder: Path) -> int:
    model = FlexOlmoForCausalLM if (folder / "config.json").read_text().find('"flex_olmo"') > 0 else Olmo2ForCausalLM
    return sum(parameter.numel() for parameter in model.from_pretrained(folder).parameters())


def rows(place: Place, *, kind: str, encoder: str | None = None) -> dict[str, Any]:
    """Make the router rows of one kind: each owner from its own texts, and everyone from the public ones."""
    sizes = place.settings
    anchor = Olmo2ForCausalLM.from_pretrained(place.model(PUBLIC))
    of_anchor = {"model": anchor, "tokenizer": AutoTokenizer.from_pretrained(place.tokenizer)}
    public_texts = place.corpus.documents(PUBLIC, "train")
    folder = _rows_folder(place, kind)
    folder.mkdir(parents=True, exist_ok=True)
    for domain in (PUBLIC, *sizes.owners):
        file, texts = folder / f"{domain}.safetensors", place.corpus.documents(domain, "train")
        if file.exists() or (kind == CONTRAST and domain == PUBLIC):
            continue
        if kind == CONTRAST:
            row = contrast_embedding(texts, public_texts, sample=sizes.embedded, **of_anchor)
        elif kind == ENCODER:
            named = {"encoder": encoder, "encoder_name": "all-MiniLM-L6-v2", "hidden_size": sizes.hidden}
            row = domain_embedding(texts, sample=sizes.embedded, **named)
        else:
            row = domain_embedding(texts, encoder="self", per_layer=True, sample=sizes.embedded, **of_anchor)
        row.save(file)
    return {"kind": kind}


def _rows_folder(place: Place, kind: str) -> Path:
    return place.model(f"rows-{kind.replace(' ', '-')}")


def _rows(place: Place, kind: str, names: list[str]) -> dict[str, Any]:
    """Read rows; the public one of contrast rows is zero."""
    folder, sizes = _rows_folder(place, kind), place.settings
    neutral = torch.zeros(sizes.layers, sizes.hidden)
    files = {name: folder / f"{name}.safetensors" for name in names}
    return {name: load_embedding(file) if file.exists() else neutral for name, file in files.items()}


def dense(place: Place, *, owner: str, seed: int, trains: str = "everything", into: str = "dense") -> dict[str, Any]:
    """Continue the public model on one owner's texts, nothing frozen unless `trains` says so."""
    sizes = place.settings
    training = _settings(place, rate=sizes.levers.dense_rate, tokens=sizes.owner_tokens, seed=seed)
    texts, folder = place.corpus.documents(owner, "train"), place.model(f"{into}-{owner}-{seed}")
    train_dense(place.model(PUBLIC), texts, folder, training, trains=trains)
    return {"tokens": sizes.owner_tokens}


def expert(place: Place, *, owner: str, seed: int, variant: str) -> dict[str, Any]:
    """Train one owner's expert beside the frozen public one, as any owner does, and pack it."""
    sizes, levers = place.settings, place.settings.levers
    chosen = VARIANTS[variant]
    arguments = _start(place, owner, chosen, seed)
    model = FlexOlmoForCausalLM.from_dense(place.model(PUBLIC), **arguments)
    training = _settings(place, rate=levers.expert_rate, tokens=sizes.owner_tokens, seed=seed)
    trainer = ExpertSFTTrainer(
        model=model,
        args=ExpertSFTConfig(
            expert=owner,
            router_lr_scale=levers.router_scale,
            **training.as_fields(place.root / "runs" / f"{variant}-{owner}-{seed}"),
        ),
        train_dataset=Dataset.from_dict({"text": place.corpus.documents(owner, "train")}),
        processing_class=AutoTokenizer.from_pretrained(place.tokenizer),
    )
    trainer.train()
    ExpertPackage.from_model(model, owner).save_pretrained(place.model(f"expert-{variant}-{owner}-{seed}"))
    return {"tokens": sizes.owner_tokens}


def _start(place: Place, owner: str, variant: Ablation, seed: int) -> dict[str, Any]:
    sizes, names = place.settings, [PUBLIC, owner]
    kinds = {} if variant.rows == "random" else {variant.rows: _rows(place, _kind(place, variant), names)}
    return variant.from_dense_arguments(
        owner, kinds, hidden_size=sizes.hidden, seed=seed, bias_start=sizes.levers.bias_start
    )


def _kind(place: Place, variant: Ablation) -> str:
    """Return which rows a variant starts from; the method's own are a lever."""
    if variant is VARIANTS["encoder rows"]:
        return ENCODER
    return place.settings.levers.rows if variant.rows == "domain" else variant.rows


def merge(place: Place, *, owners: list[str], seed: int, variant: str, into: str, bias: bool | None = None) -> dict:
    """Put the owners' packages side by side."""
    packages = {owner: place.model(f"expert-{variant}-{owner}-{seed}") for owner in owners}
    merge_experts(place.model(PUBLIC), packages, place.model(into), router_bias=bias)
    return {"parameters": _parameters(place.model(into))}


def tune(
    place: Place, *, merged: str, owners: list[str], seed: int, into: str, on_private: bool = False
) -> dict[str, Any]:
    """Tune the merged model's router on public text and on the owners' proxies.

    With `on_private` the owners' own texts take the proxies' place, which the method forbids: a bound for any proxies.
    """
    levers = place.settings.levers
    texts = {PUBLIC: place.corpus.documents(PUBLIC, "train")}
    for owner in owners:
        private = place.corpus.documents(owner, "train") if on_private else None
        texts[owner] = place.result("proxies")[owner]["texts"] if private is None else private
    training = _settings(place, rate=levers.tuning_rate, tokens=levers.tuning_tokens, seed=seed)
    model = FlexOlmoForCausalLM.from_pretrained(place.model(merged))
    trainer = RouterSFTTrainer(
        model=model,
        args=RouterSFTConfig(**training.as_fields(place.root / "runs" / into)),
        train_dataset={name: Dataset.from_dict({"text": documents}) for name, documents in texts.items()},
        processing_class=AutoTokenizer.from_pretrained(place.tokenizer),
    )
    trainer.train()
    model.save_pretrained(place.model(into))
    return {"tokens": levers.tuning_tokens}


def soup(place: Place, *, owners: list[str], seed: int, into: str) -> dict[str, Any]:
    """Average the weights of the public model and all dense ones."""
    average_models([place.model(PUBLIC), *_dense_folders(place, owners, seed).values()], place.model(into))
    return {"parameters": _parameters(place.model(into))}


def no_coordination(place: Place, *, owners: list[str], seed: int, into: str) -> dict[str, Any]:
    """Plug the dense models' feed-forward networks into the public model."""
    rows_of = _rows(place, place.settings.levers.rows, [PUBLIC, *owners])
    build_no_coordination(
        place.model(PUBLIC), _dense_folders(place, owners, seed), place.model(into), router_embeddings=rows_of
    )
    return {"parameters": _parameters(place.model(into))}


def btx(place: Place, *, owners: list[str], seed: int, into: str) -> dict[str, Any]:
    """Mix the dense models, and train the mixture on public text for as long as a router is tuned."""
    levers = place.settings.levers
    start = place.model(f"{into}-start")
    if not start.exists():
        build_btx(place.model(PUBLIC), _dense_folders(place, owners, seed), start, seed=seed)
    training = _settings(place, rate=levers.joint_rate, tokens=levers.tuning_tokens, seed=seed)
    reads = AutoTokenizer.from_pretrained(place.tokenizer)
    train_btx(start, public_texts(place), place.model(into), training, tokenizer=reads)
    return {"tokens": levers.tuning_tokens, "parameters": _parameters(place.model(into))}


def moe(place: Place, *, owners: list[str], seed: int, matched: str, into: str) -> dict[str, Any]:
    """Train a mixture on everybody's text together, which FlexOlmo does not need."""
    sizes, levers = place.settings, place.settings.levers
    start = place.model(f"{into}-start")
    if not start.exists():
        build_unrestricted_moe(place.model(PUBLIC), owners, start, seed=seed)
    seen = dict.fromkeys(owners, sizes.owner_tokens)
    if matched == "compute":
        config = Olmo2ForCausalLM.config_class.from_pretrained(place.model(PUBLIC))
        tokens = compute_matched(config, seen, sequence=sizes.sequence, router_tokens=levers.tuning_tokens)
    else:
        tokens = data_matched(seen, router_tokens=levers.tuning_tokens)
    reads = AutoTokenizer.from_pretrained(place.tokenizer)
    # As much of each owner as its expert sees, and of public text as router tuning shows FlexOlmo, mixed.
    parts = {PUBLIC: levers.tuning_tokens} | seen
    texts = [text for name, share in parts.items() for text in _beginning(place, name, reads, share)]
    training = _settings(place, rate=levers.joint_rate, tokens=tokens, seed=seed)
    train_unrestricted_moe(start, texts, place.model(into), training, tokenizer=reads)
    return {"tokens": tokens, "parameters": _parameters(place.model(into))}


def _beginning(place: Place, name: str, reads: Any, tokens: int) -> Iterator[str]:
    """Give a domain's training texts until they have so many tokens."""
    for text in place.corpus.documents(name, "train"):
        if tokens <= 0:
            return
        tokens -= len(reads(text, add_special_tokens=False, verbose=False)["input_ids"])
        yield text


def _dense_folders(place: Place, owners: list[str], seed: int) -> dict[str, Path]:
    return {owner: place.model(f"dense-{owner}-{seed}") for owner in owners}
