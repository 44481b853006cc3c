"""The opt-out matrix of a checkpoint and files of data, as the command line asks for it."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.models import load_mixture, read_device, read_dtype
from flexolmo_hf.evaluation.optout.contract import Contract
from flexolmo_hf.evaluation.optout.matrix import OptOutMatrix, not_empty, opt_out_matrix
from flexolmo_hf.evaluation.windows import refuse_sizes
from flexolmo_hf.routing.texts import read_texts


@dataclass(frozen=True)
class Reading:
    """How models and data are read.

    Attributes:
        experts: Experts to load; None for all.
        subsets: Further sets to measure, as names joined by ``+``.
        max_length: Tokens in a window; None for the default of `opt_out_matrix`.
        batch_size: Windows at once.
        limit: Documents of each data set at most, the first ones; None for all.
        field: Key of the text in a row.
        dtype: Of the weights.
        device: Where the model runs.
    """

    experts: Sequence[str] | None = None
    subsets: Sequence[str] = ()
    max_length: int | None = None
    batch_size: int = 8
    limit: int | None = None
    field: str = "text"
    dtype: str = "float32"
    device: str = "cpu"


def opt_out_files(
    model: str | os.PathLike,
    data: Mapping[str, str | os.PathLike],
    *,
    reading: Reading | None = None,
    contract: Contract | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OptOutMatrix:
    """Load a checkpoint once and measure its opt-out matrix on files.

    Args:
        model: A FlexOlmo checkpoint: folder or repository.
        data: A ``.jsonl`` or ``.txt`` file, or a folder of them, by the name of the data set.
        reading: How they are read.
        contract: The subsets it speaks of are measured too.
        progress: As in `opt_out_matrix`.

    Returns:
        The matrix.

    Raises:
        FlexOlmoError: The kind that fits, if the model, the data or a setting is refused.
    """
    reading = Reading() if reading is None else reading
    # Settings and data first: they are read faster than a model is loaded.
    refuse_sizes(reading.max_length, reading.batch_size)
    read_dtype(reading.dtype)
    read_device(reading.device)
    texts = not_empty({name: _texts(place, reading) for name, place in data.items()})
    loaded, tokenizer = load_mixture(
        str(model), active_experts=reading.experts, dtype=reading.dtype, device=reading.device
    )
    subsets = list(reading.subsets)
    if contract is not None:
        # Measuring takes long, and a contract that does not fit is refused at once.
        contract.demands(loaded.active_experts, list(texts))
        subsets += contract.subsets
    return opt_out_matrix(
        loaded,
        tokenizer,
        texts,
        subsets=subsets,
        max_length=reading.max_length,
        batch_size=reading.batch_size,
        progress=progress,
    )


def _texts(place: str | os.PathLike, reading: Reading) -> list[str]:
    if reading.limit is not None and reading.limit < 1:
        raise ConfigurationError(f"limit is {reading.limit}.", "Measure at least 1 document of each data set.")
    return list(islice(filter(None, read_texts([place], field=reading.field)), reading.limit))
