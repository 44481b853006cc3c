"""The page of the study, written from its results; no figure is typed by hand."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.flexmix_mini.claims import Claim, by_experts, claims, opt_out_of
from benchmarks.flexmix_mini.cost import cost_table, costs, hours
from benchmarks.flexmix_mini.levers import MEASURED, tried
from benchmarks.flexmix_mini.measuring import PUBLIC
from benchmarks.flexmix_mini.place import Place
from benchmarks.flexmix_mini.plots import draw_all
from benchmarks.flexmix_mini.reading import READING
from benchmarks.flexmix_mini.tables import METHODS, Row, Scores, rows_of, scores_of
from flexolmo_hf.evaluation.bits_per_byte import together
from flexolmo_hf.evaluation.intervals import bootstrap
from flexolmo_hf.evaluation.optout.matrix import OptOutMatrix

# Steps whose results are kept beside the page as they are: small, and without text.
_IN_NUMBERS = ("ladder-", "lever-", "btm-settings", "prompt-choices", "routing-", "tasks-")
# Without these, a seed's table says nothing.
_NEEDED = {PUBLIC, "FlexOlmo", "router tuning", "BTM top-2"}


def write_page(place: Place, page: Path, figures: Path, missing: Sequence[str] = ()) -> None:
    """Write the page, its figures, and the figures' numbers as JSON.

    Args:
        place: The study. Tables 1 and 2 of its first seed, opting out and routing have to be done.
        page: Markdown file.
        figures: Folder for the images and ``results.json``.
        missing: Names of steps that were not done, which the page lists.
    """
    by_seed = [found for seed in place.settings.seeds if (found := scores_of(place, "t1", seed)).keys() >= _NEEDED]
    table_2 = scores_of(place, "t2", place.settings.seeds[0])
    rows_1, rows_2 = rows_of(by_seed), rows_of([table_2])
    draw_all(place, figures, rows_1, rows_2)
    checked = claims(place, by_seed, table_2)
    _write_numbers(place, figures / "results.json", by_seed, table_2, checked)
    link = figures.name
    parts = [
        "# The mini study",
        _prose(_introduction(place)),
        *_not_done(missing),
        "## Four experts, as in the paper's table 1",
        _prose(_about(place, rows_1)),
        _table(rows_1, 0),
        "## All experts, as in table 2",
        _table(rows_2, 1),
        f"![Bits per byte by method]({link}/methods.png)",
        "## The paper's claims, and the study's goals",
        _claims(checked),
        "## Reading",
        READING.strip(),
        "## Where it is lost",
        _ladder(place),
        "## Opting out",
        f"![Leave-one-out]({link}/optout.png)",
        f"Bits per byte and change of every cell, with their intervals, are in [results.json]({link}/results.json).",
        "## Routing",
        f"![Routing shares]({link}/routing.png)",
        *_experts(place, link),
        *_ensemble(place),
        *_trials(place),
        *_choices(place),
        *_tasks(place),
        "## What it cost",
        *_cost(place),
        "## How sure",
        _prose(_sureness(table_2)),
    ]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf8")


def _not_done(missing: Sequence[str]) -> list[str]:
    if not missing:
        return []
    rows = [name.removeprefix("score-") for name in missing if name.startswith("score-")]
    about = f"""**Not finished.** {len(missing)} steps were not done when this page was written; running the study again
        goes on from there. Missing, by table, seed and method: {", ".join(rows)}; further steps: {_others(missing)}."""
    return [_prose(about)]


def _others(missing: Sequence[str]) -> str:
    told = ("lever-", "tasks-", "btm-settings")
    return ", ".join(name for name in missing if name.startswith(told)) or "none"


def _introduction(place: Place) -> str:
    sizes = place.settings
    parameters = place.result(PUBLIC)["parameters"]
    return f"""
        FlexOlmo, its ablations and every baseline of the paper ([arXiv 2507.07024](https://arxiv.org/abs/2507.07024)),
        at a size that a CPU trains: `make study`. The text is [FlexMix-mini](evaluation/data.md). The public model is
        an OLMo-2 of {parameters / 1e6:.2f} M parameters ({sizes.layers} layers, hidden {sizes.hidden}, feed-forward
        {sizes.intermediate}, vocabulary {sizes.vocabulary}), trained on {sizes.public_tokens / 1e6:.1f} M tokens of
        public text with a few percent of every domain, in documents that the owners do not have. Every owner trains
        once on {sizes.owner_tokens / 1e6:.1f} M tokens, an expert beside the frozen public one, or a dense model. All
        figures are held-out bits per byte on test documents; lower is better. This page was written by the program."""


def _about(place: Place, rows: Sequence[Row]) -> str:
    seeds = max(row.seeds for row in rows)
    fewer = ", ".join(f"{row.label} {row.seeds}" for row in rows if row.seeds < seeds)
    return f"""Owners: {", ".join(place.settings.table_1)}. Mean and standard deviation over
        {seeds} seeds{f" (so far fewer: {fewer})" if fewer else ""}; the public model is the same for all. The last
        column is the paper's average over its tasks."""


def _table(rows: Sequence[Row], paper: int) -> str:
    columns = list(rows[0].values)
    shown = [name for name in columns if name not in ("domains", "mixed", "all")]
    shown += [name for name in ("domains", "mixed", "all") if name in columns]
    titles = {"domains": "mean of domains", "mixed": "mean of mixed", "all": "mean of all"}
    best = {name: min(row.values[name] for row in rows if name in row.values) for name in shown}
    lines = [
        f"| | {' | '.join(titles.get(name, name) for name in shown)} | paper |",
        f"|---|{'---|' * (len(shown) + 1)}",
    ]
    for row in rows:
        cells = [_cell(row, name, best[name]) for name in shown]
        said = METHODS.get(row.label, (None, None))[paper]
        lines.append(f"| {row.label} | {' | '.join(cells)} | {'' if said is None else said} |")
    return "\n".join(lines)


def _cell(row: Row, name: str, best: float) -> str:
    value = f"{row.values[name]:.3f}"
    if row.values[name] == best:
        value = f"**{value}**"
    return value + (f" ± {row.deviation[name]:.3f}" if row.seeds > 1 and name in ("domains", "mixed", "all") else "")


def _claims(checked: Sequence[Claim]) -> str:
    about = """A comparison's interval is of 95% over documents, paired, of their means over the seeds that have both;
        what it does not tell apart from nothing, or is nearer than two deviations between seeds, of either or of
        FlexOlmo, is called too close to tell."""
    lines = ["| claim | domains | mixed documents | figures (bits per byte) |", "|---|---|---|---|"]
    said = {True: "holds", False: "**does not hold**", None: "too close to tell", "": ""}
    lines += [f"| {c.text} | {said[c.holds]} | {said[c.mixed]} | {c.figures} |" for c in checked]
    return _prose(about) + "\n\n" + "\n".join(lines)


def _ladder(place: Place) -> str:
    found = {owner: place.result(f"ladder-{owner}") for owner in place.settings.table_1}
    about = """An owner's own domain, from the public model to its dense model and from there down to the merged one.
        The feed-forward row moves what an expert moves, with nothing beside it. Nobody may tune on the owners' own
        text; that row bounds what better proxies could give."""
    lines = [f"| | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for rung in next(iter(found.values())):
        lines.append(f"| {rung} | {' | '.join(f'{row[rung]:.3f}' for row in found.values())} |")
    steps = (
        (
            "freezing all but the feed-forward networks costs",
            "dense, feed-forward networks trained",
            "dense, everything trained",
        ),
        ("a frozen model beside the expert costs", "expert beside public", "dense, feed-forward networks trained"),
        ("the other owners' experts cost", "merged, all experts", "expert beside public"),
        ("router tuning gives back", "router tuned, all experts", "merged, all experts"),
    )
    for said, after, before in steps:
        lines.append(f"| {said} | {' | '.join(f'{row[after] - row[before]:+.3f}' for row in found.values())} |")
    return _prose(about) + "\n\n" + "\n".join(lines)


def _experts(place: Place, link: str) -> list[str]:
    table = by_experts(place)
    # The row of router tuning, which uses all experts, is always there; by itself it compares nothing.
    if len(table) < 2:
        return []
    used, averages = [str(used) for used, _ in table], [f"{average:.3f}" for _, average in table]
    lines = [f"| experts per token | {' | '.join(used)} |", f"|---|{'---|' * len(used)}"]
    lines.append(f"| mean of domains | {' | '.join(averages)} |")
    return ["## Experts per token", f"![Experts per token]({link}/experts.png)", "\n".join(lines)]


def _ensemble(place: Place) -> list[str]:
    if not place.is_done("btm-settings"):
        return []
    found = place.result("btm-settings")
    lines = ["| BTM's weights | mean on validation text |", "|---|---|"]
    lines += [f"| {label} | {sum(row.values()) / len(row):.4f} |" for label, row in found.items()]
    return ["## Choosing BTM's settings", "\n".join(lines)]


def _trials(place: Place) -> list[str]:
    done = [label for label in tried(place.settings.levers) if place.is_done(f"lever-{label}")]
    if not done:
        return []
    about = """Each row changes one choice of the study, for two owners on half the tokens; test text was never
        looked at for it. Mean bits per byte over domains and mixed documents of validation text."""
    lines = [f"| choice | {' | '.join(MEASURED)} |", f"|---|{'---|' * len(MEASURED)}"]
    for label in done:
        found = place.result(f"lever-{label}")
        means = [f"{sum(found[name].values()) / len(found[name]):.4f}" for name in MEASURED]
        lines.append(f"| {label} | {' | '.join(means)} |")
    return ["## What was tried on validation text", _prose(about), "\n".join(lines)]


def _choices(place: Place) -> list[str]:
    if not place.is_done("prompt-choices"):
        return []
    found = place.result("prompt-choices")
    domains = list(next(iter(found.values())))
    about = """How often the chat model chooses the right expert, of the first texts of each domain, by their beginning.
        While a text is scored its first 64 tokens are the question, and the public model scores these; the weighted
        soup settles its weights on as many, which the plain soup scores."""
    lines = [f"| how it decides | {' | '.join(domains)} |", f"|---|{'---|' * len(domains)}"]
    for way, counted in found.items():
        cells = [f"{row.get(domain, 0)} of {sum(row.values())}" for domain, row in counted.items()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return ["## What prompt routing chooses", _prose(about), "\n".join(lines)]


def _tasks(place: Place) -> list[str]:
    found = {
        file.stem.removeprefix("tasks-"): json.loads(file.read_text("utf8"))["found"]
        for file in sorted((place.root / "results").glob("tasks-*.json"))
    }
    if not found:
        return []
    found = {label: found[label] for label in METHODS if label in found}
    tasks = list(next(iter(found.values())))
    lines = [f"| task | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for task in tasks:
        cells = [f"{row[task][0]:.3f} ± {row[task][1]:.3f}" for row in found.values()]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    about = f"""
        Bits per byte of the right answers, {place.settings.questions} questions each, with the standard error. The
        public text holds none of the questions. HellaSwag's come from where the owner howto's texts do, and MATH's from
        where the owner math's do."""
    return ["## Benchmarks", _prose(about), "\n".join(lines)]


def _cost(place: Place) -> list[str]:
    about = """Training is that of all owners together, beyond the public model, whose own is in its row; times are of
        one core, measured with another step on the other. Reading is that of the public test texts, once, without a
        cache; variants of a method run as it does. The chat model of prompt routing is not in its row."""
    whole = f"All steps together took {hours(place):.1f} hours of one core."
    return [_prose(about), "Four experts:", cost_table(place, "t1"), "All experts:", cost_table(place, "t2"), whole]


def _sureness(scores: dict[str, Scores]) -> str:
    said = []
    for label in (PUBLIC, "BTM top-2", "router tuning"):
        documents = [document for texts in scores[label].documents.values() for document in texts]
        interval = bootstrap(documents)
        said.append(f"{label} {float(together(documents)):.3f} ({interval.low:.3f} to {interval.high:.3f})")
    return f"""Over all test documents together, with 95% intervals from a bootstrap over documents: {"; ".join(said)}.
        Comparisons of methods on the same documents are paired and surer than these intervals look."""


def _write_numbers(
    place: Place, file: Path, by_seed: Sequence[dict[str, Scores]], table_2: dict[str, Scores], checked: Sequence[Claim]
) -> None:
    def numbers(scores: dict[str, Scores]) -> dict[str, dict[str, list[float]]]:
        return {
            label: {name: [round(found.bits(name), 5), *_ends(found, name)] for name in found.documents}
            for label, found in scores.items()
        }

    whole = {
        "settings": _plain(place),
        "table 1": {str(seed): numbers(found) for seed, found in zip(place.settings.seeds, by_seed, strict=False)},
        "table 2": numbers(table_2),
        "opt-out": _opt_out_numbers(opt_out_of(place)),
        "claims": [
            {
                "claim": claim.text,
                "holds": claim.holds,
                "mixed": None if claim.mixed == "" else claim.mixed,
                "figures": claim.figures,
            }
            for claim in checked
        ],
        "costs": {table: [vars(cost) for cost in costs(place, table)] for table in ("t1", "t2")},
        "steps": {
            file.stem: json.loads(file.read_text("utf8"))["found"]
            for file in sorted((place.root / "results").glob("*.json"))
            if file.stem.startswith(_IN_NUMBERS)
        },
    }
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf8")


def _opt_out_numbers(matrix: OptOutMatrix) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return the whole matrix: each cell, and how far it is from that of all experts, as value, low and high."""

    def of_cell(label: str, data: str) -> dict[str, list[float]]:
        cell, change = matrix.interval(label, data), matrix.change(label, data)
        whole = {
            "bits per byte": (matrix.bits(label, data), cell.low, cell.high),
            "change": (change.value, change.interval.low, change.interval.high),
        }
        return {what: [round(float(value), 5) for value in values] for what, values in whole.items()}

    return {label: {data: of_cell(label, data) for data in matrix.data} for label in matrix.sets}


def _ends(found: Scores, name: str) -> list[float]:
    interval = bootstrap(found.documents[name])
    return [round(interval.low, 5), round(interval.high, 5)]


def _plain(place: Place) -> dict:
    settings = dict(vars(place.settings))
    return settings | {"budgets": vars(settings["budgets"]), "levers": vars(settings["levers"])}


def _prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)
