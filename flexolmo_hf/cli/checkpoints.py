"""Subcommands that make, take apart and describe checkpoints and packages."""

from pathlib import Path
from typing import Annotated

import typer

from flexolmo_hf.cli.application import app, named_files, plain_errors


@app.command()
def init(
    dense: Annotated[
        str,
        typer.Argument(help="A dense OLMo-2 checkpoint; or, with --expert, the folder of a FlexOlmo one to join."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the FlexOlmo checkpoint; new or empty.")],
    expert: Annotated[str | None, typer.Option(help="Name of a new expert to be trained.")] = None,
    router_bias: Annotated[bool, typer.Option(help="Give the router a negative bias per expert and layer.")] = False,
    bias_start: Annotated[
        float | None,
        typer.Option(help="Where the new expert's bias starts, at most 0; default -1.", show_default=False),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE of a router row, from flexolmo embed; repeat for more.", show_default=False),
    ] = None,
) -> None:
    """Make a FlexOlmo checkpoint from a dense OLMo-2 one, or add a new expert to a FlexOlmo one."""
    with plain_errors():
        from flexolmo_hf._folder import new_folder
        from flexolmo_hf.composition.new_expert import starting_model
        from flexolmo_hf.routing.embedding_file import load_embedding

        with new_folder(out) as folder:
            rows = {name: load_embedding(file) for name, file in named_files("row", row or []).items()}
            model = starting_model(dense, expert=expert, router_bias=router_bias, bias_start=bias_start, rows=rows)
            model.save_pretrained(folder)
            _copy_tokenizer(dense, folder)
    typer.echo(f"Wrote {out}: experts {model.expert_names}.")


def _copy_tokenizer(source: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        typer.echo("The checkpoint has no tokenizer; none was copied.", err=True)
        return
    tokenizer.save_pretrained(folder)


@app.command()
def pack(
    model: Annotated[Path, typer.Argument(help="A FlexOlmo checkpoint that holds the expert.")],
    out: Annotated[Path, typer.Argument(help="Folder for the package; new or empty.")],
    expert: Annotated[str, typer.Option(help="Which expert.")],
    owner: Annotated[str, typer.Option(help="Who answers for the expert, as they wish to be named.")] = "",
    license: Annotated[str, typer.Option(help="Licence of the weights.")] = "",
) -> None:
    """Take one expert out of a checkpoint as a package that can be shared."""
    with plain_errors():
        from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM
        from flexolmo_hf._folder import refuse_nonempty
        from flexolmo_hf.composition.training_record import read_training_record

        refuse_nonempty(out)
        loaded = FlexOlmoForCausalLM.from_pretrained(model, active_experts=list(dict.fromkeys(["public", expert])))
        package = ExpertPackage.from_model(loaded, expert, owner=owner, license=license, **read_training_record(model))
        package.save_pretrained(out)
    typer.echo(f"Wrote {out}: expert {expert!r}, {package.parameters:,} parameters.")


@app.command()
def merge(
    anchor: Annotated[str, typer.Argument(help="The public model: a dense OLMo-2 or a FlexOlmo checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder for the merged model; new or empty.")],
    package: Annotated[list[str], typer.Option(help="NAME=FOLDER of an expert package; repeat for more.")],
    average_shared: Annotated[
        bool, typer.Option(help="Average shared weights that owners trained too; leaving one out is then not exact.")
    ] = False,
) -> None:
    """Put experts side by side with their public model; nothing is trained."""
    with plain_errors():
        from flexolmo_hf import FlexOlmoConfig, merge_experts

        merge_experts(anchor, named_files("package", package, "FOLDER"), out, average_shared=average_shared)
        names = FlexOlmoConfig.from_pretrained(out).expert_names
    typer.echo(f"Wrote {out}: experts {names}.")


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A FlexOlmo checkpoint: folder or Hub repository.")],
    out: Annotated[Path, typer.Argument(help="Folder for the stock checkpoint; new or empty.")],
    active_experts: Annotated[
        str | None, typer.Option(help="Experts to keep, as public,math; default those a plain load makes active.")
    ] = None,
    drop_bias: Annotated[
        bool, typer.Option(help="Leave router biases out; stock software does not read them.")
    ] = False,
) -> None:
    """Write a checkpoint for stock transformers and vLLM, with the chosen experts and no trace of the others."""
    with plain_errors():
        from flexolmo_hf import FlexOlmoConfig, export_checkpoint

        export_checkpoint(checkpoint, out, active_experts=active_experts, drop_bias=drop_bias)
        names = FlexOlmoConfig.from_pretrained(out).expert_names
    typer.echo(f"Wrote {out}: experts {names}.")


@app.command()
def identify(
    checkpoint: Annotated[str, typer.Argument(help="A FlexOlmo checkpoint without names: folder or Hub repository.")],
    references: Annotated[
        list[str],
        typer.Argument(help="[NAME=]FOLDER of a package or two-expert checkpoint; a dense model is the public expert."),
    ],
    write: Annotated[
        bool | None, typer.Option(help="Write expert_names.json beside the checkpoint; default for a folder.")
    ] = None,
) -> None:
    """Name a checkpoint's experts by comparing them with experts whose names are known."""
    with plain_errors():
        from flexolmo_hf import identify_experts
        from flexolmo_hf.modeling.files.locate import looks_like_a_repository

        if write is None:
            write = not looks_like_a_repository(checkpoint)
        found = identify_experts(checkpoint, references, write=write)
    typer.echo(found.table())
    if found.written:
        typer.echo(f"Wrote expert_names.json in {checkpoint}: experts {found.expert_names}.")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint folder, a Hub repository or an expert package.")],
) -> None:
    """Show a checkpoint's experts: index, parameters, size, files, bias, and whether a plain load makes them active."""
    with plain_errors():
        from flexolmo_hf import inspect_checkpoint
        from flexolmo_hf._tables import print_summary

        print_summary(inspect_checkpoint(path))
