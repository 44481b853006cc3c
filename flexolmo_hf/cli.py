"""The command `flexolmo`: every subcommand calls one public function."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

# Nothing is reported unless the user asks for it; the libraries read this when they are imported, which is later.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

app = typer.Typer(
    help="FlexOlmo for Hugging Face Transformers: make, train, pack, merge and inspect experts.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Show our own errors as one sentence; anything else is a fault and keeps its traceback."""
    from flexolmo_hf.errors import FlexOlmoError

    try:
        yield
    except FlexOlmoError as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None


@app.command()
def init(
    dense: Annotated[str, typer.Argument(help="A dense OLMo-2 checkpoint: folder or Hub repository.")],
    out: Annotated[Path, typer.Argument(help="Folder for the FlexOlmo checkpoint; new or empty.")],
    expert: Annotated[str | None, typer.Option(help="Name of a new expert to be trained.")] = None,
    router_bias: Annotated[bool, typer.Option(help="Give the router a negative bias per expert and layer.")] = False,
) -> None:
    """Make a FlexOlmo checkpoint from a dense OLMo-2 one."""
    with _plain_errors():
        from flexolmo_hf import FlexOlmoForCausalLM
        from flexolmo_hf.composition.folder import new_folder

        with new_folder(out) as folder:
            FlexOlmoForCausalLM.from_dense(dense, expert=expert, router_bias=router_bias).save_pretrained(folder)
            _copy_tokenizer(dense, folder)
    typer.echo(f"Wrote {out}: experts {['public'] if expert is None else ['public', expert]}.")


def _copy_tokenizer(source: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        typer.echo("The dense checkpoint has no tokenizer; none was copied.", err=True)
        return
    tokenizer.save_pretrained(folder)


@app.command()
def train(
    config: Annotated[
        Path, typer.Option(help="YAML file: model_path, data, eval_data and any field of ExpertSFTConfig.")
    ],
) -> None:
    """Train one expert alone, next to the frozen public model."""
    with _plain_errors():
        from flexolmo_hf._extras import require

        require("train", "trl", "datasets")
        from flexolmo_hf.trainers.job import read_job, run_job

        output = run_job(*read_job(config))
    typer.echo(f"Wrote {output}.")


@app.command()
def pack(
    model: Annotated[Path, typer.Argument(help="A FlexOlmo checkpoint that holds the expert.")],
    out: Annotated[Path, typer.Argument(help="Folder for the package; new or empty.")],
    expert: Annotated[str, typer.Option(help="Which expert.")],
    owner: Annotated[str, typer.Option(help="Who answers for the expert, as they wish to be named.")] = "",
    license: Annotated[str, typer.Option(help="Licence of the weights.")] = "",
) -> None:
    """Take one expert out of a checkpoint as a package that can be shared."""
    with _plain_errors():
        from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM
        from flexolmo_hf.composition.folder import refuse_nonempty
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
) -> None:
    """Put experts side by side with their public model; nothing is trained."""
    with _plain_errors():
        from flexolmo_hf import FlexOlmoConfig, merge_experts
        from flexolmo_hf.errors import ConfigurationError, DuplicateExpertError

        experts: dict[str, str] = {}
        for item in package:
            name, separator, folder = item.partition("=")
            if not separator:
                raise ConfigurationError(f"--package {item!r} has no '='.", "Write --package NAME=FOLDER.")
            if name in experts:
                raise DuplicateExpertError(name, [*experts, name])
            experts[name] = folder
        merge_experts(anchor, experts, out)
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
    with _plain_errors():
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
    with _plain_errors():
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
    with _plain_errors():
        from flexolmo_hf import inspect_checkpoint
        from flexolmo_hf._tables import print_summary

        print_summary(inspect_checkpoint(path))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes; new or empty.")] = Path(
        "demo_output"
    ),
    quick: Annotated[bool, typer.Option(help="A much smaller run, to see that everything works.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where the two packages with public texts are kept.")] = None,
) -> None:
    """See the whole idea on real text: a public model, two experts trained alone, merged, and switched on and off."""
    with _plain_errors():
        from flexolmo_hf._extras import require

        require("train", "trl", "datasets")
        from flexolmo_hf.demo.pipeline import run_demo

        run_demo(output, quick=quick, cache_dir=cache)


if __name__ == "__main__":
    sys.exit(app())
