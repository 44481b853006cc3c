"""Results as a Markdown table: a column for each set of experts, a row for each task, category and the average."""

from collections.abc import Iterator

from flexolmo_hf.evaluation.suite.categories import CATEGORIES, category_of
from flexolmo_hf.evaluation.suite.results import (
    PLAIN_METRICS,
    Mean,
    SetResult,
    SuiteResult,
    TaskResult,
    rows_of,
)


def markdown(result: SuiteResult) -> str:
    """Write results as a page: what was measured, a table for each variant, and the fingerprints."""
    parts = [f"# {result.model}", "", *_settings(result), ""]
    for variant in result.variants:
        parts += [*([f"## {variant}", ""] if len(result.variants) > 1 else []), *_table(result.sets, variant), ""]
    parts += ["± is one standard error. Scores are out of 100; bits per byte are better when lower.", ""]
    parts += _fingerprints(result)
    return "\n".join(parts) + "\n"


def _table(sets: tuple[SetResult, ...], variant: str) -> Iterator[str]:
    rows = rows_of(sets, variant)
    yield f"| task | metric | {' | '.join(one.experts for one in sets)} |"
    yield f"|---|---|{'---:|' * len(sets)}"
    for category in [*(one.name for one in CATEGORIES), "own"]:
        own = {key: results for key, results in rows.items() if category_of(key[0]) == category}
        for (task, metric), results in own.items():
            yield f"| {task} | {metric} | {' | '.join(_cell(one) for one in results)} |"
        means = [one.category_means(variant).get(category) for one in sets]
        # The mean of a category of one task is that task.
        if any(mean is not None and mean.out_of > 1 for mean in means):
            yield _mean_row(f"{category}, mean", means, [metric for _, metric in own], "tasks")
    averages = [one.average(variant) for one in sets]
    if any(averages):
        yield _mean_row("average", averages, [metric for _, metric in rows], "categories")


def _cell(result: TaskResult | None) -> str:
    if result is None:
        return ""
    return result.shown + (f" ({result.failed} failed)" if result.failed and result.value is not None else "")


def _mean_row(title: str, means: list[Mean | None], metrics: list[str], of_what: str) -> str:
    plain = any(metric in PLAIN_METRICS for metric in metrics)
    scale, digits = (1, 3) if plain else (100, 1)
    cells = ["" if mean is None else f"**{mean.value * scale:.{digits}f}**" for mean in means]
    counts = {(mean.of, mean.out_of) for mean in means if mean is not None}
    # Sets may differ in which tasks failed; then each cell says its own.
    if len(counts) > 1:
        cells = [cell if mean is None else f"{cell} of {mean.of}" for cell, mean in zip(cells, means, strict=True)]
        count = f"of {next(iter(counts))[1]} {of_what}"
    else:
        of, out_of = next(iter(counts))
        count = f"{of} of {out_of} {of_what}"
    return f"| **{title}** | {count} | {' | '.join(cells)} |"


def _settings(result: SuiteResult) -> Iterator[str]:
    shown = {"type": result.model_type, **{key: value for key, value in result.settings.items() if value is not None}}
    yield "; ".join(f"{key} {value}" for key, value in shown.items() if not isinstance(value, dict)) + "."


def _fingerprints(result: SuiteResult) -> Iterator[str]:
    yield "| | fingerprint | seconds |"
    yield "|---|---|---:|"
    yield f"| model | `{result.fingerprint[:32]}` | |"
    for one in result.sets:
        names = f" ({'+'.join(one.names)})" if one.names and "+".join(one.names) != one.experts else ""
        yield f"| {one.experts}{names} | `{one.fingerprint[:32]}` | {one.seconds:.1f} |"
