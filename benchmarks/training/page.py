"""The page: what was measured, how, and the figures."""

from typing import Any

from benchmarks.inference.page import _megabytes as megabytes
from benchmarks.inference.page import _prose as prose
from benchmarks.inference.page import _table as table
from benchmarks.training.goals import goals, rate, rate_fraction

WHO = {
    "stock": "stock, gradients masked",
    "stock, frozen": "stock, what can be frozen is",
    "ours": "ours, bare loop",
    "trainer": "ours, `ExpertSFTTrainer`",
    "trainer, as it comes": "ours, `ExpertSFTTrainer` with its default, checkpointing",
}


def page(results: dict[str, Any]) -> str:
    """Write the page in Markdown."""
    parts = [_introduction(results), _goals(results), _speed(results), _memory(results), _packages(results)]
    return "\n\n".join([*parts, f"Versions: {results['versions']}."]) + "\n"


def _introduction(results: dict[str, Any]) -> str:
    settings = results["settings"]
    main = settings["main"]
    return prose(f"""# Training

One of {main["experts"]} experts is trained: hidden size {main["hidden"]}, feed-forward width {main["inner"]},
{main["layers"]} layers, vocabulary {main["vocabulary"]:,}, random weights, {settings["batch"]} x {settings["tokens"]}
tokens a step, fp32, on {results["threads"]} threads of a CPU. Written by `make bench-train`; `training.json` beside
this page holds every run.

Stock is `transformers.FlexOlmoForCausalLM` on the same checkpoint. Its experts are fused, so a careful user gives all
parameters to AdamW with weight decay 0, and after each backward pass sets to zero every gradient but that of the
expert's slices and its router row. It has two ways to run its experts that fit (`eager`, `grouped_mm`); the faster one
counts. Ours is `freeze_except` and the same loop, or `ExpertSFTTrainer` with TRL's fused loss, both z-losses, clipping,
schedule and log. Everyone uses the same fused AdamW, and before anything is timed, all have to give the same loss.

Each contestant lives in a process of its own, and another process tells them in turns to take one step, so that a
machine whose speed drifts is as fast for one as for the other. {settings["rounds"]} steps of each are timed, after
{settings["warm_ups"]} to warm up, and their median counts.""")


def _goals(results: dict[str, Any]) -> str:
    found = goals(results)
    missed = sum(not goal.met for goal in found)
    verdict = "All goals are met." if not missed else f"{missed} of {len(found)} goals are missed."
    rows = ([goal.title, goal.figure, goal.goal, "yes" if goal.met else "**no**"] for goal in found)
    return f"## Goals\n\n{verdict}\n\n{table(['', 'measured', 'goal', 'met'], rows)}"


def _speed(results: dict[str, Any]) -> str:
    speed, operations, frozen = results["speed"], results["operations"], results["speed"]["frozen"]
    tokens = results["settings"]["batch"] * results["settings"]["tokens"]
    rows = [
        [WHO[who], f"{speed[who]:.3g}", f"{tokens / speed[who]:,.0f}", f"{speed['stock'] / speed[who]:.2f}x"]
        for who in ("stock", "ours", "trainer")
    ]
    text = prose(f"""
Stock runs its experts fastest by `{speed["stock_best"]}`. A user who goes further freezes what stock can freeze, which
is all but the fused experts and the routers, and masks only these: {frozen["frozen"]:.3g} s, measured in turns with
ours at {frozen["ours"]:.3g} s, which is {frozen["frozen"] / frozen["ours"]:.2f}x.

A step of ours must do {operations["planned"] / 1e9:,.1f} billion floating-point operations, by the arithmetic of
[`flexolmo plan`](../trainers/plan.md): 2 per weight and token forward, 2 for the input's gradient, 2 for the weight's
where it is trained, nothing below the first layer's mixture, and attention's scores. Torch counts
{operations["counted"] / 1e9:,.1f} billion in a real step. Its products with weights alone, done in turns with the
steps, into memory that is there already, run at {rate(results, "products") / 1e9:,.0f} billion operations per second on
this machine; a step reaches {rate(results, "ours") / 1e9:,.0f}, or {rate_fraction(results):.0%}. The rest is what lies
between the products: norms, activations, softmax, the loss, fresh memory, the optimizer.

Building the trainer took {results["trainer"]["built"]:.2g} s, most of which hashes what is frozen, and checking it at
the end {results["trainer"]["checked"]:.2g} s; neither is in a step.

![Time of a step and peak memory](training.png)""")
    return f"## Speed\n\n{table(['', 'a step (s)', 'tokens/s', 'stock / this'], rows)}\n\n{text}"


def _memory(results: dict[str, Any]) -> str:
    settings, peaks, state = results["settings"], results["memory"]["medians"], results["state"]
    moments = {"trainer, as it comes": state["trainer"]["moments"], **{who: of["moments"] for who, of in state.items()}}
    rows = [
        [title, megabytes(peaks[who]), f"{peaks[who] / peaks['stock']:.2f}x", megabytes(moments[who])]
        for who, title in WHO.items()
    ]
    wide = results["wide"]
    text = prose(f"""
The peak is the most resident memory (VmHWM) of {settings["memory_steps"]} steps in a process of its own, above what it
held after the imports and a step of a tiny model; the median of {settings["memory_rounds"]} runs. It contains the
model. The optimizer's state is its two moments for each parameter that it was given; the four bytes with which AdamW
counts the steps of each tensor are left out.

At the vocabulary of the released checkpoints, {settings["wide"]["vocabulary"]:,}, the logits of a step have
{settings["batch"] * (settings["tokens"] - 1) * settings["wide"]["vocabulary"]:,} elements. The largest tensor in two
steps of the trainer, backward passes included, has {wide["elements"]:,} ({" x ".join(map(str, wide["shape"]))}): they
are made in pieces, and never whole.""")
    return f"## Memory\n\n{table(['', 'peak (MB)', 'of stock', 'optimizer state (MB)'], rows)}\n\n{text}"


def _packages(results: dict[str, Any]) -> str:
    full = next(of for of in results["packages"] if of["form"] == "full")
    rows = []
    for of in results["packages"]:
        size = ["", ""] if of["bytes"] is None else [f"{of['bytes']:,}", f"{of['bytes'] / full['bytes']:.1%}"]
        rows.append([of["form"], *size, f"{of['loss']:.3f}"])
    text = prose(f"""
An expert of a small model (hidden size 128, 4 layers) after {results["settings"]["learning_steps"]} steps on a made-up
language, beside a public model that knows another one. `compressed` is the full expert through
`ExpertPackage.compress`; `trained` has learned in its low-rank form (`lora_r`) with the same number of steps and the
same learning rate. The loss is on texts of the expert's language that were not trained on. How much rank an expert
needs depends on what it learned: measure it on text of your own.""")
    return f"## Smaller experts\n\n{table(['expert', 'bytes', 'of full', 'loss (nats per token)'], rows)}\n\n{text}"
