"""From a checkpoint and files of documents to a folder of tables, figures and, if wanted, a page of one text."""

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from flexolmo_hf._extras import require
from flexolmo_hf._folder import new_folder, refuse_nonempty
from flexolmo_hf.errors import ConfigurationError, DamagedFileError
from flexolmo_hf.evaluation.models import load_mixture, read_device, read_dtype
from flexolmo_hf.evaluation.routing_shares.page import text_page
from flexolmo_hf.evaluation.routing_shares.report import write_report
from flexolmo_hf.evaluation.routing_shares.result import RoutingShares
from flexolmo_hf.evaluation.routing_shares.shares import no_text, routing_shares
from flexolmo_hf.routing.texts import read_texts

#: The one file of the folder that holds text.
PAGE = "text.html"


def shares_of_files(
    checkpoint: str,
    data: Mapping[str, str | os.PathLike],
    output: str | os.PathLike | None = None,
    *,
    html_text: str | os.PathLike | None = None,
    active_experts: Any = None,
    limit: int | None = None,
    field: str = "text",
    dtype: str = "auto",
    device: str = "cpu",
    **sizes: Any,
) -> RoutingShares:
    """Measure the experts' shares of documents in files, and write them into a folder.

    Args:
        checkpoint: A FlexOlmo checkpoint, folder or repository.
        data: Where the documents of each domain lie: a ``.jsonl`` or ``.txt`` file, or a folder of them.
        output: Folder for `write_report`'s files; it appears whole or not at all. None to write nothing.
        html_text: A text file to be shown in ``text.html`` there.
        active_experts: Which experts to load; the others are not read. None as for `from_pretrained`.
        limit: Documents of each domain at most.
        field: The key of the text in ``.jsonl`` lines.
        dtype: Of the weights; ``auto`` for that of the checkpoint.
        device: Where to compute.
        **sizes: `max_length`, `batch_size` and `top_k` of `routing_shares`.

    Returns:
        The shares.

    Raises:
        FlexOlmoError: If anything given is not what it should be. Files that are not there or hold no text are refused
            before anything is measured, a damaged line when it is read.
    """
    if html_text is not None and output is None:
        raise ConfigurationError("A page was asked for and has no place.", "Name an output folder too (--output).")
    if limit is not None and limit < 1:
        raise ConfigurationError(f"limit is {limit}.", "Give the number of documents, at least 1.")
    if output is not None:
        require("eval", "matplotlib")
        refuse_nonempty(output)
    text = None if html_text is None else _read(Path(html_text))
    read_dtype(dtype)
    read_device(device)
    for domain, place in data.items():
        if not any(read_texts([place], field=field)):
            raise no_text(domain)
    model, tokenizer = load_mixture(checkpoint, active_experts=active_experts, dtype=dtype, device=device)
    page = None if text is None else text_page(model, tokenizer, text)
    texts = {domain: _documents(domain, place, field, limit) for domain, place in data.items()}
    shares = routing_shares(model, tokenizer, texts, **sizes)
    if output is None:
        return shares
    with new_folder(output) as folder:
        write_report(shares, folder)
        if page is not None:
            (folder / PAGE).write_text(page, encoding="utf8", newline="")
    return shares


def _documents(domain: str, place: str | os.PathLike, field: str, limit: int | None) -> Iterator[str]:
    # `disable=None`: a bar where someone is watching, none in a log.
    yield from tqdm(islice(read_texts([place], field=field), limit), desc=domain, unit=" documents", disable=None)


def _read(file: Path) -> str:
    try:
        return file.read_text("utf8")
    except UnicodeDecodeError:
        # The cause would carry a piece of the text.
        raise DamagedFileError(file.name, "it is not UTF-8") from None
    except OSError:
        raise ConfigurationError(f"The text {file.name!r} cannot be read.", "Give a file that exists.") from None
