"""The subcommand that measures what leaving experts out does, and holds it against a contract."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from flexolmo_hf.cli.application import app, named_files, names_of, plain_errors


@app.command()
def optout(
    model: Annotated[str, typer.Argument(help="A FlexOlmo checkpoint: folder or Hub repository.")],
    data: Annotated[
        list[str], typer.Option(help="NAME=FILE: held-out .jsonl or .txt, or a folder; NAME of an expert: its own.")
    ],
    subset: Annotated[
        list[str] | None, typer.Option("--set", help="A further set to measure, such as public+math.")
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option("--active-experts", "--experts", help="Load these experts only, such as public+math+code."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", "--out", "-o", help="Folder for table, figures and heat map; new or empty."),
    ] = None,
    contract: Annotated[Path | None, typer.Option(help="YAML: fail (exit 1) if it is broken.")] = None,
    write_contract: Annotated[Path | None, typer.Option(help="Write the measured values as a contract.")] = None,
    margin: Annotated[float, typer.Option(help="Percent by which --write-contract lets values be missed.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Documents of each data set at most.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window; default 1024, or the model's positions if these are fewer.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.")] = 8,
    field: Annotated[str, typer.Option(help="Key of the text in .jsonl lines.")] = "text",
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, ...")] = "cpu",
) -> None:
    """Leave out every expert in turn: what each is worth to each data set, as table, heat map and contract."""
    with plain_errors():
        from flexolmo_hf.evaluation.optout.contract import Contract
        from flexolmo_hf.evaluation.optout.files import Reading, opt_out_files

        _refuse_early(out, write_contract, margin)
        agreed = None if contract is None else Contract.load(contract)
        reading = Reading(
            experts=names_of(experts),
            subsets=subset or [],
            max_length=max_length,
            batch_size=batch_size,
            limit=limit,
            field=field,
            dtype=dtype,
            device=device,
        )
        places = named_files("data", data)
        with _progress() as progress:
            matrix = opt_out_files(model, places, reading=reading, contract=agreed, progress=progress)
        clauses = [] if agreed is None else agreed.check(matrix)
        if write_contract is not None:
            Contract.from_matrix(matrix, margin=margin).save(write_contract)
        _show(matrix, clauses, out)
    if any(clause.verdict == "broken" for clause in clauses):
        raise typer.Exit(1)


def _refuse_early(out: Path | None, write_contract: Path | None, margin: float) -> None:
    """Refuse before the measuring, which takes long, what could not be written after it."""
    from flexolmo_hf._extras import require
    from flexolmo_hf._folder import refuse_nonempty
    from flexolmo_hf.evaluation.optout.contract import refuse_existing, refuse_margin

    if out is not None:
        require("eval", "matplotlib")
        refuse_nonempty(out)
    if write_contract is not None:
        refuse_existing(write_contract)
        refuse_margin(margin)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # Progress goes where errors go, so that the table alone can be piped on.
    columns = (TextColumn("measuring"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("measuring", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _show(matrix: Any, clauses: Any, out: Path | None) -> None:
    from rich.console import Console

    from flexolmo_hf.evaluation.optout.report import save, table

    if out is not None:
        save(matrix, out, clauses)
    console = Console()
    console.print(table(matrix))
    for clause in clauses:
        if clause.verdict != "kept":
            console.print(str(clause), markup=False, highlight=False, soft_wrap=True)
    if clauses:
        kept = sum(clause.verdict == "kept" for clause in clauses)
        console.print(f"Contract: {kept} of {len(clauses)} clauses kept.", highlight=False)
