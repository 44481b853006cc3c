"""What the paper claims, held against the study's figures (arXiv 2507.07024, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.flexmix_mini.measuring import PUBLIC, documents_of
from benchmarks.flexmix_mini.place import Place
from benchmarks.flexmix_mini.steps import METHOD
from benchmarks.flexmix_mini.tables import Scores, change, kinds, own_dense
from flexolmo_hf.evaluation.optout.matrix import ALL

MERGED, TUNED, BTM = METHOD, "router tuning", "BTM top-2"


@dataclass(frozen=True)
class Claim:
    """A statement, whether it holds here, and the figures that say so.

    Attributes:
        text: The statement.
        holds: Whether it holds; None if the figures are nearer to each other than seeds are.
        figures: What was compared.
    """

    text: str
    holds: bool | None
    figures: str


def claims(place: Place, table_1: Sequence[dict[str, Scores]], table_2: dict[str, Scores]) -> list[Claim]:
    """Check every claim that the study can check."""
    return [*_comparisons(table_1, table_2), *_goals(table_2), *_opting_out(place), *_routing(place), *_experts(place)]


def _average(scores: Sequence[dict[str, Scores]], label: str) -> float | None:
    found = [seed[label].average(kinds(seed)[0]) for seed in scores if label in seed]
    return mean(found) if found else None


def _comparisons(table_1: Sequence[dict[str, Scores]], table_2: dict[str, Scores]) -> list[Claim]:
    found = []
    near = _between_seeds(table_1)
    for better, worse in (
        (MERGED, PUBLIC),
        (MERGED, "soup"),
        (MERGED, "weighted soup"),
        (MERGED, BTM),
        (MERGED, "BTX"),
        (MERGED, "no coordination"),
        (MERGED, "no bias"),
        ("no bias", "random rows, no bias"),
        (MERGED, "hidden-state rows"),
        (TUNED, MERGED),
        (MERGED, "unrestricted MoE, same compute"),
        ("unrestricted MoE, same compute", TUNED),
        ("unrestricted MoE, same data", BTM),
        ("unrestricted MoE, same data", MERGED),
    ):
        with_both = [seed for seed in table_1 if better in seed and worse in seed]
        one, other = _average(with_both, better), _average(with_both, worse)
        if one is None or other is None:
            continue
        found.append(
            Claim(
                f"Four experts: {better} is better than {worse}",
                _better(one, other, near),
                f"{one:.3f} against {other:.3f} bits per byte, mean over domains, {_seeds(len(with_both))}",
            )
        )
    for better, worse in ((MERGED, PUBLIC), (MERGED, BTM), (TUNED, MERGED), (TUNED, BTM)):
        one, other = _average([table_2], better), _average([table_2], worse)
        if one is not None and other is not None:
            found.append(
                Claim(
                    f"All experts: {better} is better than {worse}",
                    _better(one, other, near),
                    f"{one:.3f} against {other:.3f} bits per byte, mean over domains",
                )
            )
    return found


def _between_seeds(scores: Sequence[dict[str, Scores]]) -> float:
    """Return twice the deviation between seeds of what was trained with most of them: less than that is chance."""
    by_label = {label: [_average([seed], label) for seed in scores if label in seed] for label in (MERGED, TUNED)}
    return 2 * max((stdev(found) for found in by_label.values() if len(found) > 1), default=0.0)


def _better(one: float, other: float, near: float) -> bool | None:
    return None if abs(one - other) < near else one < other


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _goals(scores: dict[str, Scores]) -> list[Claim]:
    singles, mixed = kinds(scores)
    tuned, ensemble = scores[TUNED], scores[BTM]
    one, other = tuned.average((*singles, *mixed)), ensemble.average((*singles, *mixed))
    cost, interval = change(tuned, scores[PUBLIC], PUBLIC)
    lost = {owner: tuned.bits(owner) / best - 1 for owner, best in own_dense(scores).items()}
    worst = max(lost, key=lambda owner: lost[owner])
    return [
        Claim(
            "Goal: with router tuning better than BTM top-2 over domains and mixed documents",
            one < other,
            f"{one:.3f} against {other:.3f}",
        ),
        Claim(
            "Goal: with router tuning better than BTM top-2 on mixed documents alone",
            tuned.average(mixed) < ensemble.average(mixed) if mixed else False,
            f"{tuned.average(mixed):.3f} against {ensemble.average(mixed):.3f}" if mixed else "none",
        ),
        Claim(
            "Goal: public text costs less than 2%",
            cost < 0.02,
            f"{cost:+.1%} ({interval.low:+.1%} to {interval.high:+.1%})",
        ),
        Claim(
            "Goal: each own domain at most 3% above its dense model",
            max(lost.values()) <= 0.03,
            f"from {min(lost.values()):+.1%} to {lost[worst]:+.1%} ({worst})",
        ),
    ]


def _opting_out(place: Place) -> list[Claim]:
    found = place.result(_of(place, "optout", tuned=True))
    rows = {label: Scores(documents_of(row)) for label, row in found.items()}
    own, other = [], []
    for label, row in rows.items():
        left_out = label.removeprefix("without ")
        if label == ALL or left_out == PUBLIC:
            continue
        for domain in row.documents:
            value = change(row, rows[ALL], domain)[0]
            (own if domain == left_out else other).append(value)
    return [
        Claim(
            "Leaving an expert out costs its own domain most",
            min(own) > max(other),
            f"own domains lose {min(own):+.1%} to {max(own):+.1%}, others {min(other):+.1%} to {max(other):+.1%}, "
            f"mean {mean(own):+.1%} against {mean(other):+.1%}",
        )
    ]


def _routing(place: Place) -> list[Claim]:
    found = place.result(_of(place, "routing", tuned=True))
    experts, share = found["experts"], {}
    for index, domain in enumerate(found["domains"]):
        share[domain] = {name: mean(layer[at] for layer in found["weight"][index]) for at, name in enumerate(experts)}
    own = {domain: max(shares, key=lambda name: shares[name]) == domain for domain, shares in share.items()}
    public = [shares[PUBLIC] for domain, shares in share.items() if domain != PUBLIC]
    return [
        Claim(
            "A domain's own expert has the largest share of its text",
            all(own.values()),
            f"{sum(own.values())} of {len(own)} domains; own shares "
            + ", ".join(f"{domain} {share[domain][domain]:.0%}" for domain in share),
        ),
        Claim(
            "The public expert is busy on every domain",
            min(public) > 1 / len(experts),
            f"its share of the owners' domains is {min(public):.0%} to {max(public):.0%}, "
            f"an equal share {1 / len(experts):.0%}",
        ),
    ]


def _experts(place: Place) -> list[Claim]:
    table = {used: average for used, average in by_experts(place)}
    if len(table) < 3:
        return []
    most = max(table)
    enough = min(used for used in table if table[used] <= 1.005 * table[most])
    return [
        Claim(
            "More experts per token help up to four, then hardly",
            enough <= 4 and table[1] > table[enough],
            ", ".join(f"{used}: {average:.3f}" for used, average in table.items()),
        )
    ]


def by_experts(place: Place) -> list[tuple[int, float]]:
    """Return the mean bits per byte over domains by the number of experts per token, of the tuned model."""
    seed = place.settings.seeds[0]
    found = []
    for used in range(1, len(place.settings.owners) + 2):
        step = f"score-t2-{seed}-top-{used}" if used <= len(place.settings.owners) else f"score-t2-{seed}-{TUNED}"
        if place.is_done(step):
            scores = Scores(documents_of(place.result(step)))
            found.append((used, scores.average(kinds({"": scores})[0])))
    return found


def _of(place: Place, kind: str, *, tuned: bool) -> str:
    return f"{kind}-{'tuned' if tuned else 'merged'}-{METHOD}-t2-{place.settings.seeds[0]}"


def opt_out_rows(place: Place, *, tuned: bool = True) -> dict[str, Scores]:
    """Return the opt-out matrix."""
    found: dict[str, Any] = place.result(_of(place, "optout", tuned=tuned))
    return {label: Scores(documents_of(row)) for label, row in found.items()}


def routing_of(place: Place, *, tuned: bool = True) -> dict[str, Any]:
    """Return the routing shares."""
    found: dict[str, Any] = place.result(_of(place, "routing", tuned=tuned))
    return found
