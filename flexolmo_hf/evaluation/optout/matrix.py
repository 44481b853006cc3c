"""The opt-out matrix: held-out bits per byte of each data set, with every expert left out in turn."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from flexolmo_hf.errors import ConfigurationError, NotFlexOlmoError, UnknownExpertError
from flexolmo_hf.evaluation.bits_per_byte import BitsPerByte, bits_of_windows, together
from flexolmo_hf.evaluation.intervals import Interval, bootstrap, bootstrap_change
from flexolmo_hf.evaluation.optout.sharing import shared_first_layer
from flexolmo_hf.evaluation.windows import (
    Window,
    batched_by_length,
    cut_into_windows,
    refuse_one_string,
    refuse_sizes,
    window_length,
)
from flexolmo_hf.modeling.adapters import has_adapters
from flexolmo_hf.modeling.expert_parallel import is_spread
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.names import parse_expert_set

#: The row of the matrix in which no expert is left out. With a space in it, it is no expert's name.
ALL = "all experts"


@dataclass(frozen=True)
class Change:
    """The relative change of the bits per byte when experts are left out; above 0 is worse.

    Attributes:
        value: Bits per byte without them over bits per byte with all, minus 1.
        interval: The paired interval: both are measured on the same draws of documents.
    """

    value: float
    interval: Interval

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies wholly on one side of 0."""
        # An end that is not a number lies nowhere.
        return self.interval.low > 0 or self.interval.high < 0


@dataclass(frozen=True, eq=False)
class OptOutMatrix:
    """Bits per byte by set of experts and data set. It holds numbers, and no text.

    Attributes:
        sets: The rows: the experts of each set by its label. "all experts" comes first, then "without NAME" for each
            expert, then the chosen subsets, as names joined by ``+``.
        documents: What each document needs, by set and data set. Empty documents are left out.
        max_length: Tokens in a window.
        keys: What each set computes, by its weights (`expert_set_key`); empty if the model has adapters or its experts
            are spread over processes.
    """

    sets: dict[str, list[str]]
    documents: dict[str, dict[str, list[BitsPerByte]]]
    max_length: int
    keys: dict[str, str] = field(default_factory=dict)
    _changes: dict[tuple[str, str], Change] = field(default_factory=dict, init=False, repr=False)

    @property
    def experts(self) -> list[str]:
        """The experts of the first row, in checkpoint order."""
        return self.sets[ALL]

    @property
    def data(self) -> list[str]:
        """Names of the data sets, the columns."""
        return list(self.documents[ALL])

    def bits(self, label: str, data: str) -> BitsPerByte:
        """Return the bits per byte of a data set with a set of experts."""
        return together(self.documents[label][data])

    def interval(self, label: str, data: str) -> Interval:
        """Return the interval of `bits`, over documents."""
        return bootstrap(self.documents[label][data])

    def change(self, label: str, data: str) -> Change:
        """Return the relative change from all experts to a set."""
        if (label, data) not in self._changes:
            after, before = self.documents[label][data], self.documents[ALL][data]
            # Drawing a thousand times takes a while, and tables, figures and contracts ask for the same.
            self._changes[label, data] = Change(together(after) / together(before) - 1, bootstrap_change(after, before))
        return self._changes[label, data]

    def left_out(self, label: str) -> list[str]:
        """Return the experts that a set leaves out."""
        return [name for name in self.experts if name not in self.sets[label]]

    def is_own(self, label: str, data: str) -> bool:
        """Tell whether a set leaves out the expert that a data set is named after."""
        return data in self.left_out(label)

    def without(self, expert: str) -> str:
        """Return the label of the row in which one expert is left out.

        Raises:
            UnknownExpertError: If there is no such expert.
        """
        if expert not in self.experts:
            raise UnknownExpertError(expert, self.experts)
        return label_of([name for name in self.experts if name != expert], self.experts)


