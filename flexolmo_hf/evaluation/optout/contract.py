"""Contracts: what leaving an expert out has to do and must not do, as a file that can fail a build.

A contract is YAML. Changes are in percent of the bits per byte with all experts::

    decided_by: interval
    each:                     # of every expert but public that is left out
      own_loses: 2.0          #   the data named after it gets worse by at least this
      others_change: 1.0      #   all other data get better or worse by at most this
      public_changes: 0.5     #   the data named public, by at most this
    experts:                  # of one expert, in place of what `each` says
      math: {own_loses: 5.0}
    bits_per_byte:            # of a set: highest values
      all experts: {math: 1.95}
"""

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from flexolmo_hf.errors import ConfigurationError, DamagedFileError
from flexolmo_hf.evaluation.optout.clauses import AT_LEAST, AT_MOST, EITHER_WAY, Clause, Demand, judge
from flexolmo_hf.evaluation.optout.matrix import ALL, OptOutMatrix, label_of, opt_out_sets
from flexolmo_hf.modeling.names import PUBLIC, parse_expert_set

INTERVAL, VALUE = "interval", "value"


@dataclass(frozen=True)
class Terms:
    """What leaving one expert out may do, in percent; None where nothing is agreed.

    Attributes:
        own_loses: The data named after the expert get worse by at least this.
        others_change: All other data, public's apart where it has a term of its own, change by at most this.
        public_changes: The data named public change by at most this.
    """

    own_loses: float | None = None
    others_change: float | None = None
    public_changes: float | None = None


