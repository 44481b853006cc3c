"""The subcommand that shows which experts work on which texts."""

from pathlib import Path
from typing import Annotated

import typer

from flexolmo_hf.cli.application import app, named_files, names_of, plain_errors


@app.command()
def routing(
    checkpoint: Annotated[str, typer.Argument(help="A FlexOlmo checkpoint: folder or Hub repository.")],
    data: Annotated[
        list[str],
        typer.Option(help="NAME=PLACE of a domain's documents: a .jsonl or .txt file, or a folder; repeat for more."),
    ],
    active_experts: Annotated[
        str | None, typer.Option(help="Experts to measure, as public+math; default those a plain load makes active.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", help="Folder for figures and tables; new or empty.")
    ] = None,
    html_text: Annotated[
        Path | None,
        typer.Option(help="A text file to show in colours; the page in the output folder will hold its text."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window; default 1024, or the model's positions if these are fewer.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows read at once.")] = 8,
    top_k: Annotated[
        int | None,
        typer.Option(help="How many strongest experts count as picked; default as many as run.", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each domain at most.", show_default=False)] = None,
    field: Annotated[str, typer.Option(help="Key of the text in .jsonl lines.")] = "text",
    dtype: Annotated[str, typer.Option(help="Of the weights, such as bfloat16; auto for the checkpoint's.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
) -> None:
    """Measure each expert's share of the tokens by domain, layer and position, and draw it."""
    with plain_errors():
        from rich.console import Console

        from flexolmo_hf.evaluation.routing_shares.files import PAGE, shares_of_files
        from flexolmo_hf.evaluation.routing_shares.report import table

        found = shares_of_files(
            checkpoint,
            named_files("data", data, kind="PLACE"),
            output,
            html_text=html_text,
            active_experts=names_of(active_experts),
            max_length=max_length,
            batch_size=batch_size,
            top_k=top_k,
            limit=limit,
            field=field,
            dtype=dtype,
            device=device,
        )
    Console().print(table(found))
    if output is not None:
        typer.echo(f"Wrote {output}: tables and figures, which hold no text.")
    if html_text is not None:
        typer.echo(f"{PAGE} there shows the text itself: give it only to those who may read that.")
