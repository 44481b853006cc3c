import pytest

from flexolmo_hf.errors import ConfigurationError, DamagedFileError
from flexolmo_hf.evaluation.data.corpus import Corpus
from tests.evaluation.data.handmade import corpus_of


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(tmp_path / "corpus", {"public": ["One."], "math": ["1 + 1 = 2", "2"]})


def test_documents_come_back_by_domain_and_split(corpus):
    opened = Corpus.open(corpus.folder)

    assert opened.domains == ("public", "math")
    assert opened.splits("math") == ("test", "train")
    assert opened.documents("math", "train") == ["1 + 1 = 2", "2"]


@pytest.mark.parametrize(
    ("domain", "split", "says"),
    [("maht", "test", "Did you mean 'math'?"), ("public", "web", "There are test, train."), ("x", "y", "public, math")],
)
def test_what_is_not_there_is_refused_with_what_is(corpus, refused, domain, split, says):
    with refused(ConfigurationError, says):
        corpus.documents(domain, split)


def test_folder_without_a_corpus_is_refused_with_the_command_that_makes_one(tmp_path, refused):
    with refused(ConfigurationError, "flexolmo data build"):
        Corpus.open(tmp_path)


@pytest.mark.parametrize("record", ["{", "[]", "{}"])
def test_damaged_record_is_refused(tmp_path, refused, record):
    (tmp_path / "corpus.json").write_text(record)

    with refused(DamagedFileError, "corpus.json"):
        Corpus.open(tmp_path)
