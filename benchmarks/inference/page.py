"""The page: what was measured, how, and the figures."""

import textwrap
from collections.abc import Iterable
from typing import Any

from benchmarks.inference.goals import case_title, expected_part, goals, part_of_files, read_fraction

GROWTH = {"experts": "experts", "prompt": "prompt tokens", "hidden": "hidden size"}


def page(results: dict[str, Any]) -> str:
    """Write the page in Markdown."""
    parts = [_introduction(results), _goals(results), _speed(results), _memory(results), _sets(results)]
    return "\n\n".join([*parts, _growth(results), f"Versions: {results['versions']}."]) + "\n"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prose(text: str) -> str:
    """Break the lines anew, now that the figures are in them; headings and paragraphs stand apart already."""
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(textwrap.fill(paragraph, 118, break_on_hyphens=False) for paragraph in paragraphs)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.2g}"


def _introduction(results: dict[str, Any]) -> str:
    settings, weights = results["settings"], results["weights"]
    main = settings["main"]
    return _prose(f"""# Inference

A random model of {main["experts"]} experts, hidden size {main["hidden"]}, feed-forward width {main["inner"]} and
{main["layers"]} layers, {_megabytes(weights["total"])} MB in fp32, on {results["threads"]} threads of a CPU. Written by
`make bench-inference`; `inference.json` beside this page holds every run.

Stock is `transformers.FlexOlmoForCausalLM` on the same checkpoint. It has three ways to run its experts (`eager`,
`grouped_mm`, `batched_mm`); each case names the best of them, and that one counts. Ours is `FlexOlmoForCausalLM` as it
comes. Before their speed is compared, both have to give the same logits.

Stock and ours live in a process each, and a third process tells them in turns to run a case once, so that a machine
whose speed drifts is as fast for one as for the other. The number of timed runs is {settings["rounds"]}, at
most 5 for loading and 3 for growth, and their median counts; {settings["warm_ups"]} before them warm up.
Decoding is greedy, by hand: {settings["new_tokens"]} times forward and argmax after a prompt of {settings["prompt"]}
tokens, which is not timed; so what `generate` adds is not in it. Weights are read from a warm file
cache.""")


def _goals(results: dict[str, Any]) -> str:
    found = goals(results)
    missed = sum(not goal.met for goal in found)
    verdict = "All goals are met." if not missed else f"{missed} of {len(found)} goals are missed."
    table = _table(
        ["", "measured", "goal", "met"],
        ([goal.title, goal.figure, goal.goal, "yes" if goal.met else "**no**"] for goal in found),
    )
    return f"## Goals\n\n{verdict}\n\n{table}"


def _speed(results: dict[str, Any]) -> str:
    rows = []
    for entry in results["speed"]:
        case = entry["case"]
        per_second = case["batch"] * case["tokens"] if case["do"] == "prefill" else case["batch"]
        rows.append(
            [
                case_title(entry, results["weights"]["experts"]),
                *(f"{entry[who] * 1000:.3g}" for who in ("ours", "stock")),
                *(f"{per_second / entry[who]:,.1f}" for who in ("ours", "stock")),
                entry["stock_best"],
                f"{entry['stock'] / entry['ours']:.2f}x",
                f"{entry['limit'] * 1000:.3g}",
            ]
        )
    head = ["", "ours (ms)", "stock (ms)", "ours (tokens/s)", "stock (tokens/s)", "stock's best", "stock / ours"]
    prose = _prose("""
Milliseconds are for the whole prefill, or for one step of decoding. The limit is the time that the matrix products
alone take: every matrix that is used once, with as many rows as it gets, by the fastest of `F.linear`,
`weight @ rows.T`, and our own for few rows, measured right after the case. A prefill asks for the logits of its last
token, as `generate` does: the head and the last layer's experts need only that one. Stock's last layer runs its
experts for all tokens.""")
    return f"## Speed\n\n{prose}\n\n{_table([*head, 'limit (ms)'], rows)}"