def opt_out_matrix(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Sequence[str]],
    *,
    subsets: Iterable[str | Sequence[str]] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> OptOutMatrix:
    """Measure all experts together, every expert left out in turn, and chosen subsets, on one loaded model.

    Each row is exactly what a checkpoint merged without the experts gives. The texts are tokenised once, every batch
    goes through all sets before the next, and what the first layer computes the same way for all sets is computed once.
    The set in force stays as it is: experts that are off count as absent.

    Args:
        model: A FlexOlmo model. It is put into evaluation mode for the measurement.
        tokenizer: Its tokenizer.
        data: Documents by the name of the data set. One that is named after an expert is that expert's own.
        subsets: Further sets, each as names or as names joined by ``+``.
        max_length: As in `bits_per_byte`.
        batch_size: As in `bits_per_byte`.
        progress: Called with the batches done and the batches of all sets and data sets.

    Returns:
        Bits per byte by set and data set, document by document.

    Raises:
        NotFlexOlmoError: If the model has no named experts.
        ConfigurationError: If there is nothing to score, only one expert is in force, or a size is too small.
        UnknownExpertError, DuplicateExpertError, EmptyExpertSetError, ExpertTypeError: If a subset is none of the
            experts in force.
    """
    if not isinstance(model, ExpertSets):
        raise NotFlexOlmoError(model.config.model_type)
    sets = opt_out_sets(model.active_experts, subsets)
    max_length = window_length(model.config, max_length)
    refuse_sizes(max_length, batch_size)
    documents = not_empty(data)
    batches = {name: _cut(tokenizer, texts, max_length, batch_size) for name, texts in documents.items()}
    steps = _Steps(len(sets) * sum(map(len, batches.values())), progress)
    measured = {name: _measure(model, sets, batches[name], texts, steps) for name, texts in documents.items()}
    # The keys are of the weights that have been measured, and hashing reads all of them: last, and once.
    keyless = has_adapters(model) or is_spread(model.mixtures)  # type: ignore[arg-type]
    keys = {} if keyless else {label: model.expert_set_key(names) for label, names in sets.items()}  # type: ignore
    by_set = {label: {name: measured[name][label] for name in documents} for label in sets}
    return OptOutMatrix(sets, by_set, max_length, keys)


def not_empty(data: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Leave out empty documents.

    Raises:
        ConfigurationError: If there is no data set, one has no document left, or is one string.
    """
    for name, texts in data.items():
        refuse_one_string(texts, f" of {name!r}")
    documents = {name: [text for text in texts if text] for name, texts in data.items()}
    if not documents or not all(documents.values()):
        empty = [name for name, texts in documents.items() if not texts]
        raise ConfigurationError(
            f"There is nothing to score{f' in {empty}' if empty else ''}.",
            "Give at least one document that is not empty for each data set.",
        )
    return documents


def opt_out_sets(experts: Sequence[str], subsets: Iterable[str | Sequence[str]] | None = None) -> dict[str, list[str]]:
    """List the rows of a matrix: all experts, all but each one, and chosen subsets; each set once.

    Raises:
        ConfigurationError: If there is one expert only.
        UnknownExpertError, DuplicateExpertError, EmptyExpertSetError, ExpertTypeError: If a subset is none of these
            experts.
    """
    chosen = [parse_expert_set(subset, experts) for subset in subsets or ()]
    if len(experts) == 1:
        raise ConfigurationError(
            f"The only expert in force is {experts[0]!r}, and a model needs one.", "Load or switch on at least two."
        )
    leave_one_out = [[name for name in experts if name != off] for off in experts]
    return {label_of(names, experts): names for names in [list(experts), *leave_one_out, *chosen]}


def label_of(names: Sequence[str], experts: Sequence[str]) -> str:
    """Name a row: "all experts", "without NAME", or the names of a smaller set joined by ``+``."""
    off = [name for name in experts if name not in names]
    if not off:
        return ALL
    return f"without {off[0]}" if len(off) == 1 else "+".join(names)


class _Steps:
    """Counts what has been done for whoever wants to know."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None):
        self.done, self.total, self.progress = 0, total, progress

    def count(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _cut(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, batch_size: int
) -> list[list[Window]]:
    return list(batched_by_length(cut_into_windows(tokenizer, texts, max_length), batch_size))


def _measure(
    model: Any, sets: Mapping[str, list[str]], batches: Sequence[list[Window]], texts: Sequence[str], steps: _Steps
) -> dict[str, list[BitsPerByte]]:
    bits = {label: [0.0] * len(texts) for label in sets}
    tokens = [0] * len(texts)
    for batch, found in _scores(model, sets, batches, steps):
        for row, window in enumerate(batch):
            tokens[window.document] += len(window.tokens) - 1
            for label in sets:
                bits[label][window.document] += found[label][row]
    sizes = [len(text.encode()) for text in texts]
    return {
        label: [BitsPerByte(*document) for document in zip(of_set, sizes, tokens, strict=True)]
        for label, of_set in bits.items()
    }


def _scores(
    model: Any, sets: Mapping[str, list[str]], batches: Sequence[list[Window]], steps: _Steps
) -> Iterator[tuple[list[Window], dict[str, list[float]]]]:
    """Yield each batch with the bits of its windows by set."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            found = {}
            with shared_first_layer(model, tokens=len(batch) * len(batch[0].tokens)):
                for label, names in sets.items():
                    found[label] = bits_of_windows(model, batch, active_experts=names)
                    steps.count()
            yield batch, found
    finally:
        model.train(was_training)
