"""The data of router tuning: one source per expert, from which sequences are taken in turn (arXiv 2507.07024)."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset, interleave_datasets
from transformers.utils import logging
from trl.data_utils import get_dataset_column_names

from flexolmo_hf.errors import ConfigurationError, UnknownExpertError
from flexolmo_hf.modeling.names import PUBLIC
from flexolmo_hf.trainers.rows import refuse_too_short

logger = logging.get_logger(__name__)

#: What a prepared sequence may hold.
_COLUMNS = ("input_ids", "labels", "seq_lengths")


def checked_sources(given: Any, experts: Sequence[str]) -> dict[str, Any]:
    """Return the data by expert, in the order of the experts.

    Args:
        given: What the caller gave.
        experts: The model's experts.

    Raises:
        ConfigurationError: If it is no mapping of data sets, one is empty, kinds are mixed, or public data is missing.
        UnknownExpertError: If a name is no expert's.
    """
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"train_dataset is a {type(given).__name__}, which does not say whose proxies it holds.",
            'Give data by expert: {"public": ..., "math": ...}.',
        )
    for name in given:
        if name not in experts:
            raise UnknownExpertError(name, experts)
    if PUBLIC not in given:
        raise ConfigurationError(
            f"There is no data for {PUBLIC!r}: the router would forget when it is to be left to the public expert.",
            f"Add public data under {PUBLIC!r}.",
        )
    sources = {name: given[name] for name in experts if name in given}
    kinds = {type(source) for source in sources.values()}
    if not any(all(issubclass(kind, wanted) for kind in kinds) for wanted in (Dataset, IterableDataset)):
        raise ConfigurationError(
            f"The data is given as {sorted(kind.__name__ for kind in kinds)}.",
            "Give a datasets.Dataset for every expert, or an IterableDataset for every expert.",
        )
    for name, source in sources.items():
        _refuse_empty(name, source)
    if silent := [name for name in experts if name not in sources]:
        logger.warning(
            f"There is no proxy data for {silent}: their rows are tuned too, by data that is not theirs, and they will "
            "be chosen less."
        )
    return sources


def in_turn(prepared: Mapping[str, Any]) -> Any:
    """Mix sequences so that each expert has the same number of them.

    Args:
        prepared: Sequences of token ids by expert, as TRL prepares them.

    Returns:
        The sequences, taken from each expert in turn until the longest source has been used up; shorter ones start
        again.

    Raises:
        ConfigurationError: If nothing to train on remained of a source.
    """
    for name, source in prepared.items():
        _refuse_empty(name, source)
        refuse_too_short(source)
    sources = list(prepared.values())
    known = [set(get_dataset_column_names(source)) for source in sources]
    shared = [column for column in _COLUMNS if all(column in columns for columns in known)]
    return interleave_datasets([source.select_columns(shared) for source in sources], stopping_strategy="all_exhausted")


def _refuse_empty(name: str, source: Any) -> None:
    if isinstance(source, Dataset) and not len(source):
        raise ConfigurationError(f"The data for {name!r} is empty.", "Give some rows with text, or leave it out.")
