"""On real text: who holds code is given the code among documents that are mostly prose, and not their own."""

import ast
import sysconfig
from pathlib import Path

import pytest

from flexolmo_hf import select_proxy

pytest.importorskip("sklearn")

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


def code_and_prose(file):
    """The functions of a module without their docstrings, and its docstrings."""
    code, prose = [], []
    for node in ast.walk(ast.parse(file.read_text("utf8"))):
        if not isinstance(node, DEFINITIONS):
            continue
        if docstring := ast.get_docstring(node):
            prose.append(docstring)
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 8:
            code.append(ast.unparse(node))
    return code, [text for text in prose if len(text) > 150]


@pytest.fixture(scope="module")
def corpora():
    """Private: code of some modules of the standard library. Public: prose of all of it, code of others, and copies."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    apart = [code_and_prose(file) for file in files]
    private = [text for code, _ in apart[::2] for text in code][:400]
    prose = [text for _, prose in apart for text in prose][:700]
    code = [text for code, _ in apart[1::2] for text in code][:100]
    return private, prose + code + private[:20], len(prose)


def hashed_words(texts):
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=256, alternate_sign=False).transform(texts).toarray()


@pytest.mark.parametrize("diverse", [False, True], ids=["best", "diverse"])
def test_code_finds_code_among_prose(corpora, diverse):
    private, public, prose = corpora
    found = select_proxy(public, private, n=40, encoder=hashed_words, diverse=diverse)
    precision = sum(index >= prose for index in found.indices) / len(found)
    report = found.classifier
    # The public side holds code as well, which a classifier cannot tell from the private code.
    print(
        f"{len(private)} private, {len(public)} public, {precision:.2f} of {len(found)} are code; "
        f"accuracy {report.accuracy:.3f}, AUC {report.auc:.3f}, calibration error {report.calibration_error:.3f}, "
        f"{found.leaks.removed} near-duplicates removed, distance {found.leaks.distance['50%']:.3f}"
    )

    assert precision > 0.9
    assert report.accuracy > 0.8
    assert found.leaks.removed >= 10
    assert not set(found.texts) & set(private)