def _memory(results: dict[str, Any]) -> str:
    medians, weights = results["memory"]["medians"], results["weights"]
    part = part_of_files(weights, 2) * weights["total"]
    held = {"stock": weights["total"], "ours": weights["total"], "subset": part}
    titles = {"stock": "stock", "ours": "ours", "subset": "ours, 2 of 7"}
    rows = []
    for who, title in titles.items():
        run, size = medians[who], held[who]
        cached, read = ("load_s", "ready_s"), ("disk_load_s", "disk_ready_s")
        times = [" / ".join(f"{run[key]:.2g}" for key in keys) for keys in (cached, read)] + [_megabytes(size)]
        peaks = [f"{_megabytes(run[key])} ({run[key] / size:.2f}x)" for key in ("peak", "growth")]
        rows.append([title, *times, *peaks])
    head = [
        "",
        "files in the cache (s)",
        "read from disk (s)",
        "weights (MB)",
        "peak (MB)",
        "peak above the start (MB)",
    ]
    experts = results["weights"]["experts"]
    each = (medians["ours"]["load_s"] - medians["subset"]["load_s"]) / (experts - 2)
    rest = medians["subset"]["load_s"] - 2 * each
    prose = _prose(f"""
One load and one forward pass of 8 tokens, in a process of its own; the times are those of the load alone / of both.
Ours maps files: what is in the cache is used where it lies, so its load alone does not go with bytes. It builds modules
and names tensors: {each * 1000:.2g} ms for an expert, and {rest * 1000:.2g} ms for all else, which no expert that is
left out saves. Of what lies on the disk safetensors has the system read ahead all that is opened, the whole embedding
too, so the goal for reading from disk expects the bytes of the files. The peak is the most resident memory the process
ever had (VmHWM), mapped files and the libraries included; above the start means above what it held when the imports
were done. In brackets: times the weights.""")
    return f"## Loading and memory\n\n{prose}\n\n{_table(head, rows)}"


def _sets(results: dict[str, Any]) -> str:
    weights, decode, rows = (results[key] for key in ("weights", "parts", "rows"))
    switch, read = results["switch"], results["bandwidth"]
    part = expected_part(weights, 2)
    sets = _table(
        ["decoding, ms per step", "measured", "relative", "expected"],
        [
            ["one row, all 7 experts", f"{decode['all'] * 1000:.3g}", "1", "1"],
            *(
                [f"one row, 2 of 7, {how}", f"{decode[how] * 1000:.3g}", f"{decode[how] / decode['all']:.3f}"]
                + [f"{part:.3f}"]
                for how in ("loaded", "switched")
            ),
            ["four rows, one set of all 7", f"{rows['one'] * 1000:.3g}", "1", "1"],
            *(
                [f"four rows, {name} sets of 4", f"{rows[name] * 1000:.3g}", f"{rows[name] / rows['one']:.3f}", "1"]
                for name in ("two", "four")
            ),
        ],
    )
    size = weights["always"] + weights["experts"] * weights["expert"]
    prose = _prose(f"""
What is expected follows from the bytes: with 2 of 7 experts a token reads {part:.1%} of what it reads with all. The
sets of the rows use all seven experts between them, so they read the same bytes as the one set of all seven, for fewer
products; the names are given to every call, and resolved anew in each. A live switch took at most
{switch["first"] * 1000:.2g} ms to a set that was not in force before, and {switch["again"] * 1000:.2g} ms to one that
was.

A token that uses all experts reads {_megabytes(size)} MB: attention, norms, routers, experts and head. The embedding's
one row and the cache's few megabytes are left out. In {read["decode"] * 1000:.3g} ms that is
{size / read["decode"] / 1e9:.1f} GB/s. In between, the machine read memory at {read["sum"] / 1e9:.1f} GB/s (sum of one
tensor) and {read["mv"] / 1e9:.1f} GB/s (matrices of an expert's shape times a vector), so decoding reaches
{read_fraction(results):.0%} of the better one.""")
    return f"## Sets of experts\n\n{sets}\n\n{prose}"


def _growth(results: dict[str, Any]) -> str:
    small = results["settings"]["small"]
    rows = []
    for line, title in GROWTH.items():
        for point in results["growth"][line]:
            prefill, decode = point["prefill"], point["decode"]
            speeds = [f"{point['tokens'] / prefill[who]:,.0f}" for who in ("ours", "stock")]
            steps = [f"{decode[who] * 1000:.3g}" for who in ("ours", "stock")]
            best = f"{prefill['stock_best']}, {decode['stock_best']}"
            rows.append([f"{title}: {point['value']}", _megabytes(point["bytes"]), *speeds, *steps, best])
    head = [
        "",
        "MB per token",
        "prefill, ours (tokens/s)",
        "prefill, stock (tokens/s)",
        "decoding, ours (ms)",
        "decoding, stock (ms)",
        "stock's best",
    ]
    prose = _prose(f"""
From a model of hidden size {small["hidden"]}, {small["layers"]} layers and {small["experts"]} experts, one thing grows
at a time; every token uses all experts, and one row is decoded. Where the prompt does not grow, the prefill has
{results["settings"]["prefill"]} tokens, and decoding starts after it. The last column names stock's best for prefill
and for decoding.

![Growth of prefill and decoding](inference.png)

The dotted line is the time that reading the bytes takes at the bandwidth above.""")
    return f"## Growth\n\n{prose}\n\n{_table(head, rows)}"
