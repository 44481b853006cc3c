"""A real chat model tells real texts apart: the running interpreter's own source, and prose and sums written here."""

from pathlib import Path

import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines.label_sets import LabelSet
from flexolmo_hf.evaluation.baselines.prompt_router import PromptRouter, load_router

pytestmark = pytest.mark.slow

TEXTS = {
    "math": [
        "Let $x$ and $y$ be real numbers such that $x + y = 7$ and $x^2 + y^2 = 29$. Find $xy$.",
        "Prove that the sum of the first n odd integers is n^2. By induction: for n = 1 the sum is 1.",
        "Compute the determinant of the matrix with rows (1, 2) and (3, 4), and all of its eigenvalues.",
    ],
    "code": [
        Path(module.__file__).read_text("utf-8")[4000:4400]
        for module in (__import__("ast"), __import__("json.decoder").decoder, pytest)
    ],
}


@pytest.fixture(scope="module")
def chat():
    pytest.importorskip("gguf")
    try:
        return load_router()
    except ConfigurationError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("decision", ["likelihood", "calibrated"])
def test_sums_are_called_mathematics_more_than_programs_are(chat, decision):
    router = PromptRouter(*chat, LabelSet.read("four"), decision=decision)
    margins = {
        kind: [(scores := router.choose(text).scores)["mathematics"] - scores["programming"] for text in texts]
        for kind, texts in TEXTS.items()
    }

    assert min(margins["math"]) > max(margins["code"])


def test_the_question_costs_what_the_page_says(chat):
    assert PromptRouter(*chat, LabelSet.read("four")).tokens_per_question() == 120
