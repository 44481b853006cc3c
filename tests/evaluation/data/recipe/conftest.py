import gzip
import json

import pytest
import yaml

from flexolmo_hf.evaluation.data.documents import read_documents


def sentence(topic, number):
    return f"{topic} {number}: " + " ".join(f"{topic}word{number}x{index}" for index in range(60))


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if file.name.endswith(".gz") else data)
    return file


def documents(corpus, domain):
    return [text for shard in sorted((corpus / domain).glob("shard-*.jsonl")) for text in read_documents(shard)]


SMALL = {
    "name": "small",
    "tokenizer": "bytes / 4",
    "shuffle_rows": 7,
    "shard_bytes": 2000,
    "documents": 1000,
    "domains": {
        "math": {
            "tokens": 100_000,
            "sources": {"problems": {"repository": "owner/problems", "licence": "MIT", "text": "text"}},
        }
    },
}


@pytest.fixture
def recipe(tmp_path):
    """Write a small recipe, with changes to its only source or to the whole."""

    def write(whole=None, **source):
        said = json.loads(json.dumps({**SMALL, **(whole or {})}))
        said["domains"].get("math", {"sources": {"problems": {}}})["sources"]["problems"].update(source)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(said))
        return tmp_path / "recipe.yaml"

    return write
