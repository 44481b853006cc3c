"""Subcommands between text and router."""

from pathlib import Path
from typing import Annotated

import typer

from flexolmo_hf.cli.application import app, plain_errors


@app.command()
def embed(
    texts: Annotated[list[Path], typer.Argument(help="Documents: .jsonl or .txt files, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the embedding: NAME.npy or NAME.safetensors.")],
    encoder: Annotated[
        str, typer.Option(help="A sentence-transformers model, folder or Hub repository; or self, for the anchor.")
    ] = "self",
    anchor: Annotated[
        str | None, typer.Option(help="The public model, dense or FlexOlmo: it says how long a row is.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Without --anchor: how long a row is.")] = None,
    sample: Annotated[int, typer.Option(help="How many documents to embed at most.")] = 1000,
    seed: Annotated[
        int | None, typer.Option(help="The same for all owners; default the anchor's, else 0.", show_default=False)
    ] = None,
    scale: Annotated[float, typer.Option(help="Norm of the row.")] = 0.5,
    per_layer: Annotated[bool, typer.Option(help="With --encoder self: a row for each layer.")] = False,
    encoder_name: Annotated[str, typer.Option(help="The encoder's public name, to be recorded.")] = "",
    field: Annotated[str, typer.Option(help="Key of the text in .jsonl lines.")] = "text",
) -> None:
    """Embed a domain: the mean of its documents' embeddings, where a router row starts."""
    with plain_errors():
        from flexolmo_hf.routing.embed_files import embed_files

        made = embed_files(
            texts,
            out,
            encoder=encoder,
            anchor=anchor,
            hidden_size=hidden_size,
            sample=sample,
            seed=seed,
            scale=scale,
            per_layer=per_layer,
            encoder_name=encoder_name,
            field=field,
        )
    shape = " x ".join(map(str, made.vector.shape))
    typer.echo(
        f"Wrote {out}: {shape} numbers from {made.documents} documents; "
        f"dropped {made.dropped} ({made.empty} empty, {made.non_finite} not finite)."
    )
    if made.projection is not None and made.projection.seed is not None:
        typer.echo(f"Projected from width {made.projection.encoder_width} with seed {made.projection.seed}.")


@app.command()
def proxy(
    public: Annotated[Path, typer.Argument(help="Public documents: a .jsonl, .parquet or .txt file, or a folder.")],
    private: Annotated[Path, typer.Argument(help="The owner's documents, in the same forms; they stay here.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the choice and the reports; new or empty.")],
    encoder: Annotated[str, typer.Option(help="A sentence-transformers model: folder or Hub repository.")],
    n: Annotated[int, typer.Option("-n", help="How many documents to choose.")] = 1000,
    classifier: Annotated[str, typer.Option(help="logistic, or finetune, as the paper does.")] = "logistic",
    diverse: Annotated[bool, typer.Option(help="Choose documents that differ from each other as well.")] = False,
    seed: Annotated[int, typer.Option(help="Decides the samples and the training.")] = 0,
    field: Annotated[str, typer.Option(help="Key of the text in a row.")] = "text",
) -> None:
    """Choose public documents that look like private ones, to tune a router with; no private text leaves."""
    with plain_errors():
        from flexolmo_hf._extras import require

        require("routing", "datasets")
        from flexolmo_hf.routing.proxy_files import select_proxy_files

        found = select_proxy_files(
            public, private, out, n=n, encoder=encoder, classifier=classifier, diverse=diverse, seed=seed, field=field
        )
    judge, leaks = found.classifier, found.leaks
    typer.echo(
        f"Wrote {out}: {len(found)} of {found.public.read} public documents. The classifier is right on "
        f"{judge.accuracy:.1%} of held-out documents (AUC {judge.auc:.3f}, calibration error "
        f"{judge.calibration_error:.3f})."
    )
    typer.echo(f"Removed {leaks.removed} of {leaks.candidates} candidates as near-duplicates of private documents.")
    typer.echo("Pass on proxy.jsonl; the scores and reports in owner/ stay with you.")
