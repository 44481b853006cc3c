"""What the paper claims, held against the study's figures (arXiv 2507.07024, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.flexmix_mini.measuring import PUBLIC, documents_of
from benchmarks.flexmix_mini.place import Place
from benchmarks.flexmix_mini.steps import METHOD
from benchmarks.flexmix_mini.tables import Scores, change, kinds, mean_difference, own_dense
from flexolmo_hf.evaluation.optout.matrix import OptOutMatrix, opt_out_sets

MERGED, TUNED, BTM = METHOD, "router tuning", "BTM top-2"


@dataclass(frozen=True)
class Claim:
    """A statement, whether it holds here, and the figures that say so.

    Attributes:
        text: The statement.
        holds: Whether it holds on single domains; None if that cannot be told.
        figures: What was compared.
        mixed: The same for mixed documents, where methods are compared; "" elsewhere.
    """

    text: str
    holds: bool | None
    figures: str
    mixed: bool | None | str = ""


def claims(place: Place, table_1: Sequence[dict[str, Scores]], table_2: dict[str, Scores]) -> list[Claim]:
    """Check every claim that the study can check."""
    return [
        *(_compared("Four experts", table_1, pair) for pair in _PAIRS_1 if any(_has(one, pair) for one in table_1)),
        *(_compared("All experts", [table_2], pair, table_1) for pair in _PAIRS_2 if _has(table_2, pair)),
        *_goals(table_2),
        *_opting_out(place),
        *_routing(place),
        *_experts(place),
    ]


#: What is claimed to be better than what: of the paper's table 1, and of table 2.
_PAIRS_1 = (
    (MERGED, PUBLIC),
    (MERGED, "soup"),
    (MERGED, "weighted soup"),
    (MERGED, BTM),
    (MERGED, "prompt routing"),
    (MERGED, "BTX"),
    (MERGED, "no coordination"),
    (MERGED, "no bias"),
    (MERGED, "bias dropped"),
    (MERGED, "encoder rows"),
    (MERGED, "hidden-state rows"),
    ("encoder rows", "hidden-state rows"),
    ("encoder rows", "random rows, no bias"),
    ("no bias", "random rows, no bias"),
    (TUNED, MERGED),
    (TUNED, BTM),
    (MERGED, "unrestricted MoE, same compute"),
    (TUNED, "unrestricted MoE, same compute"),
    ("unrestricted MoE, same data", TUNED),
    ("unrestricted MoE, same data", BTM),
)
_PAIRS_2 = ((MERGED, PUBLIC), (MERGED, BTM), (TUNED, MERGED), (TUNED, BTM))


def _has(scores: dict[str, Scores], pair: tuple[str, str]) -> bool:
    return all(label in scores for label in pair)


def _compared(
    experts: str,
    scores: Sequence[dict[str, Scores]],
    pair: tuple[str, str],
    repeated: Sequence[dict[str, Scores]] | None = None,
) -> Claim:
    """Compare two methods, on the same documents and with the same seeds; `repeated` tells how far seeds are apart."""
    better, worse = pair
    both = [seed for seed in scores if _has(seed, pair)]
    verdicts, said = [], []
    for name, domains in zip(("domains", "mixed documents"), kinds(both[0]), strict=True):
        if not domains:
            continue
        one, other = (mean(seed[label].average(domains) for seed in both) for label in pair)
        interval = mean_difference([seed[better] for seed in both], [seed[worse] for seed in both], domains)
        near = _between_seeds(scores if repeated is None else repeated, pair, domains)
        sure = interval.low * interval.high > 0 and abs(one - other) >= near
        verdicts.append(one < other if sure else None)
        said.append(
            f"{name}: {one:.3f} against {other:.3f}, {one - other:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"
        )
    seeds = "one seed" if len(both) == 1 else f"{len(both)} seeds"
    mixed = verdicts[1] if len(verdicts) > 1 else ""
    return Claim(f"{experts}: {better} is better than {worse}", verdicts[0], f"{'; '.join(said)}; {seeds}", mixed)


def _between_seeds(scores: Sequence[dict[str, Scores]], pair: tuple[str, str], domains: Sequence[str]) -> float:
    """Return twice the largest deviation between seeds, of either method or of FlexOlmo: less than that is chance."""
    spread = []
    # In a study that is not finished, what is compared may have one seed, which says nothing about others.
    for label in (*pair, MERGED, TUNED):
        repeats = [seed[label] for seed in scores if label in seed]
        found = [repeat.average([name for name in domains if name in repeat.documents]) for repeat in repeats]
        spread.append(stdev(found) if len(found) > 1 else 0.0)
    return 2 * max(spread)


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
    matrix = opt_out_of(place)
    own, other = [], []
    for owner in place.settings.owners:
        for domain in matrix.data:
            value = matrix.change(matrix.without(owner), domain).value
            (own if domain == owner else other).append(value)
    return [
        Claim(
            "Leaving an expert out costs its own domain most",
            min(own) > max(other),
            f"own domains lose {min(own):+.1%} to {max(own):+.1%}, others {min(other):+.1%} to {max(other):+.1%}, "
            f"mean {mean(own):+.1%} against {mean(other):+.1%}",
        )
    ]


def _routing(place: Place) -> list[Claim]:
    found = routing_of(place)
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


def _of_tuned(place: Place, kind: str) -> str:
    return f"{kind}-tuned-{METHOD}-t2-{place.settings.seeds[0]}"


def opt_out_of(place: Place) -> OptOutMatrix:
    """Return the opt-out matrix of the tuned model."""
    sets, found = opt_out_sets([PUBLIC, *place.settings.owners]), place.result(_of_tuned(place, "optout"))
    return OptOutMatrix(sets, {label: documents_of(found[label]) for label in sets}, place.settings.sequence)


def routing_of(place: Place) -> dict[str, Any]:
    """Return the routing shares of the tuned model."""
    found: dict[str, Any] = place.result(_of_tuned(place, "routing"))
    return found
