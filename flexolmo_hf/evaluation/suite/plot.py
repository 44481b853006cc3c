"""Results as a figure: bars for the categories or, where there is only one, for its tasks."""

from pathlib import Path
from typing import Any

from flexolmo_hf.evaluation.figures import COLOURS, HATCHES, figure, save
from flexolmo_hf.evaluation.suite.results import PLAIN_METRICS, Mean, SetResult, SuiteResult, rows_of

# Value and standard error.
Bar = tuple[float | None, float | None]


def plot_results(result: SuiteResult, path: str | Path) -> Path:
    """Draw a panel for each variant, with a group of bars for each category or task and a bar for each set of experts.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    bars = {variant: _bars(result.sets, variant) for variant in result.variants}
    height = sum(0.8 + 0.22 * len(heights) * (len(result.sets) + 1) for heights in bars.values())
    with figure(6.5, max(2.2, height), nrows=len(bars), squeeze=False) as (drawn, axes):
        for axis, (variant, heights) in zip(axes[:, 0], bars.items(), strict=True):
            _draw(axis, heights, result.sets, plain=_is_plain(result, variant))
            axis.set_title(result.model if len(bars) == 1 else f"{result.model}, {variant}")
        if len(result.sets) > 1:
            drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return save(drawn, path)


def _bars(sets: tuple[SetResult, ...], variant: str) -> dict[str, list[Bar]]:
    """Give value and standard error for each name and set."""
    means = [one.category_means(variant) for one in sets]
    names = list(dict.fromkeys(name for one in means for name in one))
    rows = rows_of(sets, variant)
    if len(names) > 1:
        found: dict[str, list[Bar]] = {
            _labelled(name, means): [(one[name].value if name in one else None, None) for one in means]
            for name in names
        }
        averages = [one.average(variant) for one in sets]
        average: list[Bar] = [(None if one is None else one.value, None) for one in averages]
        return found | ({"average": average} if any(averages) else {})
    # A task may have several metrics, as offline tasks with bits per byte have.
    several = len({task for task, _ in rows}) < len(rows)
    return {
        f"{task}, {metric}" if several else task: [(None, None) if r is None else (r.value, r.stderr) for r in results]
        for (task, metric), results in rows.items()
    }


def _labelled(category: str, means: list[dict[str, Mean]]) -> str:
    """Say of how many tasks a category's mean is, unless it is of all of them with every set."""
    found = [one[category] for one in means if category in one]
    fewest = min(mean.of for mean in found)
    return category if fewest == found[0].out_of else f"{category} ({fewest} of {found[0].out_of})"


def _is_plain(result: SuiteResult, variant: str) -> bool:
    return all(task.metric in PLAIN_METRICS for task in result if task.variant == variant)


def _draw(axis: Any, heights: dict[str, list[Bar]], sets: Any, *, plain: bool) -> None:
    thick = 0.8 / len(sets)
    scale = 1 if plain else 100
    for number, one in enumerate(sets):
        places = [row + thick * (number - (len(sets) - 1) / 2) for row in range(len(heights))]
        values = [(row[number][0] or 0) * scale for row in heights.values()]
        errors = [(row[number][1] or 0) * scale for row in heights.values()]
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "hatch": HATCHES[number % len(HATCHES)]}
        # White lines between bars of one colour would vanish in the hatches.
        axis.barh(places, values, thick * 0.92, label=one.experts, edgecolor="white", **look)
        for place, value, error, row in zip(places, values, errors, heights.values(), strict=True):
            if error:
                axis.errorbar(value, place, xerr=error, color="black", linewidth=0.8, capsize=2)
            text = "none" if row[number][0] is None else f"{value:.2f}" if plain else f"{value:.1f}"
            axis.annotate(text, (value + error, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(range(len(heights)), list(heights))
    # The first stands at the top.
    axis.set_ylim(len(heights) - 0.4, -0.6)
    axis.set_xlabel("bits per byte (lower is better)" if plain else "score out of 100")
    highest = max((row[n][0] or 0) + (row[n][1] or 0) for row in heights.values() for n in range(len(sets)))
    axis.set_xlim(0, 1.12 * highest + 0.01 if plain else 105)