@dataclass(frozen=True)
class Contract:
    """What has been agreed.

    Attributes:
        each: For every expert but public that is left out: without the public expert, everything changes.
        experts: For single experts, term by term in place of `each`.
        bits_per_byte: The highest bits per byte, by set (as the rows of the matrix are called) and data set.
        decided_by: "interval": a clause is broken if its whole 95 % interval is on the wrong side, so that chance does
            not fail a build. "value": if the measured value is.
    """

    each: Terms = field(default_factory=Terms)
    experts: dict[str, Terms] = field(default_factory=dict)
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    decided_by: str = INTERVAL

    @classmethod
    def load(cls, file: str | os.PathLike) -> "Contract":
        """Read a contract.

        Raises:
            ConfigurationError: If there is no such file, or it says something that no contract can.
            DamagedFileError: If it is no YAML.
        """
        path = Path(file)
        if not path.is_file():
            raise ConfigurationError(f"There is no contract {path.name!r}.", "Write one with --write-contract.")
        try:
            found = yaml.safe_load(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = "" if mark is None else f" from line {mark.line + 1} on"
            # The cause would quote the file.
            raise DamagedFileError(path.name, f"it is not YAML{where}") from None
        return _read(found)

    @classmethod
    def from_matrix(cls, matrix: OptOutMatrix, *, margin: float = 1.0) -> "Contract":
        """Agree on what has been measured, with a margin.

        Args:
            matrix: The measurement.
            margin: How far each value may be missed: a change by so many percentage points, bits per byte with all
                experts by so many percent.

        Raises:
            ConfigurationError: If the margin is below 0, or a measured value is not a number.
        """
        refuse_margin(margin)
        for label, by_data in matrix.documents.items():
            if odd := [data for data in by_data if not math.isfinite(matrix.bits(label, data))]:
                raise ConfigurationError(
                    f"The bits per byte of {odd[0]!r}, {label}, are no number.",
                    "No contract can be written: look for the weights that are NaN or infinite.",
                )
        experts = {name: _measured_terms(matrix, name, margin) for name in matrix.experts}
        highest = {data: _up(matrix.bits(ALL, data) * (1 + margin / 100), 4) for data in matrix.data}
        return cls(experts=experts, bits_per_byte={ALL: highest})

    def save(self, file: str | os.PathLike) -> None:
        """Write the contract as YAML.

        Raises:
            ConfigurationError: If there is such a file.
        """
        path = refuse_existing(file)
        said = {
            "decided_by": self.decided_by,
            "each": _said(self.each),
            "experts": {name: _said(terms) for name, terms in self.experts.items()},
            "bits_per_byte": self.bits_per_byte,
        }
        written = yaml.safe_dump({key: value for key, value in said.items() if value}, sort_keys=False)
        path.write_text(written, encoding="utf-8")

    @property
    def subsets(self) -> list[str]:
        """The sets that it speaks of and that are not measured by themselves, as names joined by ``+``."""
        return [label for label in self.bits_per_byte if label != ALL and not label.startswith("without ")]

    def demands(self, experts: Sequence[str], data: Sequence[str]) -> list[Demand]:
        """List what is agreed on for a model and data; nothing needs to have been measured.

        Args:
            experts: The model's experts.
            data: Names of the data sets.

        Raises:
            ConfigurationError: If the contract says nothing about them, or speaks of data that are not there: a promise
                that cannot be checked is not kept.
            UnknownExpertError: If it speaks of an expert that the model does not have.
        """
        parse_expert_set(list(self.experts) or None, experts)
        if self.experts.get(PUBLIC, Terms()).public_changes is not None:
            raise ConfigurationError(
                f"The contract's experts: {PUBLIC} has public_changes, and the public data are its own.",
                "Write own_loses, the least by which they get worse.",
            )
        found = [demand for name in experts for demand in self._of_expert(name, experts, data)]
        for label, highest in self.bits_per_byte.items():
            row = _row(label, experts)
            found += [Demand(row, name, AT_MOST, limit) for name, limit in highest.items()]
        if absent := [demand.data for demand in found if demand.data not in data]:
            raise ConfigurationError(
                f"The contract speaks of data {absent[0]!r}, and there are {list(data)}.",
                f"Give --data {absent[0]}=FILE, or take the term out of the contract.",
            )
        if not found:
            raise ConfigurationError(
                "The contract says nothing about these experts and data.", "Give it terms, or leave it out."
            )
        return found

    def check(self, matrix: OptOutMatrix) -> list[Clause]:
        """Hold a measurement against the contract.

        Returns:
            Every clause with what was measured: expert by expert, then the sets.

        Raises:
            ConfigurationError, UnknownExpertError: As `demands`; also if a set was not measured.
        """
        demands = self.demands(matrix.experts, matrix.data)
        if missing := [demand.set for demand in demands if demand.set not in matrix.sets]:
            raise ConfigurationError(
                f"The contract speaks of {missing[0]!r}, which was not measured.", "Measure it as a subset (--set)."
            )
        return [judge(demand, *_measured(matrix, demand), by_value=self.decided_by == VALUE) for demand in demands]

    def _of_expert(self, name: str, experts: Sequence[str], data: Sequence[str]) -> Iterator[Demand]:
        common = Terms() if name == PUBLIC else self.each
        terms = replace(common, **_said(self.experts.get(name, Terms())))
        row = label_of([other for other in experts if other != name], experts)
        if terms.own_loses is not None:
            yield Demand(row, name, AT_LEAST, terms.own_loses)
        most = {other: terms.others_change for other in data if other != name}
        if terms.public_changes is not None and name != PUBLIC:
            most[PUBLIC] = terms.public_changes
        for other, limit in most.items():
            if limit is not None:
                yield Demand(row, other, EITHER_WAY, limit)


def refuse_existing(file: str | os.PathLike) -> Path:
    """Return the path if a contract can be written there.

    Raises:
        ConfigurationError: If something is there already, or its folder is not.
    """
    path = Path(file)
    if path.exists() or not path.parent.is_dir():
        problem = "is there already" if path.exists() else "has no folder to lie in"
        raise ConfigurationError(f"The contract {path.name!r} {problem}.", "Nothing is overwritten: name a new file.")
    return path


def refuse_margin(margin: float) -> None:
    """Refuse a margin with which a contract would be broken by what it was written from.

    Raises:
        ConfigurationError: If it is below 0, or not a number.
    """
    if not 0 <= margin < math.inf:
        raise ConfigurationError(f"margin is {margin:g}.", "Give the percent that may be missed, 0 or more.")


def _row(label: str, experts: Sequence[str]) -> str:
    """Read a set as a contract writes it: a row's label, or names joined by ``+``."""
    rows = opt_out_sets(experts)
    return label if label in rows else label_of(parse_expert_set(label, experts), experts)


def _measured(matrix: OptOutMatrix, demand: Demand) -> tuple[float, float, float]:
    """Return value, low and high end of what a demand is about, in its unit."""
    if demand.rule == AT_MOST:
        interval = matrix.interval(demand.set, demand.data)
        return float(matrix.bits(demand.set, demand.data)), interval.low, interval.high
    change = matrix.change(demand.set, demand.data)
    return change.value * 100, change.interval.low * 100, change.interval.high * 100


def _measured_terms(matrix: OptOutMatrix, name: str, margin: float) -> Terms:
    changes = {data: matrix.change(matrix.without(name), data).value * 100 for data in matrix.data}
    own, public = changes.pop(name, None), changes.pop(PUBLIC, None)
    return Terms(
        own_loses=None if own is None else -_up(margin - own, 2),
        others_change=_up(max(map(abs, changes.values())) + margin, 2) if changes else None,
        public_changes=None if public is None else _up(abs(public) + margin, 2),
    )


def _up(value: float, digits: int) -> float:
    """Round up, so that what has been measured keeps the contract even without a margin."""
    # What binary fractions add behind the ninth digit is not part of the number.
    return math.ceil(round(value * 10**digits, 9 - digits)) / 10**digits


def _said(terms: Terms) -> dict[str, float]:
    return {key: value for key, value in asdict(terms).items() if value is not None}


def _read(found: Any) -> Contract:
    said = _mapping(found, "The contract", [part.name for part in fields(Contract)])
    decided_by = said.get("decided_by", INTERVAL)
    if decided_by not in (INTERVAL, VALUE):
        raise ConfigurationError(f"The contract's decided_by is {decided_by!r}.", f"Write {INTERVAL} or {VALUE}.")
    experts = _mapping(said.get("experts"), "The contract's experts")
    by_set = _mapping(said.get("bits_per_byte"), "The contract's bits_per_byte")
    return Contract(
        each=_terms(said.get("each"), "The contract's each"),
        experts={name: _terms(terms, f"The contract's experts: {name}") for name, terms in experts.items()},
        bits_per_byte={
            label: _numbers(highest, f"The contract's bits_per_byte: {label}") for label, highest in by_set.items()
        },
        decided_by=decided_by,
    )


def _terms(found: Any, where: str) -> Terms:
    said = _numbers(found, where, [part.name for part in fields(Terms)])
    for key in ("others_change", "public_changes"):
        if said.get(key, 0.0) < 0:
            raise ConfigurationError(
                f"{where} has {key}: {said[key]:g}, and no change is smaller than 0.",
                "Write the largest change either way, 0 or more.",
            )
    return Terms(**said)


def _numbers(found: Any, where: str, known: Sequence[str] | None = None) -> dict[str, float]:
    said = _mapping(found, where, known)
    for key, value in said.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ConfigurationError(f"{where} has {key}: {value!r}.", "Write a number.")
    return {key: float(value) for key, value in said.items()}


def _mapping(found: Any, where: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise ConfigurationError(
            f"{where} is no list of names with values.",
            "Write it as `name: value` lines, as docs/evaluation/optout.md shows.",
        )
    for key in found:
        if known is not None and key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"It knows {list(known)}."
            raise ConfigurationError(f"{where} has an entry {key!r}, which nothing reads.", hint)
    return dict(found)
