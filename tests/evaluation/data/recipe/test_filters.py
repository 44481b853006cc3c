import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.recipe.filters import FILTERS, field_of, filter_from

# For each filter: its arguments, a row and a text that it keeps, and one that it drops.
CASES = {
    "length": ({"min": 3, "max": 5}, ({}, "four"), ({}, "longer")),
    "words": ({"min": 2, "max": 3}, ({}, "one two"), ({}, "one")),
    "language": ({"field": "lang", "any_of": ["en"]}, ({"lang": "en"}, ""), ({"lang": "de"}, "")),
    "language_score": ({"field": "id.en", "min": 0.65}, ({"id": {"en": 0.65}}, ""), ({"id": {"en": 0.6}}, "")),
    "topic": ({"field": "topic", "any_of": ["news"]}, ({"topic": ["news", "law"]}, ""), ({"topic": "law"}, "")),
    "quality_score": ({"field": "q", "min": 0.5}, ({"q": "0.7"}, ""), ({"q": None}, "")),
    "educational_score": ({"field": "edu", "min": 3}, ({"edu": [1, 3]}, ""), ({"edu": [1, 2]}, "")),
    "math_score": ({}, ({"int_score": 4}, ""), ({"int_score": 3}, "")),
    "stars": ({"min": 2}, ({"max_stars_count": 2}, ""), ({"max_stars_count": None}, "")),
    "licence": ({"field": "l", "any_of": ["MIT", "BSD"]}, ({"l": ["MIT"]}, ""), ({"l": ["MIT", "GPL"]}, "")),
    "code_lines": ({"longest": 10, "mean": 5}, ({}, "1234567890\n1\n1"), ({}, "12345678901\n1\n1")),
    "alphanumeric_share": ({"min": 0.5}, ({}, "a1.."), ({}, "a...")),
    "alphabetic_share": ({"min": 0.5}, ({}, "ab.."), ({}, "a1..")),
    "handwritten": ({"lines": 2}, ({}, "a\nb\n# Auto-generated"), ({}, "a\n# Auto-generated")),
    "repeated_lines": ({"max": 0.5}, ({}, "a\nb\na\nb"), ({}, "a\na\na\na\nb")),
    "frequent_words": ({"most": 0.4, "two": 0.6}, ({}, "a a b c d"), ({}, "a a b b c d")),
    "score": ({"min": 3}, ({"score": 3}, ""), ({"score": 2}, "")),
}


def test_every_filter_has_a_case_here():
    assert set(CASES) == set(FILTERS)


@pytest.mark.parametrize("name", CASES)
def test_a_filter_keeps_what_it_should_and_nothing_else(name):
    arguments, kept, dropped = CASES[name]
    made = filter_from({name: arguments}, "the source")

    assert made.keeps(*kept)
    assert not made.keeps(*dropped)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("a\nb\nc", True), ("aaaaaa\nbbbbbb", False), ("a\n" * 5, False)],
    ids=["short", "long on average", "many"],
)
def test_code_lines_may_be_neither_long_on_average_nor_too_many(text, kept):
    made = filter_from({"code_lines": {"longest": 10, "mean": 5, "most": 4}}, "the source")

    assert made.keeps({}, text) == kept


@pytest.mark.parametrize("licences", [None, [], [None]], ids=str)
def test_a_row_without_a_licence_is_dropped(licences):
    made = filter_from({"licence": {"field": "l", "any_of": ["MIT"]}}, "the source")

    assert not made.keeps({"l": licences}, "")


def test_one_word_alone_may_be_too_frequent():
    assert not filter_from({"frequent_words": {"most": 0.3}}, "the source").keeps({}, "a a b c d")


def test_a_field_that_rows_lack_is_refused_and_no_row_is_dropped_for_it():
    with pytest.raises(ConfigurationError, match=r"no field 'id\.en'.*It has id, text"):
        field_of({"id": {"de": 1}, "text": "secret"}, "id.en")


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"lenght": {"min": 1}}, "Did you mean 'length'"),
        ({"length": {"mni": 1}}, "Did you mean 'min'"),
        ({"length": {"min": "3"}}, "Give a whole number"),
        ({"length": {"min": True}}, "Give a whole number"),
        ({"language": {"field": "lang", "any_of": "en"}}, "Give a list of texts"),
        ({"language": {"field": "lang", "any_of": [1]}}, "Give a list of texts"),
        ({"language_score": {"min": 0.5}}, "does not say field"),
        ("length", "name: {argument: value}"),
        ({"length": {}, "words": {}}, "name: {argument: value}"),
    ],
    ids=str,
)
def test_a_filter_that_makes_no_sense_is_refused(said, says):
    with pytest.raises(ConfigurationError, match=says):
        filter_from(said, "the source")
