"""Proxy data from files to files, as the command line wants it."""

import os
import tempfile
from functools import partial

from flexolmo_hf._folder import refuse_nonempty
from flexolmo_hf._rows import stream_texts
from flexolmo_hf.routing.proxy import select_proxy
from flexolmo_hf.routing.proxy_selection import ProxySelection
from flexolmo_hf.routing.proxy_settings import ProxySettings


def select_proxy_files(
    public: str | os.PathLike,
    private: str | os.PathLike,
    out: str | os.PathLike,
    *,
    n: int,
    encoder: str,
    classifier: str = "logistic",
    diverse: bool = False,
    seed: int = 0,
    field: str = "text",
) -> ProxySelection:
    """Choose from the documents of files, and write the choice to a folder; see `select_proxy`.

    The files are read where they lie: no copy of private text is made.

    Args:
        public: A file or folder with public documents.
        private: A file or folder with private documents.
        out: Folder for ``proxy.jsonl``, which is passed on, and ``owner``, which is not; new or empty. See
            `ProxySelection.save`.
        n: How many documents to choose.
        encoder: The folder or Hub repository of a sentence-transformers model.
        classifier: ``"logistic"`` or ``"finetune"``.
        diverse: Choose documents that differ from each other as well.
        seed: Decides the samples and the training.
        field: The key of a row that holds its text.

    Raises:
        FlexOlmoError: The kind that fits, if files, settings or the output folder are refused.
    """
    refuse_nonempty(out)
    with tempfile.TemporaryDirectory() as cache:
        found = select_proxy(
            partial(stream_texts, [os.fspath(public)], cache, field=field),
            partial(stream_texts, [os.fspath(private)], cache, field=field),
            n=n,
            encoder=encoder,
            classifier=classifier,
            diverse=diverse,
            settings=ProxySettings(seed=seed),
        )
    found.save(out)
    return found
