"""Routing shares as a table for the terminal, a page of Markdown and a folder that holds all of it."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from flexolmo_hf.evaluation.routing_shares.figures import NAMES, draw_shares
from flexolmo_hf.evaluation.routing_shares.result import KINDS, Kind, RoutingShares


def write_report(shares: RoutingShares, folder: str | Path, *, kind: Kind = "weight") -> list[Path]:
    """Write the shares, what follows from them and their figures into a folder.

    Args:
        shares: What was measured.
        folder: Where to; has to exist.
        kind: Which share the figures show.

    Returns:
        The files: ``routing_shares.json``, ``routing_shares.md`` and the figures. None of them holds any text.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    place = Path(folder)
    pictures = draw_shares(shares, place, kind)
    page = place / "routing_shares.md"
    page.write_text(markdown(shares, [picture.name for picture in pictures]), encoding="utf8")
    return [shares.save(place / "routing_shares.json"), page, *pictures]


def table(shares: RoutingShares, kind: Kind = "weight") -> Table:
    """Return a table of the experts' shares of each domain over all layers, for rich to print."""
    found = Table(title=f"{_capital(NAMES[kind])}, all layers", title_justify="left")
    found.add_column("domain")
    for expert in shares.experts:
        found.add_column(expert, justify="right")
    found.add_column("entropy (bits)", justify="right")
    found.add_column("tokens", justify="right")
    for row, (domain, by_expert) in enumerate(shares.table(kind).items()):
        highest = max(by_expert.values())
        cells = [f"[bold]{share:.1%}[/bold]" if share == highest else f"{share:.1%}" for share in by_expert.values()]
        found.add_row(escape(domain), *cells, f"{shares.entropy[row].mean():.2f}", f"{shares.tokens[row]:,}")
    return found


def markdown(shares: RoutingShares, pictures: list[str] | None = None) -> str:
    """Write the shares as a Markdown page.

    Args:
        shares: What was measured.
        pictures: Names of figures to show at the end.
    """
    tokens, documents = sum(shares.tokens), sum(shares.documents)
    parts = [
        "# Routing shares",
        f"Experts {', '.join(shares.experts)}; {tokens:,} tokens of {documents:,} documents in windows of "
        f"{shares.max_length}. Shares of a row sum to 100 %.",
    ]
    for kind in KINDS:
        # Where every expert is picked for every token, the shares of picks say nothing.
        if kind != "picks" or shares.top_k < len(shares.experts):
            strongest = f" {shares.top_k}" if kind == "picks" else ""
            parts += [f"## {_capital(NAMES[kind])}{strongest}, all layers", _shares_of(shares, kind)]
    if shares.specialisation():
        parts += [
            "## Specialisation",
            "Share of the own domain minus the mean share of the other domains, in percentage points.",
            _specialisation(shares),
        ]
    parts += ["## Layers", _layers(shares)]
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures or []]
    return "\n\n".join(parts) + "\n"


def _shares_of(shares: RoutingShares, kind: Kind) -> str:
    rows = [
        [domain, *(f"{share:.1%}" for share in by_expert.values()), f"{tokens:,}"]
        for (domain, by_expert), tokens in zip(shares.table(kind).items(), shares.tokens, strict=True)
    ]
    return _grid(["domain", *shares.experts, "tokens"], rows)


def _specialisation(shares: RoutingShares) -> str:
    places = [("all layers", None), ("first", 0), ("middle", shares.layers // 2), ("last", shares.layers - 1)]
    by_place = [shares.specialisation(layer=layer) for _, layer in places]
    strongest = shares.specialisation("top1")
    rows = [
        [expert, *(f"{100 * found[expert]:+.1f}" for found in by_place), f"{100 * strongest[expert]:+.1f}"]
        for expert in by_place[0]
    ]
    return _grid(["expert", *(name for name, _ in places), "strongest expert, all layers"], rows)


def _layers(shares: RoutingShares) -> str:
    agreement, by_chance = shares.neighbour_agreement()
    weights_LE = shares.weight.mean(axis=0)
    rows = []
    for layer in range(shares.layers):
        last = layer == shares.layers - 1
        agrees = "" if last else f"{agreement[:, layer].mean():.1%} ({by_chance[:, layer].mean():.1%})"
        mean_shares = [f"{share:.1%}" for share in weights_LE[layer]]
        rows.append([str(layer), *mean_shares, f"{shares.entropy[:, layer].mean():.2f}", agrees])
    header = ["layer", *shares.experts, "entropy (bits)", "same strongest expert as in the next layer (by chance)"]
    note = "Shares of the routing weight, entropy of a token's weights and agreement: means of the domains."
    return f"{note}\n\n{_grid(header, rows)}"


def _grid(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]])


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
