"""Texts can be read again whatever form they come in; public streams are copied, private ones never."""

import tempfile

import pytest

from flexolmo_hf.errors import ConfigurationError, NoSpaceError
from flexolmo_hf.routing.passes import private_passes, public_passes

TEXTS = ["one\ntwo", "", "Ünï\u2028code 🙂", "lone \ud800 surrogate"]
FORMS = {
    "a list": lambda: TEXTS,
    "a tuple": lambda: tuple(TEXTS),
    "a function": lambda: lambda: iter(TEXTS),
    "an iterator": lambda: iter(TEXTS),
    "a generator": lambda: (text for text in TEXTS),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@every_form
def test_public_texts_can_be_read_as_often_as_needed(form):
    with public_passes(form()) as passes:
        assert [list(passes()) for _ in range(3)] == [TEXTS] * 3


@every_form
def test_private_texts_can_be_read_as_often_as_needed(form):
    passes = private_passes(form(), at_most=len(TEXTS))

    assert [list(passes()) for _ in range(3)] == [TEXTS] * 3


@pytest.mark.parametrize("texts", [TEXTS, iter(TEXTS), lambda: iter(TEXTS)], ids=["list", "iterator", "function"])
def test_private_text_is_never_written_to_a_file(texts, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr("builtins.open", refuse)

    assert list(private_passes(texts, at_most=10)()) == TEXTS


def test_a_long_private_stream_is_refused_before_more_of_it_is_read():
    read = []

    def stream():
        for number in range(1000):
            read.append(number)
            yield str(number)

    with pytest.raises(ConfigurationError, match="more than 10 documents"):
        private_passes(stream(), at_most=10)
    assert len(read) == 11


def test_a_list_needs_no_copy(monkeypatch):
    monkeypatch.delattr(tempfile, "TemporaryFile")

    with public_passes(TEXTS) as passes:
        assert list(passes()) == TEXTS


def test_a_disk_that_is_too_small_for_the_copy_is_named(monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexolmo_hf.routing.passes.json.dumps", full)

    with pytest.raises(NoSpaceError), public_passes(iter(TEXTS)):
        pass


@pytest.mark.parametrize("texts", ["one text", b"bytes", ["a", 3], iter([{"text": "a secret"}])])
def test_what_is_no_row_of_texts_is_refused_without_showing_it(texts):
    with pytest.raises(ConfigurationError) as caught, public_passes(texts) as passes:
        list(passes())

    assert "one string" in str(caught.value) or "is of type" in str(caught.value)
    assert "secret" not in str(caught.value)
