"""Corpora made in code."""

import json

from flexolmo_hf.evaluation.data.corpus import Corpus
from flexolmo_hf.evaluation.data.documents import write_documents
from flexolmo_hf.evaluation.data.splits import size_in_bytes


def corpus_of(folder, texts, *, splits=("test", "train")):
    """Write a corpus whose splits all hold the same texts of a domain."""
    domains = {}
    for domain, documents in texts.items():
        for split in splits:
            write_documents(folder / domain / f"{split}.jsonl", documents)
        size = size_in_bytes(documents)
        row = {"documents": len(documents), "bytes": size, "tokens": size // 4, "sha256": ""}
        domains[domain] = {"copies_dropped": 0, "contaminated_dropped": 0, "splits": {split: row for split in splits}}
    record = {"settings": {"tokens": "bytes / 4"}, "packages": {}, "domains": domains}
    (folder / "corpus.json").write_text(json.dumps(record))
    return Corpus.open(folder)
